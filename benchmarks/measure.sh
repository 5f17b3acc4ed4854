#!/bin/sh
# Makes RESULTS.md and the records beside it again: half an hour on two quiet cores, no step over ten minutes.
# From the repository's root, with normkit's Python first in PATH; a step that was interrupted is started again by its line.
set -e
page=benchmarks/RESULTS.md
main=layer_norm,rms_norm,group_norm,instance_norm,batch_norm,"layer_norm over channels"
normkit bench --threads 1 --rounds 7 --output runs/bench --overwrite --results $page
normkit bench --threads 1 --rounds 7 --output runs/bench-compile --overwrite --results $page --quick --compile --methods "$main"
python benchmarks/small_calls.py --output $page
python benchmarks/accuracy.py --output $page
python benchmarks/conditioning.py --rounds 30 --output $page
python benchmarks/end_to_end.py --threads 1 --overwrite --output $page --networks resnet,resnet_last,convnext,vit
python benchmarks/end_to_end.py --threads 1 --overwrite --output $page --networks llama,bert,unet,lstm,nerf
python benchmarks/memory.py --output $page
python benchmarks/memory.py --steps --output $page
python benchmarks/fold.py --rounds 21 --output $page
python benchmarks/monitor.py --rounds 15 --steps 201 --output $page
