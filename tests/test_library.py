"""The library of kernels: which one is loaded, what the environment can ask for, and why there may be none."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normkit import Affine, Rule, Support
from normkit.core.errors import BackendError
from normkit.engine import library
from normkit.engine.dispatch import backends
from normkit.functional import run

ROOT = Path(__file__).parent.parent
FORCED = {name: os.environ[name] for name in ("NORMKIT_ISA", "NORMKIT_LIBRARIES") if os.environ.get(name)}

needs_kernels = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.why_not()}")

Ask = Callable[..., None]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Sets the environment that decides, and has the choice made anew; afterwards it is made as it was."""

    def ask(isa: str = "", libraries: str | Path = "") -> None:
        monkeypatch.setenv("NORMKIT_ISA", isa)
        if libraries:
            monkeypatch.setenv("NORMKIT_LIBRARIES", str(libraries))
        library._loaded.cache_clear()

    yield ask
    library._loaded.cache_clear()


@pytest.mark.skipif(bool(FORCED), reason="the environment decides")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_there_are_kernels_where_there_is_a_compiler() -> None:
    assert library.why_not() is None


@needs_kernels
def test_it_is_loaded_once_and_says_what_it_is() -> None:
    assert library.library() is library.library()
    isa, threads = library.description().split(", ", 1)
    assert isa in library._LEVELS
    assert "thread" in threads
    assert backends()["native"] is None


@needs_kernels
def test_threads_are_those_of_torch() -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        pytest.skip("this torch does not share its threads")
    assert library.description().endswith("torch's threads")


@needs_kernels
def test_an_instruction_set_by_name(ask: Ask) -> None:
    ask("baseline")
    assert library.description().startswith("baseline, ")
    found = library.library()
    assert found is not None
    for isa, level in library._LEVELS.items():
        ask(isa)
        if level <= found.nk_level():
            assert library.description().startswith(f"{isa}, ")
        else:
            with pytest.raises(BackendError, match=f"'{isa}', which this processor lacks; the best it has is"):
                library.library()


def test_none_on_request(ask: Ask) -> None:
    ask("none")
    assert library.library() is None
    assert library.why_not() == library.description() == "NORMKIT_ISA is none; unset it to use them"
    assert backends()["native"] == library.why_not()

    ask("sse9")
    with pytest.raises(BackendError, match="'sse9'; wanted one of x86-64-v4, x86-64-v3, baseline, none"):
        library.library()


FOREIGN = "they do not load: .*is no library of this normkit: it lacks nk_abi, nk_level, "


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (lambda file: None, r"none are in .*C\+\+ compiler"),
        (lambda file: file.write_text("nonsense"), "they do not load: "),
        (lambda file: file.symlink_to(str(torch._C.__file__)), FOREIGN),
    ],
)
def test_a_folder_without_our_library(ask: Ask, tmp_path: Path, put: Callable[[Path], Any], said: str) -> None:
    put(library._file(tmp_path, "baseline"))
    ask(libraries=tmp_path)
    assert library.library() is None
    assert re.match(said, str(library.why_not()))
    ask("baseline", tmp_path)
    with pytest.raises(BackendError, match=f"'baseline', but there are no native kernels: {said}"):
        library.library()


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="other loaders check it themselves")
def test_a_library_cut_short_is_refused_and_never_mapped(tmp_path: Path) -> None:
    whole = library._file(library._PACKAGE / "lib", "baseline").read_bytes()
    kept = (0, 3, 63, 64, 200, 4096, len(whole) // 2, len(whole) - 1)
    for size in kept:
        (tmp_path / str(size)).mkdir()
        library._file(tmp_path / str(size), "baseline").write_bytes(whole[:size])
    # In a process of its own, which a read past the end of a mapped file would kill.
    code = f"from normkit.engine.library import _load\nfor n in {kept}: print(_load('', f'{tmp_path}/{{n}}').what)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    for size, reason in zip(kept, process.stdout.splitlines(), strict=True):
        assert reason.startswith("they do not load: ")
        assert ("is cut short" in reason) == (size >= 64)
        assert "; to replace them: " in reason


@needs_kernels
def test_a_library_of_another_version_is_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_ABI", library._ABI + 1)
    ask()
    assert library.library() is None
    assert f"its interface is {library._ABI - 1}, this one's {library._ABI}" in str(library.why_not())


def test_every_function_of_the_library_is_asked_for() -> None:
    sources = "".join(path.read_text() for path in library._sources())
    assert set(re.findall(r"^NK_EXPORT \w+ (nk_\w+)\(", sources, re.MULTILINE)) == set(library._SYMBOLS)


def test_kernels_for_arm64_pass_their_fuzzer_in_an_emulator(tmp_path: Path) -> None:
    command = ["sh", str(Path(__file__).parent.parent / "native/fuzz-arm64.sh"), str(tmp_path), "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_libraries_older_than_sources_are_not_used(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, native = tmp_path / "src" / "normkit", tmp_path / "native"
    (package / "lib").mkdir(parents=True)
    native.mkdir()
    library._file(package / "lib", "baseline").touch()
    (package / "lib" / "built").touch()
    (native / "plan.h").touch()
    os.utime(native / "plan.h", (2e9, 2e9))
    monkeypatch.delenv("NORMKIT_LIBRARIES", raising=False)
    monkeypatch.setattr(library, "_PACKAGE", package)
    ask()
    assert library.why_not() == "they are older than native/plan.h; to build them again: make native"


RULES = {
    "row": Rule(Support("* d", over="d"), compensation=Affine("d")),
    "column": Rule(Support("n c", over="n"), compensation=Affine("c")),
    "block": Rule(Support("n c *", over="n *"), compensation=Affine("c")),
}


def results() -> dict[str, list[Tensor]]:
    """Output and gradients of each kind of loop nest on the kernels."""
    found = {}
    for name, rule in RULES.items():
        torch.manual_seed(0)
        shape = (9, 37, 21) if name == "block" else (133, 37)
        x, gradient = torch.randn(shape).add_(2.0).requires_grad_(), torch.randn(shape)
        weight, bias = torch.randn(37, requires_grad=True), torch.randn(37, requires_grad=True)
        y = run(rule, x, weight, bias, backend="native")
        found[name] = [y.detach(), *torch.autograd.grad(y, (x, weight, bias), gradient)]
    return found


@needs_kernels
def test_baseline_computes_what_the_best_does(tmp_path: Path) -> None:
    code = f"import test_library, torch; torch.save(test_library.results(), {str(tmp_path / 'found.pt')!r})"
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NORMKIT_ISA": "baseline", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    # The order of summation differs with the number of lanes: errors of about sqrt(n) units in the last place of values below 10.
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), results(), rtol=1e-5, atol=2e-5)
