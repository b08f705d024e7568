"""What a device of a mesh is predicted to hold, against the compiled step."""

import pytest

from memjax.collectives import compile_step
from memjax.data import Data
from memjax.experiment import Experiment
from memjax.footprint import footprint
from memjax.mixers import Attention, GatedDeltaNet, LinearAttention
from memjax.model import Model
from memjax.sharding import Mesh

VOCAB = 256
RING = Attention(heads=4, window=3000)  # far longer than the tokens of a device
FOUR = GatedDeltaNet(heads=4)
TENSOR, FSDP = Mesh(data=1, tensor=4), Mesh(data=1, fsdp=8)
THREE = Mesh(data=1, fsdp=2, tensor=2, context=2)
# Mesh, mixer, remat, rows and tokens.
QUICK = {
    "tensor": (TENSOR, LinearAttention(heads=4), "none", 4, 512),
    "ring": (Mesh(data=1, context=8), RING, "none", 1, 4096),
}
MORE = {
    "tensor-attention": (TENSOR, Attention(heads=4), "none", 4, 512),
    "tensor-full": (TENSOR, Attention(heads=4), "full", 4, 512),
    "ring-full": (Mesh(data=1, context=8), RING, "full", 1, 8192),
    "three axes": (THREE, FOUR, "none", 8, 512),
    "fsdp-full": (FSDP, FOUR, "full", 8, 512),
    "fsdp-dots": (FSDP, Attention(heads=4), "dots", 8, 512),
}
SLOW = [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in MORE.items()]


@pytest.mark.parametrize(
    ("mesh", "mixer", "remat", "rows", "tokens"),
    [*(pytest.param(*case, id=name) for name, case in QUICK.items()), *SLOW],
)
def test_the_total_of_a_device_is_within_15_percent(mesh, mixer, remat, rows, tokens):
    kind = mixer.kind
    model = Model(d_model=128, pattern=(kind,), repeat=4, mixers={kind: mixer}, remat=remat)
    experiment = Experiment(model=model, data=Data(batch=rows, sequence=tokens), mesh=mesh)
    held = compile_step(experiment, VOCAB)[0].memory_analysis()
    whole = held.argument_size_in_bytes + held.temp_size_in_bytes
    assert footprint(experiment, VOCAB)["total"] == pytest.approx(whole, rel=0.15)
