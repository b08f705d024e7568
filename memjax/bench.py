"""Speed and memory of a config, against the matrix-product roof of the same process.

`mfu` is the share of that roof which the training step reaches, counting six operations a token
for each weight of a matrix (the embedding table, which is only looked up, left out) and the
products of softmax attention. The work of recurrences is not counted, so a mixer gains nothing by
doing more of it. Machines are noisy: compare figures of one run, not of two.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from memjax.config import ConfigError
from memjax.data import load_tokenizer
from memjax.describe import describe, model_flops
from memjax.experiment import Experiment
from memjax.model import LanguageModel, Model, merge, split
from memjax.sharding import make_mesh
from memjax.training.step import Trainer, make_trainer, put_batch

ROOF_SIZE = {"cpu": 2048}  # on an accelerator 8192: less takes no longer than to start it
ROOF_REPEATS = 8
DECODE_TOKENS = 64


def bench(
    experiment: Experiment,
    *,
    seconds: float = 20.0,
    lengths: Sequence[int] = (),
    positions: Sequence[int] = (),
    depths: Sequence[int] = (),
) -> dict[str, Any]:
    """Time training steps for `seconds`, and decoding; see the module for what `mfu` means.

    lengths: also time steps of these many tokens a segment, at the same tokens a step or one row.
    positions: also time decoding after so many tokens. depths: also time compilation with these
    repeats of the layer pattern. Batches are random tokens. Raises ConfigError.
    """
    if seconds <= 0:
        raise ConfigError(f"--seconds={seconds}: must be greater than 0")
    vocab_size = load_tokenizer(experiment.data).vocab_size
    jax.config.update("jax_enable_compilation_cache", False)  # compile_s is of a real compilation
    costs = describe(experiment, vocab_size)
    result = {
        "params": costs["params"],
        "non_embedding_params": costs["non_embedding_params"],
        "flops_per_token": costs["flops_per_token"],
        "state_bytes_per_sequence": costs["state_bytes_per_sequence"],
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        **time_training(experiment, vocab_size, seconds),
    }
    lm = LanguageModel(experiment.model, vocab_size, rngs=nnx.Rngs(0))
    decode = partial(time_decoding, lm, vocab_size)
    result["decode_tokens_per_s"] = decode([0])[0]["tokens_per_s"]
    if positions:
        result["decode_by_position"] = decode(sorted(positions))
    if lengths:
        result["by_length"] = [_at_length(experiment, vocab_size, n, seconds) for n in lengths]
        result["time_slope"] = _slope(result["by_length"], "seconds_per_step")
        result["memory_slope"] = _slope(result["by_length"], "temporary_bytes")
    if depths:
        result["compile_by_repeat"] = [_at_depth(experiment, vocab_size, n) for n in depths]
    return result


def time_training(
    experiment: Experiment,
    vocab_size: int,
    seconds: float,
    compiled_hook: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Steps timed one by one, the roof measured before and among them; medians of both.

    compiled_hook: called between compilation and the first step.
    """
    mesh = make_mesh(experiment.mesh, experiment.data.batch)
    trainer = make_trainer(experiment, vocab_size, mesh)
    batch = _random_batch(experiment, vocab_size, mesh)
    compiled, compile_seconds = _compile(trainer, batch)
    compiled_hook()
    state = trainer.init()
    roof = make_roof(experiment.model.dtype)
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    times: list[float] = []
    roofs, begin = [roof()], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
        if len(times) % 5 == 0:
            roofs.append(roof())
    memory = compiled.memory_analysis()
    tokens = batch["tokens_BT"].size
    counted = model_flops(experiment.model, vocab_size, experiment.data.sequence)["mfu_counts"]
    step, roof_rate = statistics.median(times), statistics.median(roofs)
    return {
        "compile_s": compile_seconds,
        "seconds_per_step": step,
        "steps_timed": len(times),
        "train_tokens_per_s": tokens / step,
        "roof_flops_per_s": roof_rate,
        "mfu_flops_per_token": counted,
        "mfu": counted * tokens / step / roof_rate / mesh.size,
        "peak_bytes": _peak_bytes(memory),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def make_roof(dtype: str) -> Callable[[], float]:
    """A function that times square matrix products: median operations a second."""
    size = ROOF_SIZE.get(jax.default_backend(), 8192)
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a, a))

    def roof() -> float:
        times = []
        for _ in range(ROOF_REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(product(a, a))
            times.append(time.perf_counter() - start)
        return 2.0 * size**3 / statistics.median(times)

    return roof


def time_decoding(
    lm: LanguageModel,
    vocab_size: int,
    positions: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, float]]:
    """Tokens a second of one stream, token by token, after so many tokens were read."""
    definition, params = split(lm)

    @jax.jit
    def read(params, state, tokens_BT):
        no_reset_BT = jnp.zeros(tokens_BT.shape, bool)
        return merge(definition, params).read(state, tokens_BT, no_reset_BT).state

    @jax.jit
    def decode(params, state, token_B1):
        def one(carry, _):
            state, token_B1 = carry
            lm = merge(definition, params)
            state, logits = lm(state, token_B1, jnp.zeros((1, 1), bool))
            return (state, jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)), None

        return jax.lax.scan(one, (state, token_B1), length=DECODE_TOKENS)[0]

    token_B1 = jnp.zeros((1, 1), jnp.int32)
    rng, at, state, states = np.random.default_rng(0), 0, lm.init_state(1), []
    for position in positions:
        while at < position:
            count = min(1000, position - at)
            tokens = jnp.asarray(rng.integers(0, vocab_size, (1, count)), jnp.int32)
            state, at = read(params, state, tokens), at + count
        states.append(state)
    jax.block_until_ready(decode(params, states[0], token_B1))
    times: list[list[float]] = [[] for _ in positions]
    for _ in range(7):  # positions alternate, so that a slow moment of the machine hits them all
        for state, seconds in zip(states, times):
            start = clock()
            jax.block_until_ready(decode(params, state, token_B1))
            seconds.append(clock() - start)
    rates = [DECODE_TOKENS / statistics.median(seconds) for seconds in times]
    return [{"position": p, "tokens_per_s": r} for p, r in zip(positions, rates)]


