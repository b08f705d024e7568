"""Imports point down, and the kernels stand alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {
        "shapes",
        "config",
        "errors",
        "platform",
        "tables",
        "telemetry",
        "liveness",
        "programs",
        "spread",
        "operations",
        "uniform",
        "norms",
    },
    {"sharding", "gathering", "ops", "distributed"},
    {"layers", "positions"},
    {"mixers", "memory", "data"},
    {"architecture"},
    {"stack"},
    {"segments", "cross_entropy"},
    {"model"},
    {"training", "evals"},
    {"experiment", "describe", "bench", "collectives", "runs", "match", "footprint"},
    {"sweeps"},
    {"report", "completion"},
    {"commands"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
CONFIGS = {"memjax.experiment", "memjax.evals.config", "memjax.training.config"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part(module):
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else None


FILES = sorted((ROOT / "memjax").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_its_layer_or_below(path):
    names = path.relative_to(ROOT / "memjax").with_suffix("").parts
    if names == ("__init__",):
        return
    here = RANK[names[0]]
    for module in imports(path):
        if module.startswith("memjax.") and module not in CONFIGS:
            assert RANK[part(module)] <= here, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "pallas_kernels").rglob("*.py")), ids=str)
def test_kernels_depend_on_jax_numpy_and_jaxtyping_alone(path):
    allowed = {"jax", "numpy", "jaxtyping", "pallas_kernels"}
    standard = sys.stdlib_module_names
    assert {module.split(".")[0] for module in imports(path)} <= allowed | standard


def test_only_sharding_names_mesh_axes():
    for path in FILES:
        if path.name not in ("sharding.py", "experiment.py"):
            assert "PartitionSpec" not in path.read_text(), path
