"""The package as text: every module's path, syntax tree and imports, read without importing anything."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "slipstream"


@dataclass(frozen=True)
class Source:
    path: str  # inside slipstream/, without .py: "kernels/norm", "schema/__init__", "errors"
    tree: ast.Module


@dataclass(frozen=True)
class Import:
    line: int
    module: str  # "torch.nn", "slipstream.errors"
    name: str | None  # what follows `from module import`, one Import each


@cache
def sources() -> tuple[Source, ...]:
    files = sorted(PACKAGE.rglob("*.py"))
    return tuple(
        Source(file.relative_to(PACKAGE).with_suffix("").as_posix(), ast.parse(file.read_text(encoding="utf-8")))
        for file in files
    )


def imports(source: Source) -> list[Import]:
    """All imports, those inside functions and under TYPE_CHECKING too."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"slipstream/{source.path}.py:{node.lineno}: write imports from the package's root."
            found += [Import(node.lineno, node.module or "", alias.name) for alias in node.names]
    return found


def own_path(imported: Import) -> str | None:
    """The path inside slipstream/ that an import lands on ("engine/graph"; "" is the root), None for other packages."""
    top, _, rest = imported.module.partition(".")
    if top != "slipstream":
        return None
    path = rest.replace(".", "/")
    if imported.name is not None:  # `from slipstream.kernels import registry` means the module, where there is one
        below = f"{path}/{imported.name}".lstrip("/")
        if (PACKAGE / below).is_dir() or (PACKAGE / f"{below}.py").is_file():
            return below
    return path
