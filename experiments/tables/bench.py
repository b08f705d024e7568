"""A table of a million rows against the MLP that it replaces: seconds of a training step.

    python experiments/tables/bench.py [--d-model=512] [--value-size=64] [--tokens=2048]

Both are trained by themselves, on the same inputs, with the same loss: outputs, gradients of all
parameters and inputs, and AdamW over everything, the whole table included (its moments and its
gradient are dense, so every row is updated, read or not). Variants alternate, medians are shown;
the rows below them take the table's step apart.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from memjax.architecture import Model
from memjax.layers import MLP, SwiGLU
from memjax.memory import MemoryPlus
from memjax.memory.memory_plus import MemoryPlusModule
from memjax.memory.product_keys import read_table
from memjax.platform import restart_with_fast_allocator


def trainer(module):
    """(params, optimizer state) -> the same after a step, donated."""
    definition, params = nnx.split(module)
    optimizer = optax.adamw(1e-3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x):
        def loss(params, x):
            return jnp.mean(jnp.square(nnx.merge(definition, params)(x)))

        grads, dx = jax.grad(loss, (0, 1))(params, x)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jnp.sum(dx)

    return step, params, optimizer.init(params)


class Alone(nnx.Module):
    """A memory module with its table, called as an MLP is."""

    def __init__(self, config, d_model):
        rngs = nnx.Rngs(0)
        self.module = MemoryPlusModule(config, d_model, rngs=rngs)
        self.shared = MemoryPlusModule.shared(config, Model(d_model=d_model), rngs=rngs)

    def __call__(self, x_BTD):
        reset_BT = jnp.zeros(x_BTD.shape[:2], bool)
        return self.module((), x_BTD, reset_BT, self.shared)[1]


def timed(fn, repeats):
    jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(args):
    config = MemoryPlus(keys=args.keys, value_size=args.value_size, top_k=args.top_k)
    x = jax.random.normal(jax.random.key(0), (1, args.tokens, args.d_model))
    times = {"mlp": [], "table": []}
    running = {}
    mlp = MLP(SwiGLU(), args.d_model, rngs=nnx.Rngs(0))
    for name, module in (("mlp", mlp), ("table", Alone(config, args.d_model))):
        step, params, opt_state = trainer(module)
        running[name] = (step, *step(params, opt_state, x)[:2])
    for _ in range(args.repeats):
        for name, (step, params, opt_state) in list(running.items()):
            start = time.perf_counter()
            params, opt_state, dx = jax.block_until_ready(step(params, opt_state, x))
            times[name].append(time.perf_counter() - start)
            running[name] = (step, params, opt_state)
    return config, x, {name: statistics.median(values) for name, values in times.items()}


def parts(config, x, repeats):
    """Seconds of the pieces of the table's step, each by itself."""
    alone = Alone(config, x.shape[-1])
    table = alone.shared.values[...]
    index, weight = jax.jit(lambda m, x: m.module.search(x))(alone, x)
    scores = jax.random.normal(jax.random.key(1), (x.shape[1], config.heads, 2, config.keys))
    search = jax.jit(lambda m, x: m.module.search(x))
    read = jax.jit(read_table)
    best = jax.jit(lambda s: jax.lax.top_k(s, config.top_k))
    both = jax.jit(jax.grad(lambda t, i, w: jnp.sum(read_table(t, i, w)), (0, 2)))
    return {
        "search": timed(lambda: search(alone, x), repeats),
        "  of it, the largest scores": timed(lambda: best(scores), repeats),
        "read rows": timed(lambda: read(table, index, weight), repeats),
        "  and their gradients": timed(lambda: both(table, index, weight), repeats),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--value-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keys", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    restart_with_fast_allocator()  # as the command line does
    config, x, times = compare(args)
    rows = config.keys**2
    print(f"{args.tokens:,} tokens, d_model={args.d_model}, {rows:,} rows of {args.value_size}")
    for name, seconds in times.items():
        print(f"{name:<30}{1e3 * seconds:8.1f} ms")
    print(f"{'table / mlp':<30}{times['table'] / times['mlp']:8.2f}")
    for name, seconds in parts(config, x, args.repeats).items():
        print(f"{name:<30}{1e3 * seconds:8.1f} ms")


if __name__ == "__main__":
    main()
