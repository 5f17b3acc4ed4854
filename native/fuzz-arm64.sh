#!/bin/sh
# The kernels for arm64, compiled here and fuzzed in an emulator:  native/fuzz-arm64.sh [FOLDER [CASES]]
# Ends with 77 where the compiler or the emulator is missing.
set -eu
native=$(dirname "$0") folder=${1:-build/arm64} cases=${2:-100}
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja; do
  command -v $tool >/dev/null || { echo "there is no $tool (Debian: apt-get install g++-aarch64-linux-gnu qemu-user cmake ninja-build)"; exit 77; }
done
cmake -G Ninja -S "$native" -B "$folder" -DNORMKIT_FUZZ=ON -DNORMKIT_CASES="$cases" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
cmake --build "$folder"
ctest --test-dir "$folder" --output-on-failure