def _compile(trainer: Trainer, batch: dict[str, jax.Array]) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = trainer.step.lower(trainer.abstract, batch).compile()
    return compiled, time.perf_counter() - start


def _random_batch(experiment: Experiment, vocab_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    size = (experiment.data.batch, experiment.data.sequence * experiment.train.horizon)
    tokens = rng.integers(0, vocab_size, (size[0], size[1] + 1))
    reset = np.zeros(size, bool)
    reset[:, 0] = True
    batch = {
        "tokens_BT": tokens[:, :-1].astype(np.int32),
        "targets_BT": tokens[:, 1:].astype(np.int32),
        "weight_BT": np.ones(size, np.float32),
        "reset_BT": reset,
    }
    return put_batch(batch, mesh)


def _peak_bytes(memory: Any) -> int:
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def _at_length(experiment: Experiment, vocab_size: int, length: int, seconds: float) -> dict:
    tokens = experiment.data.batch * experiment.data.sequence
    rows = max(1, tokens // length)
    data = dataclasses.replace(experiment.data, sequence=length, batch=rows)
    train = dataclasses.replace(experiment.train, accumulate=1)
    changed = dataclasses.replace(experiment, data=data, train=train)
    timed = time_training(changed, vocab_size, seconds / 2)
    kept = ("seconds_per_step", "train_tokens_per_s", "mfu", "temporary_bytes", "compile_s")
    return {"length": length, "batch": rows, **{name: timed[name] for name in kept}}


def _slope(rows: list[dict], field: str) -> float | None:
    """Slope of log(field of one row of the batch) over log(length), by least squares."""
    if len(rows) < 2:
        return None
    x = np.log([row["length"] for row in rows])
    y = np.log([row[field] / row["batch"] for row in rows])
    return float(np.polyfit(x, y, 1)[0])


def _at_depth(experiment: Experiment, vocab_size: int, repeat: int) -> dict[str, float]:
    model: Model = dataclasses.replace(experiment.model, repeat=repeat)
    changed = dataclasses.replace(experiment, model=model)
    mesh = make_mesh(changed.mesh, changed.data.batch)
    batch = _random_batch(changed, vocab_size, mesh)
    compiled, seconds = _compile(make_trainer(changed, vocab_size, mesh), batch)
    layers = repeat * len(model.pattern)
    memory = compiled.memory_analysis()
    return {"layers": layers, "compile_s": seconds, "temporary_bytes": memory.temp_size_in_bytes}
