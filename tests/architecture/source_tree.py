"""The checkout as data: source files by package and every import edge, read from the syntax tree.

Imports under `TYPE_CHECKING` and inside functions count too: a floor that is only crossed at run time is still crossed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kvstore", "workers", "router", "cluster")
GENERATED = ("kvstore/transfer/stubs", "workers/service/stubs")


@dataclass(frozen=True, slots=True)
class Edge:
    """One import statement: `path:line` imports the dotted name `target`."""

    path: str
    line: int
    target: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}"


def python_files(*folders: str) -> list[Path]:
    """Hand-written source files under the given top-level folders, relative to the checkout, sorted."""
    found = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if not path.as_posix().startswith(GENERATED))


def edges_of(path: Path) -> Iterator[Edge]:
    """Every import of one file, relative ones resolved. `from a import b` counts as `a.b`."""
    tree = ast.parse((ROOT / path).read_text(), filename=str(path))
    package = path.parent.as_posix().replace("/", ".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Edge(path.as_posix(), node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield Edge(path.as_posix(), node.lineno, f"{base}.{alias.name}")


def all_edges(*folders: str) -> list[Edge]:
    return [edge for path in python_files(*folders) for edge in edges_of(path)]
