"""Training steps of 1.3B parameters, compiled for devices that are not here; nothing is run.

python experiments/scaling/compile.py tpu > experiments/scaling/tpu.json   (with libtpu)
python experiments/scaling/compile.py gpu > experiments/scaling/gpu.json   (with JAX's CUDA plugin)
"""

import dataclasses
import json
import os
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing here uses a device
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}

from jax.experimental import topologies  # noqa: E402  the setting above is read by JAX

from memjax.collectives import collectives, compile_step, summary  # noqa: E402
from memjax.config import build, load_file  # noqa: E402
from memjax.describe import parameter_count, training_flops  # noqa: E402
from memjax.experiment import Experiment  # noqa: E402
from memjax.sharding import Mesh  # noqa: E402
from pallas_kernels import aot, dispatch  # noqa: E402

VOCAB = 32_000
H200 = aot.HOPPER.replace("H100 80GB HBM3", "H200").replace("84978434048", "150754820096")
V5E, GPUS = Mesh(data=16, fsdp=16), Mesh(data=1, fsdp=8)
CASES: dict[str, dict[str, tuple[Mesh, dict[str, Any]]]] = {
    "tpu": {
        "attention_1_3b": (V5E, {}),
        "gated_deltanet_1_3b": (Mesh(data=8, fsdp=16, context=2), {}),
    },
    "gpu": {
        "attention_1_3b": (GPUS, {"accumulate": 16}),
        "gated_deltanet_1_3b": (GPUS, {"accumulate": 4}),
    },
}


def devices(target: str) -> list:
    if target == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16")
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x8", target_config=H200
        )
    return list(topology.devices)


def case(target: str, config: str) -> dict[str, Any]:
    """Memory and traffic of a device in a step of a config."""
    mesh, train = CASES[target][config]
    experiment = build(Experiment, load_file(f"configs/{config}.py"))
    train = dataclasses.replace(experiment.train, **train)
    experiment = dataclasses.replace(experiment, mesh=mesh, train=train)
    start = time.perf_counter()
    with dispatch.target(target):
        compiled, made = compile_step(experiment, VOCAB, devices(target))
    seconds, held = time.perf_counter() - start, compiled.memory_analysis()
    tokens = experiment.data.batch * experiment.data.sequence
    row = {
        "config": config,
        "device": made.devices.flat[0].device_kind,
        "mesh": {name: size for name, size in made.shape.items() if size > 1},
        "tokens": tokens,
        "accumulate": experiment.train.accumulate,
        "parameters": parameter_count(experiment.model, VOCAB),
        "flops": training_flops(experiment.model, VOCAB, experiment.data.sequence)
        * tokens
        / made.size,
        "state_bytes": held.argument_size_in_bytes,
        "temporary_bytes": held.temp_size_in_bytes,
        "collectives": summary(collectives(compiled.as_text(), made)),
        "compile_seconds": round(seconds),
    }
    print(row, file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    chosen = sys.argv[1]
    only = sys.argv[2:] or CASES[chosen]
    print(json.dumps([case(chosen, config) for config in only], indent=1))
