"""Compile every kernel for hardware that is not here: `python -m pallas_kernels.aot --target=tpu`.

--target=tpu[:TOPOLOGY] needs the package `libtpu` (TOPOLOGY: v5e:2x2 if not given, v6e:2x2, ...).
--target=cuda needs jax's CUDA plugin and `ptxas`; code is made for Hopper, and a kernel that keeps
more than SPILL_LIMIT bytes of registers in memory (more than SPILLS, where named), or whose
products the assembler serialises (but for SERIALISED), fails. Without the libraries of CUDA, set
JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1. Lowering alone (the tests) misses what only the compilers know:
layouts, memory that does not fit, spills. Exit status 1 if a kernel fails.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Two tests may load libtpu at once; nothing here uses a device.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DUMP = Path(os.environ.setdefault("MOSAIC_GPU_DUMP_TO", tempfile.mkdtemp(prefix="kernels-")))
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")

import jax  # noqa: E402  the settings above are read when it is imported
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from pallas_kernels import (  # noqa: E402
    attention,
    delta_rule,
    dispatch,
    linear_attention,
    selective_scan,
)
from pallas_kernels.aot_cases import gpu_cases, tpu_cases  # noqa: E402

HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132
  fpus_per_core: 128  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: 84978434048  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

SPILL_LIMIT = 8  # bytes a thread: an address or two, not an accumulator
# The most that JAX 0.10 and 0.11 with the assemblers of CUDA 13.0 and 13.5 keep, as kernels were
# when they were timed. In attention: addresses and counts, read again once a block.
SPILLS = {
    "attention documents K=128": 32,
    "attention cap and sinks K=128": 40,
    "attention slopes in a window K=128": 28,
    "linear_attention channel K=64 bfloat16": 20,
    "linear_attention channel K=128 bfloat16": 28,
    "linear_attention channel K=128, 64 heads": 28,
    "delta_rule none K=128 bfloat16": 64,
    "delta_rule head K=128 bfloat16": 64,
    "delta_rule head K=128, 64 heads": 64,
    "delta_rule head K=256": 152,
}
SERIALISED = ("delta_rule head K=256",)  # in the gradient of the solve, for want of registers
Case = tuple[str, Callable[[dict], Any], dict[str, Any]]
BATCH, TOKENS, HEADS = 1, 1024, 4


def cases(platform: str) -> Iterator[Case]:
    """Name, a call of keyword arguments, and their shapes."""
    impl = {"tpu": "tpu", "gpu": "gpu"}[platform]
    bf16, f32 = jnp.bfloat16, jnp.float32
    kinds = {"tpu": ((64, f32), (128, bf16)), "gpu": ((64, bf16), (128, bf16))}[platform]
    for size, kind in kinds:
        for op in (linear_attention, delta_rule):
            for decay in ("none", "head", "channel"):
                if (op, decay, platform) == (delta_rule, "channel", "gpu"):
                    continue
                args = _memory(op is delta_rule, decay, size, kind)
                name = f"{op.__name__} {decay} K={size} {kind.__name__}"
                yield name, _calling(op, impl=impl, chunk=64), args
    if platform == "tpu":
        yield "selective_scan E=256 N=16", _calling(selective_scan, impl=impl, chunk=32), _scan()
        for size, kind in kinds:
            for name, rule in (("causal", {}), ("window", {"window": 300})):
                args = {n: _shape((BATCH, TOKENS, h, size), kind) for n, h in zip("qkv", (4, 2, 2))}
                yield f"attention {name} K={size}", _calling(attention, impl=impl, **rule), args
        for name, op, args in tpu_cases():
            yield name, _calling(op, impl=impl), args
    else:
        for name, op, args in gpu_cases():
            yield name, _calling(op, impl=impl), args
        args = _memory(True, "head", 256, bf16)
        yield "delta_rule head K=256", _calling(delta_rule, impl=impl), args
        for op, decay in ((linear_attention, "channel"), (delta_rule, "head")):
            args = _memory(op is delta_rule, decay, 128, bf16, heads=64)
            yield f"{op.__name__} {decay} K=128, 64 heads", _calling(op, impl=impl), args


def _shape(sizes: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, kind)


def _memory(
    delta: bool, decay: str, size: int, kind: Any, heads: int = HEADS
) -> dict[str, jax.ShapeDtypeStruct]:
    args = {name: _shape((BATCH, TOKENS, heads, size), kind) for name in "qkv"}
    args["initial_state"] = _shape((BATCH, heads, size, size), jnp.float32)
    args["reset"] = _shape((BATCH, TOKENS), jnp.bool_)
    if decay != "none":
        channels = (size,) if decay == "channel" else ()
        args["log_decay"] = _shape((BATCH, TOKENS, heads, *channels), jnp.float32)
    if delta:
        args["beta"] = _shape((BATCH, TOKENS, heads), jnp.float32)
    return args


def _scan() -> dict[str, jax.ShapeDtypeStruct]:
    channels, states = 256, 16
    tokens = {"x": channels, "dt": channels, "B": states, "C": states}
    args = {name: _shape((BATCH, TOKENS, size), jnp.float32) for name, size in tokens.items()}
    args["A"] = _shape((channels, states), jnp.float32)
    args["initial_state"] = _shape((BATCH, channels, states), jnp.float32)
    args["reset"] = _shape((BATCH, TOKENS), jnp.bool_)
    return args


def _calling(op: Callable[..., Any], **settings: Any) -> Callable[[dict], Any]:
    """Outputs and every gradient."""

    def step(args: dict) -> Any:
        floating = {n: x for n, x in args.items() if _is_floating(x)}
        out, pull = jax.vjp(lambda floating: op(**(args | floating), **settings), floating)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return step


def _is_floating(tree: Any) -> bool:
    return all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(tree))


def compile_all(target: str) -> int:
    """Compile each case and print a line for it; the number that failed."""
    kind, _, topology = target.partition(":")
    if kind == "tpu":
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology or "v5e:2x2"
        )
    else:
        description = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=HOPPER
        )
    where = SingleDeviceSharding(description.devices[0])
    platform = "tpu" if kind == "tpu" else "gpu"
    failed = 0
    for name, call, args in cases(platform):
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args
        )
        seen = set(_DUMP.iterdir())
        start = time.perf_counter()
        try:
            with dispatch.target(platform):
                jax.jit(call).trace(placed).lower().compile()
            problem = _complaints(name, set(_DUMP.iterdir()) - seen)
        except Exception as error:  # a compiler's error of any type is this case's result
            problem = str(error).strip().splitlines()[0][:300] or type(error).__name__
        seconds = time.perf_counter() - start
        print(f"{'FAIL' if problem else 'ok':4} {seconds:5.1f} s  {name}  {problem}", flush=True)
        failed += bool(problem)
    return failed


def _complaints(name: str, dumps: set[Path]) -> str:
    """What the assembler reports: products that it let wait for each other, and registers kept in
    memory."""
    limit = SPILLS.get(name, SPILL_LIMIT)
    texts = [path.read_text(errors="replace") for path in sorted(dumps) if path.is_file()]
    if name not in SERIALISED and any(
        "wgmma.mma_async instructions are serialized" in x for x in texts
    ):
        return "products wait for each other (serialized)"
    spilled = [int(n) for text in texts for n in re.findall(r"(\d+) bytes spill stores", text)]
    most = max(spilled, default=0)
    return f"{most} bytes spilled; at most {limit} allowed" if most > limit else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description=__doc__)
    parser.add_argument("--target", required=True, help="tpu, tpu:v6e:2x2, ..., or cuda")
    chosen = parser.parse_args(arguments)
    if chosen.target.partition(":")[0] not in ("tpu", "cuda"):
        print(f"--target={chosen.target} must be tpu, tpu:TOPOLOGY or cuda", file=sys.stderr)
        return 2
    return min(compile_all(chosen.target), 1)


if __name__ == "__main__":
    sys.exit(main())
