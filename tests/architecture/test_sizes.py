"""Files and functions stay short enough to read in one go."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.architecture.source_tree import PACKAGES, ROOT, python_files

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_LONG_FUNCTION_LINES = 150
LONG_FUNCTION_HOMES = ("workers/kernels/", "cluster/cli")
"""Kernel bodies cannot be split without cost, and a command's options are its parameter list."""
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def function_lengths(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse((ROOT / path).read_text())
    return [
        (f"{path}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_files_are_at_most_500_lines() -> None:
    long = {
        str(path): count
        for path in python_files(*PACKAGES, "deploy", "tests")
        if (count := len((ROOT / path).read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_functions_are_at_most_60_lines() -> None:
    long = {}
    for path in python_files(*PACKAGES, "deploy"):
        limit = MAX_LONG_FUNCTION_LINES if path.as_posix().startswith(LONG_FUNCTION_HOMES) else MAX_FUNCTION_LINES
        long |= {name: count for name, count in function_lengths(path) if count > limit}
    assert not long


def test_no_module_is_a_drawer() -> None:
    drawers = [str(path) for path in python_files(*PACKAGES, "deploy", "tests") if path.stem in BANNED_NAMES]
    assert not drawers


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path)
        for path in python_files(*PACKAGES, "deploy")
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse((ROOT / path).read_text()))
    ]
    assert not silent
