"""Check and time every operation and implementation: `python -m pallas_kernels.bench`.

Each implementation that runs on this machine and suits the shape is compared with the token loop in
float64 (on at most --check-tokens tokens, gradients included), then timed, forward and forward with
backward: warm-up, then the median of --repeats times on --inputs different inputs in turn, each of
one call, or on an accelerator of ten that are queued one behind the other, so that it waits for the
host once; gaps between kernels count. A share of the roof is the least time that the FLOPs of the
token loop, or one pass over inputs and outputs, could take at the machine's peaks, whichever is
longer, over the time taken.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.bench_inputs import (
    DOCUMENTS,
    Shape,
    abstract,
    documents,
    draw,
)

# Behind a point: decays a channel (else a head), documents packed in a row (else one a row).
NAMES = (
    "linear_attention",
    "linear_attention.channel",
    "delta_rule",
    "mlstm",
    "attention",
    "attention.documents",
)
OPS = {name: getattr(pallas_kernels, name.partition(".")[0]) for name in NAMES}

# bfloat16 FLOP/s and bytes/s, as their makers publish them. Of others matmul and copy are measured.
PEAKS = {
    "NVIDIA H100": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v6 lite": (918e12, 1.64e12),
}


class Row(NamedTuple):
    """One line of the table; times in milliseconds, errors as part of the largest value."""

    shape: Shape
    impl: str
    error: float
    gradient_error: float
    forward_ms: float
    both_ms: float
    forward_share: float
    roof_share: float  # forward and backward
    roof: str  # what binds both: flops or bytes


def calls(shape: Shape, impl: str) -> tuple[Any, Any]:
    """Forward of arguments, and forward with every gradient, of arguments and cotangents."""
    settings: dict[str, Any] = {"impl": impl}
    if shape.base != "attention":
        settings["chunk"] = 64 if jax.default_backend() != "cpu" else 32

    def forward(args):
        ids = {}
        if shape.op.endswith(".documents"):
            ids["segment_ids"] = documents(*args["q"].shape[:2])
        return OPS[shape.op](**args, **ids, **settings)

    def both(args, d_out):
        out, pull = jax.vjp(forward, args)
        return out, pull(d_out)[0]

    return jax.jit(forward), jax.jit(both)


def errors(shape: Shape, impl: str, tokens: int) -> tuple[float, float]:
    """Largest error of outputs, and of gradients, against the token loop in float64."""
    shape = shape._replace(tokens=min(tokens, shape.tokens))
    given = draw(shape, jnp.int32(0))
    got = calls(shape, impl)[1](*given)
    cpu = jax.local_devices(backend="cpu")[0]
    with dispatch.target("cpu"), jax.enable_x64(True), jax.default_device(cpu):
        exact = jax.tree.map(lambda x: jnp.asarray(_wide(x)), given)
        want = jax.device_get(calls(shape, "reference")[1](*exact))

    def largest(a: Any, b: Any) -> float:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(np.abs(_wide(x) - y).max() / np.abs(y).max()) for x, y in pairs)

    return largest(got[0], want[0]), largest(got[1], want[1])


def _wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def seconds(call: Callable, inputs: list[tuple], repeats: int) -> float:
    """Median time of a call."""
    queued = 1 if jax.default_backend() == "cpu" else 10
    for args in inputs:
        jax.block_until_ready(call(*args))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(queued):
            out = call(*inputs[i % len(inputs)])
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - start) / queued)
    return statistics.median(taken)


def work(shape: Shape) -> tuple[tuple[float, float], tuple[float, float]]:
    """FLOPs and bytes that are needed, forward, and forward with backward.

    FLOPs: two (the delta rule: three) products of a vector and the state a token, or half the
    pairs of attention; backward twice as many (2.5 times: attention makes its weights again).
    Bytes: forward reads q, k, v and writes o; backward reads q, k, v, dO (attention: and o) and
    writes dq, dk, dv. Decays a channel are float32, read twice, and their gradient written. Other
    numbers of tokens (decays a head, their gradients) are under 2% and not counted.
    """
    tokens = shape.batch * shape.tokens * shape.heads
    tensor = tokens * shape.size * jnp.dtype(shape.dtype).itemsize
    if shape.base == "attention":
        length = shape.tokens / (DOCUMENTS if shape.op.endswith(".documents") else 1)
        flops, more, tensors = tokens * 2.0 * shape.size * length, 3.5, 12.0
    else:
        products = {"linear_attention": 2, "delta_rule": 3, "mlstm": 2}[shape.base]
        flops, more, tensors = tokens * products * 2.0 * shape.size**2, 3.0, 11.0
    decays = 4.0 * tokens * shape.size if shape.op.endswith(".channel") else 0.0
    return (flops, 4.0 * tensor + decays), (more * flops, tensors * tensor + 3.0 * decays)


def peaks() -> tuple[float, float]:
    """FLOP/s and bytes/s of the machine."""
    kind = jax.devices()[0].device_kind
    for name, known in PEAKS.items():
        if kind.startswith(name):
            return known
    x = jnp.ones((1024, 1024), jnp.float32)
    multiply, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: -x)
    flops = 2 * 1024**3 / seconds(multiply, [(x,)], 10)
    wide = jnp.ones((32 * 2**20,), jnp.float32)
    return flops, 8 * wide.size / seconds(copy, [(wide,)], 5)


def compiled(shape: Shape, impl: str) -> list[Callable]:
    """Inputs of a seed; forward; and forward with every gradient."""
    args, d_out = abstract(shape)
    forward, both = calls(shape, impl)
    traced = draw.trace(shape, jnp.int32(0)), forward.trace(args), both.trace(args, d_out)
    return [program.lower().compile() for program in traced]


def measure(
    shape: Shape,
    impl: str,
    programs: list[Callable],
    wrong: tuple[float, float],
    roofs: tuple[float, float],
    settings: Any,
) -> Row:
    make, run_forward, run_both = programs
    inputs = [make(jnp.int32(seed)) for seed in range(settings.inputs)]
    forward = seconds(run_forward, [(args,) for args, _ in inputs], settings.repeats)
    both = seconds(run_both, inputs, settings.repeats)
    least = [[amount / peak for amount, peak in zip(pass_, roofs)] for pass_ in work(shape)]
    return Row(
        shape,
        impl,
        *wrong,
        1e3 * forward,
        1e3 * both,
        max(least[0]) / forward,
        max(least[1]) / both,
        "flops" if least[1][0] >= least[1][1] else "bytes",
    )


def show(row: Row) -> str:
    shape = row.shape
    return (
        f"{shape.op:24} {row.impl:9} T={shape.tokens:<6} H={shape.heads:<3} K={shape.size:<4}"
        f"{shape.dtype:9} error {row.error:.0e} gradients {row.gradient_error:.0e}  "
        f"forward {row.forward_ms:9.3f} ms ({100 * row.forward_share:.0f}%)  "
        f"both {row.both_ms:9.3f} ms ({100 * row.roof_share:.0f}% of {row.roof})"
    )


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str] | None) -> Any:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--ops", type=_names, default=list(OPS))
    parser.add_argument("--impls", type=_names, default=["xla", "tpu", "gpu", "splash", "cudnn"])
    parser.add_argument("--total", type=int, default=2048 if on_cpu else 32768, help="B x T")
    parser.add_argument("--tokens", type=_numbers, default=[512] if on_cpu else [2048, 8192, 32768])
    parser.add_argument("--heads", type=_numbers, default=[4] if on_cpu else [16])
    parser.add_argument("--sizes", type=_numbers, default=[64] if on_cpu else [128], help="K = V")
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--repeats", type=int, default=5 if on_cpu else 10)
    parser.add_argument("--inputs", type=int, default=2)
    parser.add_argument("--check-tokens", type=int, default=256 if on_cpu else 512)
    parser.add_argument("--jobs", type=int, default=8, help="programs compiled side by side")
    parser.add_argument("--json", type=Path, help="file for the results")
    chosen = parser.parse_args(arguments)
    for name in chosen.ops:
        if name not in OPS:
            parser.error(f"--ops={name} is not one of: {', '.join(OPS)}")
    for name in chosen.impls:
        if name not in dispatch.NAMES:
            parser.error(f"--impls={name} is not one of: {', '.join(dispatch.NAMES)}")
    return chosen


def suits(shape: Shape, impl: str) -> str | None:
    """Why an implementation does not run this shape here; None if it does."""
    try:
        jax.eval_shape(calls(shape, impl)[0], abstract(shape)[0])
    except ValueError as error:
        return str(error)
    return None


def cases(settings: Any) -> Iterator[tuple[Shape, str]]:
    """What runs here; what does not is said."""
    for op, tokens, heads, size in itertools.product(
        settings.ops, settings.tokens, settings.heads, settings.sizes
    ):
        batch = max(settings.total // tokens, 1)
        shape = Shape(op, batch, tokens, heads, size, settings.dtype)
        for impl in settings.impls:
            if impl not in dispatch.AVAILABLE[shape.base]:
                continue
            reason = suits(shape, impl)
            if reason is None:
                yield shape, impl
            else:
                print(f"{op:24} {impl:9} T={tokens:<6} not run: {reason}")


def main(arguments: list[str] | None = None) -> int:
    settings = parse(arguments)
    roofs, rows = peaks(), []
    device = jax.devices()[0].device_kind
    print(f"{device}: {roofs[0] / 1e12:.3g} TFLOP/s, {roofs[1] / 1e9:.3g} GB/s")
    found = list(cases(settings))

    def small(shape: Shape) -> Shape:
        return shape._replace(batch=1, tokens=min(settings.check_tokens, shape.tokens))

    with ThreadPoolExecutor(settings.jobs) as pool:
        distinct = dict.fromkeys((small(shape), impl) for shape, impl in found)
        checks = {case: pool.submit(errors, *case, case[0].tokens) for case in distinct}
        programs = [pool.submit(compiled, *case) for case in found]
    # All of it has ended: nothing compiles while a program is timed.
    for (shape, impl), program in zip(found, programs, strict=True):
        wrong = checks[small(shape), impl].result()
        rows.append(measure(shape, impl, program.result(), wrong, roofs, settings))
        print(show(rows[-1]), flush=True)
    if settings.json is not None:
        results = [row._asdict() | {"shape": row.shape._asdict()} for row in rows]
        report = {"device": device, "flops_per_s": roofs[0], "bytes_per_s": roofs[1]}
        settings.json.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
