"""Training on a mesh; the claims are in tests/on_devices/meshes.py. What a mesh costs, as told."""

import json
import os
import subprocess
import sys

import pytest
from devices import run_on_virtual_devices

from memjax.memory import MEMORIES
from memjax.mixers import MIXERS


def test_training_on_a_mesh_is_training_on_one_device():
    run_on_virtual_devices("meshes", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXERS)
def test_every_kind_trains_on_every_mesh(kind):
    run_on_virtual_devices("meshes", "-m", "slow", "-k", f"every_kind and [{kind}]")


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*MEMORIES} - {*MIXERS} | {"landmark"}))
def test_every_memory_trains_on_every_mesh(kind):
    """Those that take the place of mixers are kinds of mixers; landmarks are both."""
    run_on_virtual_devices("meshes", "-m", "slow", "-k", f"every_memory and [{kind}]")


@pytest.mark.slow
def test_a_model_of_many_mixers_trains_on_every_mesh():
    run_on_virtual_devices("meshes", "-m", "slow", "-k", "every_shape")


TINY = ["--config.model.d_model=8", "--config.model.pattern=lstm", "--config.model.repeat=1"]
TINY += ["--config.data.sequence=8", "--config.data.batch=4", "--config.mesh.data=1"]


def test_a_mesh_is_described_as_compiled():
    """Two replicas of P parameters: each sends 2 * 4 P * 1/2 bytes of gradients, and scalars.

    Of a tied table the gradients as input and as output are sent apart (experiments/scaling).
    """
    untied = "--config.model.tied=false"
    command = [sys.executable, "-m", "memjax", "describe", *TINY, untied, "--mesh=data=2", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    compiled, predicted = told["mesh"], told["memory_bytes"]
    assert compiled["devices"] == {"data": 2, "fsdp": 1, "tensor": 1, "context": 1}
    assert {(row["axes"], row["kind"]) for row in compiled["collectives"]} == {
        ("data", "all-reduce")
    }
    sent = sum(row["bytes"] for row in compiled["collectives"])
    assert 0 <= sent - 4 * told["params"] < 100
    assert predicted["devices"] == 2
    state = predicted["parameters"] + predicted["optimizer"]
    batch = 13 * 8 * 4 // 2
    assert 0 <= compiled["argument_bytes"] - state - batch < 100


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("rows=2", ["config.mesh.rows", "no such field", "fsdp"]),
        ("fsdp=auto", ["fsdp=auto", "must be a number"]),
        ("data=3", ["config.data.batch=4", "multiple"]),
        ("context=3", ["config.mesh.context=3", "must divide data.sequence=8"]),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(mesh, words):
    command = [sys.executable, "-m", "memjax", "describe", *TINY, f"--mesh={mesh}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr
