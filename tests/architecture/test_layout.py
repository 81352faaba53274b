"""The top level holds what the README promises, and the wire contract holds no Python."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.architecture.source_tree import PACKAGES, ROOT

TOP_LEVEL = {
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "Makefile",
    "LICENSE",
    ".gitignore",
    ".ci",
    "proto",
    "kvstore",
    "workers",
    "router",
    "cluster",
    "deploy",
    "tests",
}


def tracked_files() -> list[str]:
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return listing.splitlines()


def test_top_level_holds_only_the_documented_entries() -> None:
    assert {path.partition("/")[0] for path in tracked_files()} <= TOP_LEVEL


def test_proto_holds_only_proto_files() -> None:
    """An `__init__.py` here would hide google's `proto` package, which Ray's dependencies import."""
    assert {path.suffix for path in (ROOT / "proto").iterdir() if path.is_file()} <= {".proto"}


def test_deploy_is_not_a_package() -> None:
    assert not (ROOT / "deploy" / "__init__.py").exists()


def test_every_package_is_installed() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]["find"]["include"]) == {f"{name}*" for name in PACKAGES}


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=!~ ]", item, maxsplit=1)[0].lower() for item in wanted}
    pinned = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert names <= pinned


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    for command in ("make check", "make test"):
        assert command in script
        assert command in readme


def test_readme_names_only_existing_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named <= targets
