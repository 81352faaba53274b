"""The five floors import only downwards, and each heavy dependency has one home."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.source_tree import PACKAGES, ROOT, Edge, all_edges, edges_of, python_files

FLOOR = {"kvstore": 1, "workers": 2, "router": 3, "cluster": 4, "deploy": 5, "tests": 5}

HOMES = {
    "ray": ("cluster",),
    "yaml": ("cluster.config",),
    "typer": ("cluster",),
    "rich": ("cluster",),
    "aiohttp": ("router",),
    "deepseek_recipe": ("router",),
    "grpc": ("kvstore.transfer", "workers.service"),
    "safetensors": ("workers.checkpoint",),
    # The store moves rows with a kernel of its own and may not import the workers' floor above it.
    "triton": ("workers.kernels", "kvstore.pools.kernels"),
    "numba": ("workers.cpu",),
    "transformers": ("cluster.bench.peer",),
    "matplotlib": ("cluster.bench.plot", "cluster.experts.plot"),
    "grpc_tools": (),
}
"""Which modules of the packages may import each heavy dependency; an empty home means tests and deploy only."""

FORBIDDEN = {
    "kvstore.spec": ("torch", "grpc"),
    "kvstore.allocator": ("torch", "grpc"),
    "kvstore.sequence_kv": ("torch", "grpc"),
    "workers.messages": ("torch", "grpc"),
    "workers.errors": ("torch", "grpc"),
    "workers.model.config": ("torch", "grpc"),
    "workers.reference": ("workers.model.transformer", "workers.kernels", "workers.cpu", "kvstore", "triton", "numba"),
    "workers.kernels": ("workers.reference", "workers.model.transformer", "kvstore"),
    "workers.checkpoint": ("workers.scheduler", "workers.service", "kvstore"),
    "workers.scheduler": ("torch", "grpc", "workers.ops", "workers.service"),
    "workers.model": ("workers.scheduler", "workers.service", "grpc"),
    "router": ("torch", "ray", "grpc", "numpy", "kvstore"),
}
"""Names that a module, and everything below it, never imports."""

ROUTER_MAY_IMPORT = ("workers.messages", "workers.errors")


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_imports_go_downwards_only() -> None:
    upward = [
        str(edge) for edge in all_edges(*PACKAGES) if FLOOR.get(edge.top, 0) > FLOOR[edge.module.partition(".")[0]]
    ]
    assert not upward, "imports to a higher floor:\n" + "\n".join(upward)


def test_heavy_dependencies_stay_in_their_homes() -> None:
    strays = [
        str(edge)
        for edge in all_edges(*PACKAGES)
        if edge.top in HOMES and not any(is_within(edge.module, home) for home in HOMES[edge.top])
    ]
    assert not strays, "heavy dependency outside its home:\n" + "\n".join(strays)


def test_modules_do_not_import_what_their_contract_forbids() -> None:
    broken = [
        str(edge)
        for edge in all_edges(*PACKAGES)
        for module, names in FORBIDDEN.items()
        if is_within(edge.module, module) and any(is_within(edge.target, name) for name in names)
    ]
    assert not broken, "forbidden import:\n" + "\n".join(broken)


def test_router_knows_workers_only_by_messages_and_errors() -> None:
    broken = [
        str(edge)
        for edge in all_edges("router")
        if edge.top == "workers" and not any(is_within(edge.target, name) for name in ROUTER_MAY_IMPORT)
    ]
    assert not broken, "router reaches into workers:\n" + "\n".join(broken)


def test_the_command_line_starts_without_heavy_packages() -> None:
    """`dsv4 --help` and `dsv4 status` must not pay for Ray or torch."""
    script = "import sys, cluster.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"ray", "torch", "numpy", "aiohttp", "grpc"} & set(loaded.stdout.split())


@pytest.mark.parametrize("folder", ["kvstore", "workers", "router", "cluster", "tests"])
def test_every_source_folder_is_a_regular_package(folder: str) -> None:
    """A namespace folder loses to an equal name in site-packages."""
    missing = sorted(
        {path.parent.as_posix() for path in python_files(folder) if not (ROOT / path.parent / "__init__.py").exists()}
    )
    assert not missing, f"folders without __init__.py: {missing}"


def test_edges_include_function_level_and_type_checking_imports(tmp_path: object) -> None:
    source = "tests/architecture/test_imports.py"
    targets = {edge.target for edge in all_edges("tests") if edge.path == source}
    assert "tests.architecture.source_tree.Edge" in targets
    assert isinstance(next(iter(edges_of(python_files("tests")[0])), Edge("", 0, "")), Edge)
