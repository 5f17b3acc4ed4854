"""The parts of torch that begin with an underscore and that the package uses, found in its sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src/normkit"


def private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in dotted.split("."))


def chain(node: ast.AST) -> str:
    """The dotted name that an expression is, or ""."""
    if isinstance(node, ast.Name):
        return node.id
    inner = chain(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if isinstance(node, ast.Attribute) and inner else ""


def used(path: Path) -> Iterator[str]:
    """The full names of torch's private parts in a file."""
    tree = ast.parse(path.read_text())
    meant: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                top = name.name.split(".")[0]
                meant[name.asname or top] = name.name if name.asname else top
        elif isinstance(node, ast.ImportFrom):
            meant |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    yield from (full for full in meant.values() if full.startswith("torch.") and private(full))
    for node in ast.walk(tree):
        first, _, rest = chain(node).partition(".")
        full = f"{meant.get(first, '')}.{rest}"
        if rest and full.startswith("torch.") and private(full):
            yield full


def internals() -> dict[str, set[str]]:
    """Each private part of torch in the package, the longest names of them, with the files that use it."""
    found: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if "lab" in path.parts:
            continue
        names = set(used(path))
        for name in names:
            if not any(other.startswith(f"{name}.") for other in names):
                found.setdefault(name, set()).add(path.relative_to(SOURCE).as_posix())
    return found
