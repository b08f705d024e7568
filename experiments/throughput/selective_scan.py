"""How much faster is the selective scan than a loop over tokens?

Command:   python experiments/throughput/selective_scan.py [--seconds=2] [--json=FILE]
Hardware:  2 CPU cores
Duration:  about a minute
Result:    backbones.md beside this file

The sizes are those of one layer of `configs/bench.py:mamba`: 2 rows of 1,024 tokens, 512 channels,
16 states a channel, float32. Three loops over tokens do the same sums:

  compiled   `impl="reference"`: one `lax.scan`, compiled as a whole
  eager jax  the same lines, one operation after the other, as Python runs them without `jax.jit`
  eager torch  the loop as it is written in PyTorch, where torch is installed (it is not needed
             otherwise); its backward pass is that of autograd

Forward, and forward with the gradients of every input. Loops in Python are timed a few times only.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from memjax.platform import restart_with_fast_allocator
from memjax.training.compiler import compiler_options
from pallas_kernels import selective_scan

BATCH, TOKENS, CHANNELS, STATES = 2, 1024, 512, 16


def draw() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "x": normal(BATCH, TOKENS, CHANNELS),
        "dt": np.log1p(np.exp(normal(BATCH, TOKENS, CHANNELS) - 4)),
        "A": -np.tile(np.arange(1, STATES + 1, dtype=np.float32), (CHANNELS, 1)),
        "B": normal(BATCH, TOKENS, STATES),
        "C": normal(BATCH, TOKENS, STATES),
    }


def loop(x, dt, A, B, C, zeros, exp, stack):
    """The recurrence, in whatever library the arrays are of."""
    h, ys = zeros, []
    for t in range(x.shape[1]):
        h = exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return stack(ys, 1)


def median_time(run, seconds: float) -> float:
    run()
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def of_jax(impl: str, inputs: dict[str, np.ndarray], seconds: float) -> dict[str, float]:
    arrays = {name: jnp.asarray(a) for name, a in inputs.items()}
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(inputs["x"].shape), jnp.float32)

    def loss(arrays):
        return jnp.sum(weight * selective_scan(**arrays, impl=impl)[0])

    options = compiler_options()
    forward = jax.jit(lambda a: selective_scan(**a, impl=impl)[0], compiler_options=options)
    both = jax.jit(jax.grad(loss), compiler_options=options)
    return {
        "forward": median_time(lambda: jax.block_until_ready(forward(arrays)), seconds),
        "forward_and_backward": median_time(lambda: jax.block_until_ready(both(arrays)), seconds),
    }


def of_eager_jax(inputs: dict[str, np.ndarray]) -> dict[str, float]:
    arrays = {name: jnp.asarray(a) for name, a in inputs.items()}
    zeros = jnp.zeros((BATCH, CHANNELS, STATES))

    def forward():
        jax.block_until_ready(loop(**arrays, zeros=zeros, exp=jnp.exp, stack=jnp.stack))

    return {"forward": median_time(forward, 0)}


def of_eager_torch(inputs: dict[str, np.ndarray]) -> dict[str, float] | None:
    try:
        import torch
    except ImportError:
        return None
    arrays = {name: torch.from_numpy(a).requires_grad_() for name, a in inputs.items()}
    zeros = torch.zeros(BATCH, CHANNELS, STATES)
    weight = torch.randn(BATCH, TOKENS, CHANNELS)

    def forward():
        with torch.no_grad():
            loop(**arrays, zeros=zeros, exp=torch.exp, stack=torch.stack)

    def both():
        y = loop(**arrays, zeros=zeros, exp=torch.exp, stack=torch.stack)
        torch.autograd.grad((weight * y).sum(), list(arrays.values()))

    return {
        "forward": median_time(forward, 0),
        "forward_and_backward": median_time(both, 0),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    inputs = draw()
    result = {
        "chunked": of_jax("xla", inputs, options.seconds),
        "compiled_loop": of_jax("reference", inputs, options.seconds),
        "eager_torch_loop": of_eager_torch(inputs),
        "eager_jax_loop": of_eager_jax(inputs),
    }
    ours = result["chunked"]
    for times in filter(None, result.values()):
        times["over_chunked"] = {key: times[key] / ours[key] for key in list(ours) if key in times}
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        with open(options.json, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    restart_with_fast_allocator()
    main()
