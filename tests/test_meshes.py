"""Training on a mesh; the claims are in tests/on_devices/meshes.py."""

import pytest
from devices import run_on_virtual_devices

from memjax.mixers import MIXERS


def test_training_on_a_mesh_is_training_on_one_device():
    run_on_virtual_devices("meshes", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*MIXERS, "memory_tokens"])
def test_every_kind_trains_on_every_mesh(kind):
    name = f"[{kind}]" if kind in MIXERS else kind
    run_on_virtual_devices("meshes", "-m", "slow", "-k", name)
