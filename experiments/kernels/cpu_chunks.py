"""What the plain JAX form of each recurrence costs on a CPU, by the tokens of a chunk.

Command:   python experiments/kernels/cpu_chunks.py --json=experiments/kernels/cpu.json
Hardware:  2 CPU cores, nothing else running
Duration:  three minutes, half of it compilation
Result:    cpu.md beside this file

2 rows of 1,024 tokens, float32, the heads and sizes of a layer of configs/bench.py. Every form of
one recurrence is timed in turn, --repeats times; medians and quartiles of a pass forward, and of
one forward and backward with every gradient. The roof is a product of two matrices of 1,024 in the
same process; FLOPs are those of the token loop (in `work`), three times as many with the backward
pass. Memories that learn at test time have no free chunk: `update_every` is part of what they
compute.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from memjax.platform import restart_with_fast_allocator
from memjax.training.compiler import compiler_options
from pallas_kernels.neural_memory import MLP
from pallas_kernels.ttt import LinearMemory, MLPMemory, Norm

BATCH, TOKENS = 2, 1024
CHUNKS = (32, 64, 128)


class Case(NamedTuple):
    """run(args, impl, chunk); multiply_adds: of the token loop, a token of a row."""

    run: Callable[[dict, str, int | None], Any]
    args: dict[str, Any]
    multiply_adds: float
    chunks: tuple[int | None, ...] = CHUNKS


def cases() -> dict[str, Case]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((BATCH, TOKENS, *shape)), jnp.float32)

    def decay(*shape: int) -> jax.Array:
        return -jnp.exp(normal(*shape) - 3)

    def unit(*shape: int) -> jax.Array:
        x = normal(*shape)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def tokens(heads: int, key_size: int, value_size: int, groups: int | None = None) -> dict:
        groups = groups or heads
        keys = {"q": unit(groups, key_size), "k": unit(groups, key_size)}
        return keys | {"v": normal(heads, value_size)}

    def whole(op: Callable) -> Callable:
        def run(args, impl, chunk):
            return op(**args, impl=impl, **({} if chunk is None else {"chunk": chunk}))

        return run

    def matrices(*shapes: tuple[int, ...]) -> list[jax.Array]:
        return [
            jnp.asarray(rng.standard_normal(shape) * shape[-2] ** -0.5, jnp.float32)
            for shape in shapes
        ]

    linear, state = whole(pk.linear_attention), 4 * 64 * 64
    norm = Norm(jnp.ones((4, 64)), jnp.zeros((4, 64)))
    zeros = jnp.zeros((4, 64))
    rates = {"rate": jax.nn.sigmoid(normal(4)) / 64, "place_rate": 1 / jnp.arange(1.0, 17.0)}
    into, out = matrices((4, 64, 256), (4, 256, 64))
    mlp = MLPMemory(into, jnp.zeros((4, 256)), out, zeros)
    titans_sizes = 2 * 64 * 128 * 4
    titans = {
        **tokens(4, 64, 64),
        "rate": 0.1 * jax.nn.sigmoid(normal(4)),
        "log_keep": -jnp.exp(normal(4) - 5),
        "log_momentum": -jnp.exp(normal(4) - 2),
        "weights": tuple(matrices((4, 64, 128), (4, 128, 64))),
        "constants": {"scale": jnp.ones((4, 64)), "shift": zeros},
    }

    def remember(args, impl, chunk):
        structure = MLP(layers=2, expansion=2, residual_norm=True, norm_eps=1.0)
        return pk.neural_memory(**args, structure=structure, update_every=32, impl=impl)

    scan = {"x": normal(512), "dt": jax.nn.softplus(normal(512) - 4)}
    scan |= {"A": -jnp.tile(jnp.arange(1.0, 17.0), (512, 1)), "B": normal(16), "C": normal(16)}
    beta = {"beta": jax.nn.sigmoid(normal(4))}
    gates = {"log_input": normal(4), "log_forget": jax.nn.log_sigmoid(normal(4) + 4)}
    ttt = {**tokens(4, 64, 64), **rates, "norm": norm}
    return {
        "linear attention": Case(linear, tokens(4, 64, 64), 2 * state),
        "decay of a head": Case(linear, tokens(4, 64, 64) | {"log_decay": decay(4)}, 2 * state),
        "decay of a channel": Case(
            linear, tokens(4, 64, 64) | {"log_decay": decay(4, 64)}, 2 * state
        ),
        "heads share q, k (Mamba-2)": Case(
            linear, tokens(8, 128, 64, groups=1) | {"log_decay": decay(8)}, 2 * 8 * 128 * 64
        ),
        "delta rule": Case(
            whole(pk.delta_rule), tokens(4, 64, 64) | beta | {"log_decay": decay(4)}, 3 * state
        ),
        "mLSTM": Case(whole(pk.mlstm), tokens(4, 128, 128) | gates, 2 * 4 * 128 * 128),
        "Taylor attention": Case(
            whole(pk.taylor_attention), tokens(4, 16, 64), 2 * 4 * (1 + 16 + 136) * 65
        ),
        "selective scan": Case(whole(pk.selective_scan), scan, 3 * 512 * 16),
        "diagonal scan": Case(
            whole(pk.diagonal_scan), {"x": normal(352), "log_decay": decay(352)}, 352
        ),
        "TTT-Linear": Case(
            whole(pk.ttt_linear),
            ttt | {"memory": LinearMemory(*matrices((4, 64, 64)), zeros)},
            3 * state,
            (None,),
        ),
        "TTT-MLP": Case(whole(pk.ttt_mlp), ttt | {"memory": mlp}, 3 * 8 * state, (None,)),
        "Titans memory": Case(remember, titans, 5.5 * titans_sizes, (None,)),
    }


def programs(case: Case, impl: str, chunk: int | None) -> tuple[list[Callable], float]:
    """Forward, and forward with every gradient; seconds to compile both."""

    def forward(args):
        return case.run(args, impl, chunk)

    def both(args):
        out, pull = jax.vjp(forward, args)
        return out, pull(jax.tree.map(cotangent, out))[0]

    def cotangent(x):
        kind = np.issubdtype(x.dtype, np.floating)
        return jnp.ones_like(x) if kind else np.zeros(x.shape, jax.dtypes.float0)

    start = time.perf_counter()
    options = compiler_options()
    made = [
        jax.jit(f, compiler_options=options).lower(case.args).compile() for f in (forward, both)
    ]
    return made, time.perf_counter() - start


def roof(repeats: int = 15) -> float:
    x = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(jnp.dot)
    jax.block_until_ready(multiply(x, x))
    return 2.0 * 1024**3 / float(np.median([seconds(multiply, x, x) for _ in range(repeats)]))


def seconds(program: Callable, *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    forms: list[tuple[str, int | None]] = [("xla", chunk) for chunk in case.chunks]
    forms.append(("reference", None))
    made = [programs(case, *form) for form in forms]
    times = np.zeros((len(forms), 2, repeats + 1))
    for turn in range(repeats + 1):  # the first is not counted
        for i, (pair, _) in enumerate(made):
            for j, program in enumerate(pair):
                times[i, j, turn] = seconds(program, case.args)
    low, middle, high = np.percentile(1e3 * times[:, :, 1:], (25, 50, 75), axis=-1).tolist()
    return [
        {"impl": impl, "chunk": chunk, "compile_s": made[i][1]}
        | {"forward_ms": middle[i][0], "forward_quartiles_ms": [low[i][0], high[i][0]]}
        | {"both_ms": middle[i][1], "both_quartiles_ms": [low[i][1], high[i][1]]}
        for i, (impl, chunk) in enumerate(forms)
    ]


def show(name: str, row: dict[str, Any], least: float) -> str:
    """A line; least: seconds that the FLOPs of a pass forward take at the roof."""
    line = f"{name:27} {row['impl']:9} {row['chunk'] or '':>4}"
    for kind, passes in (("forward", 1), ("both", 3)):
        taken = row[f"{kind}_ms"]
        line += f"   {kind} {taken:8.2f} ms {1e5 * passes * least / taken:5.1f}%"
    return f"{line}   compile {row['compile_s']:.1f} s"


def table(report: dict[str, Any]) -> str:
    """Markdown: forward and backward by chunk, the fastest in bold, against the token loop."""
    lines = ["| | " + " | ".join(map(str, CHUNKS)) + " | token loop | times | roof |"]
    lines.append("|---" * (len(CHUNKS) + 4) + "|")
    for name, result in report["results"].items():
        xla = {row["chunk"]: row for row in result["rows"] if row["impl"] == "xla"}
        loop = next(row for row in result["rows"] if row["impl"] == "reference")
        best = min(xla.values(), key=lambda row: row["both_ms"])
        cells = []
        for chunk in CHUNKS:
            row = xla.get(chunk)
            text = "" if row is None else f"{row['forward_ms']:.1f} / {row['both_ms']:.1f}"
            cells.append(f"**{text}**" if row is best else text)
        if None in xla:
            cells[0] = f"{best['forward_ms']:.1f} / {best['both_ms']:.1f}"
        cells.append(f"{loop['forward_ms']:.1f} / {loop['both_ms']:.1f}")
        kinds = ("forward", "both")
        cells.append(" / ".join(f"{loop[f'{k}_ms'] / best[f'{k}_ms']:.1f}" for k in kinds))
        least = 1e3 * result["flops_forward"] / report["roof_flops_per_s"]
        shares = (n * least / best[f"{k}_ms"] for n, k in ((1, "forward"), (3, "both")))
        cells.append(" / ".join(f"{100 * share:.0f} %" for share in shares))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    restart_with_fast_allocator()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", default="", help="part of a name")
    settings = parser.parse_args()
    results: dict[str, Any] = {}
    rate = roof()
    for name, case in cases().items():
        if settings.only not in name:
            continue
        flops = 2.0 * case.multiply_adds * BATCH * TOKENS
        rows = measure(case, settings.repeats)
        results[name] = {"flops_forward": flops, "rows": rows}
        for row in rows:
            print(show(name, row, flops / rate), flush=True)
    print(f"roof {rate / 1e9:.0f} GFLOP/s before, {roof() / 1e9:.0f} after")
    report = {"roof_flops_per_s": rate, "results": results}
    print(table(report))
    if settings.json is not None:
        settings.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
