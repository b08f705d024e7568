"""Memory and traffic of a device, from programs compiled for virtual devices; nothing is run.

python experiments/scaling/scaling.py memory > experiments/scaling/memory.json
python experiments/scaling/scaling.py bytes > experiments/scaling/bytes.json
python experiments/scaling/scaling.py bytes tpu > experiments/scaling/bytes_tpu.json  (with libtpu)
"""

import contextlib
import json
import math
import os
import sys

TPU = sys.argv[2:] == ["tpu"]
# The program is the same without the passes of the code generator, which take most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ |= {"JAX_PLATFORMS": "cpu"} if TPU else {"XLA_FLAGS": QUICK}

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from memjax.collectives import collectives, compile_step, summary  # noqa: E402
from memjax.data import Data  # noqa: E402
from memjax.describe import parameter_count  # noqa: E402
from memjax.experiment import Experiment  # noqa: E402
from memjax.mixers import Attention, GatedDeltaNet, LinearAttention, Mamba, TTTLinear  # noqa: E402
from memjax.model import Model  # noqa: E402
from memjax.sharding import Mesh, virtual_devices  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402

VOCAB = 256
MIXERS = {
    "attention": Attention(heads=4, window=1024),
    "gated_deltanet": GatedDeltaNet(),
    "mamba": Mamba(),
    "ttt_linear": TTTLinear(),
}


def experiment(model: Model, mesh: Mesh, rows: int, tokens: int) -> Experiment:
    return Experiment(model=model, data=Data(batch=rows, sequence=tokens), mesh=mesh)


def memory(shard: int = 8192) -> list[dict]:
    """Bytes of a device as tokens and devices grow together."""
    rows = []
    for kind, mixer in MIXERS.items():
        model = Model(d_model=128, pattern=(kind,), repeat=2, mixers={kind: mixer}, remat="full")
        for count in (1, 2, 4, 8):
            mesh = Mesh(data=1, context=count)
            compiled, _ = compile_step(experiment(model, mesh, 1, shard * count), VOCAB)
            held = compiled.memory_analysis()
            row = {"mixer": kind, "tokens": shard * count, "context": count}
            row["temporary_bytes"] = held.temp_size_in_bytes
            row["argument_bytes"] = held.argument_size_in_bytes
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


LAYERS, WIDTH, ROWS, TOKENS, HEADS = 4, 256, 8, 1024, 4
MESHES = {
    "data": Mesh(data=8),
    "fsdp": Mesh(data=1, fsdp=8),
    "data fsdp": Mesh(data=2, fsdp=4),
    "tensor": Mesh(data=1, tensor=4),
    "context": Mesh(data=1, context=8),
}


def least(axis: str, parameters: int, count: int) -> dict[str, float]:
    """What a device must send a step, by the usual way to split a step over one axis, or two."""
    share = (count - 1) / count
    gradients = {"gradients": 2 * 4 * parameters * share}
    if axis == "data":
        return gradients
    if axis == "data fsdp":  # of two and four: gradients are split over fsdp, and summed over data
        return least("fsdp", parameters, 4) | {"parts": 2 * 4 * parameters / 4 / 2}
    if axis == "fsdp":
        return {"parameters": 2 * 4 * parameters * share, "gradients": 4 * parameters * share}
    if axis == "tensor":  # of two products a layer, of the embedding and of the logits
        activations = 4 * ROWS * TOKENS * WIDTH
        return {"activations": (4 * LAYERS + 2) * 2 * activations * share}
    state = HEADS * (WIDTH // HEADS) * (WIDTH // HEADS + 1)
    summaries = 2 * LAYERS * 4 * ROWS * state * (count - 1)
    return gradients | {"summaries": summaries}


def traffic() -> list[dict]:
    """Bytes that a device sends in a step of linear attention, against the least."""
    model = Model(
        d_model=WIDTH,
        pattern=("linear_attention",),
        repeat=LAYERS,
        mixers={"linear_attention": LinearAttention(heads=HEADS)},
    )
    parameters, rows, devices = parameter_count(model, VOCAB), [], None
    if TPU:
        devices = list(
            topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices
        )
    for axis, config in MESHES.items():
        with dispatch.target("tpu") if TPU else contextlib.nullcontext():
            compiled, mesh = compile_step(experiment(model, config, ROWS, TOKENS), VOCAB, devices)
        sent = summary(collectives(compiled.as_text(), mesh))
        must = least(axis, parameters, mesh.size)
        row = {"axis": axis, "devices": mesh.size, "parameters": parameters, "least": must}
        row["sent"] = {}
        for one in sent:
            row["sent"][one["kind"]] = row["sent"].get(one["kind"], 0) + round(one["bytes"])
        row["ratio"] = sum(row["sent"].values()) / math.fsum(must.values())
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    virtual_devices(Mesh(data=8))
    jax.config.update("jax_compilation_cache_dir", None)
    print(json.dumps(memory() if sys.argv[1] == "memory" else traffic(), indent=1))
