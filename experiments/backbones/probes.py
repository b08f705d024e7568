"""Recall and state tracking, small: python experiments/backbones/probes.py [--only NAME ...]
    [--probe mqar|parity] [--learning-rate RATE] [--steps COUNT]

Trains what `probes.json` beside this file lacks and adds it there, a line of progress each; prints
the table of what is there. Ctrl-C loses only the probe that runs.

MQAR (arXiv:2312.04927): two blocks of (gated short convolution, mixer), no MLP, d = 64, so that
every mixer sees the same local convolution. Rows of 32 symbols of 32: 4 pairs each in the first
half of training, then 2 pairs or 8, on which it is tested. Answers are one of 16 values: chance is
0.06, and a model that knows which values occurred, but not whose they are, is right 0.5 and 0.125
of the time.
Parity: two blocks (mixer, SwiGLU), d = 64, trained on rows of 32 bits, tested at 32 and at 256,
whose last quarter is scored by itself too; chance is 0.5. Delta rules have no convolution here.
Where the size of a memory can be chosen it is one head with keys of 4 and values of 16.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from memjax.data.tasks import MQAR, Parity, Rows, Task
from memjax.describe import state_bytes
from memjax.mixers import (
    GLA,
    HGRN2,
    LSTM,
    MLSTM,
    RGLRU,
    Attention,
    Based,
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    LinearTransformer,
    Mamba,
    Mamba2,
    MixerConfig,
    MoM,
    RetNet,
    TitansLMM,
    TTTLinear,
)
from memjax.mixers.deep_memory import DeepMemory
from memjax.model import LanguageModel, Model, merge, split

RESULTS = Path(__file__).parent / "probes.json"
WIDTH, BATCH, WARMUP, TOGETHER, TESTED = 64, 32, 30, 100, 512
FEW, MIDDLE, MANY = (MQAR(pairs=pairs, vocab=32) for pairs in (2, 4, 8))
PARITY = Parity()
SHORT, LONG = 32, 256  # lengths of rows

SMALL = dict(heads=1, key_size=4, value_size=16)
VARIANTS: dict[str, MixerConfig] = {
    "attention": Attention(heads=2, context=LONG),
    "attention, window 4": Attention(heads=2, window=4),
    "deltanet": DeltaNet(**SMALL),
    "deltanet, eigenvalues to -1": DeltaNet(negative_eigenvalues=True, **SMALL),
    "lstm": LSTM(),
    "linear_attention, scalar decay": LinearAttention(decay="scalar", **SMALL),
    "mamba": Mamba(states=2, expand=1),
    "gated_deltanet": GatedDeltaNet(**SMALL),
    "mamba2": Mamba2(expand=1, head_size=16, state_size=4),
    "retnet": RetNet(**SMALL),
    "gla": GLA(**SMALL),
    "linear_attention, no decay": LinearAttention(decay="none", **SMALL),
    "linear_attention, vector decay": LinearAttention(decay="vector", **SMALL),
    "mlstm": MLSTM(heads=4, expand=1),
    "ttt_linear": TTTLinear(heads=4),
    "titans_lmm": TitansLMM(memory=DeepMemory(heads=4, expansion=1, update_every=16)),
    "mom": MoM(**SMALL),
    "gated_deltanet, eigenvalues to -1": GatedDeltaNet(negative_eigenvalues=True, **SMALL),
    "linear_transformer": LinearTransformer(heads=8),
    "based": Based(heads=2, key_size=1),
    "hgrn2": HGRN2(expand=4),
    "rg_lru": RGLRU(),
}


def draw(task: Task, count: int, length: int, seed: tuple[int, ...]) -> Rows:
    return task.rows(np.random.SeedSequence(seed).spawn(count), length)


def join(*parts: Rows) -> Rows:
    return Rows(*(np.concatenate(arrays, 1) for arrays in zip(*parts)))


def training_rows(probe: str, first: int, steps: int) -> Rows:
    """Batches for `TOGETHER` of all steps, from `first` on: [step, row, symbol]."""

    def batches(task: Task, rows: int, kind: int) -> Rows:
        drawn = draw(task, TOGETHER * rows, SHORT, (first, kind))
        return Rows(*(array.reshape(TOGETHER, rows, SHORT) for array in drawn))

    if probe == "parity":
        return batches(PARITY, BATCH, 0)
    if first < steps // 2:
        return batches(MIDDLE, BATCH, 1)
    return join(batches(FEW, BATCH // 2, 2), batches(MANY, BATCH // 2, 3))


def measure(config: MixerConfig, probe: str, learning_rate: float, steps: int) -> dict:
    """Train on one kind of rows; accuracy on others never seen."""
    begin, parity = time.process_time(), probe == "parity"
    if parity and isinstance(config, DeltaNet | GatedDeltaNet):
        config = dataclasses.replace(config, conv=None)  # a key that sees one bit alone
    model = Model(
        d_model=WIDTH,
        pattern=("mixer",) if parity else ("base_conv", "mixer"),
        repeat=2,
        mixers={"mixer": config},
        layers="unroll",
        **({} if parity else {"mlp": None}),
    )
    vocab = PARITY.vocab_size if parity else FEW.vocab_size
    definition, params = split(LanguageModel(model, vocab, rngs=nnx.Rngs(0)))
    schedule = optax.warmup_cosine_decay_schedule(
        0, learning_rate, WARMUP, steps, learning_rate / 10
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.0)
    )

    def answers(params, rows: Rows):
        lm, reset = merge(definition, params), jnp.zeros(rows.tokens.shape, bool)
        _, logits = lm(lm.init_state(len(reset)), rows.tokens, reset)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
        return jnp.sum(nll * rows.weight) / jnp.sum(rows.weight), jnp.argmax(logits, -1)

    @jax.jit
    def train(params, state, rows: Rows):
        def step(carry, rows: Rows):
            params, state = carry
            (loss, _), grads = jax.value_and_grad(answers, has_aux=True)(params, rows)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(step, (params, state), rows)
        return params, state, losses

    state, curve = optimizer.init(params), []
    for first in range(0, steps, TOGETHER):
        params, state, losses = train(params, state, training_rows(probe, first, steps))
        curve.append(round(float(losses[-20:].mean()), 3))
    answer = jax.jit(lambda params, rows: answers(params, rows)[1])

    def accuracy(task: Task, length: int, start: int = 0) -> float:
        rows = draw(task, TESTED, length, (10**6,))
        right = (np.asarray(answer(params, rows)) == rows.targets) * rows.weight
        return round(float(right[:, start:].sum() / rows.weight[:, start:].sum()), 4)

    if parity:
        found = {"32": accuracy(PARITY, SHORT), "256": accuracy(PARITY, LONG)}
        found["last 64 of 256"] = accuracy(PARITY, LONG, LONG - 64)
    else:
        found = {"2 pairs": accuracy(FEW, SHORT), "8 pairs": accuracy(MANY, SHORT)}
    return {
        "accuracy": found,
        "learning_rate": learning_rate,
        "losses": curve,
        "state_bytes": state_bytes(model, vocab),
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def read() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def table(results: dict) -> str:
    """The best of the learning rates and numbers of steps tried, by the last training loss."""
    columns = {"mqar": ("2 pairs", "8 pairs"), "parity": ("32", "256", "last 64 of 256")}
    names = ["mixer"]
    for probe, tests in columns.items():
        names += [f"{probe}: steps", "loss", *tests]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for variant in VARIANTS:
        shown = [variant]
        for probe, tests in columns.items():
            tries = results.get(variant, {}).get(probe, [])
            best = min(tries, key=lambda found: found["losses"][-1], default=None)
            if best is None:
                shown += [""] * (2 + len(tests))
                continue
            shown += [str(TOGETHER * len(best["losses"])), f"{best['losses'][-1]:.2f}"]
            shown += [f"{best['accuracy'][test]:.3f}" for test in tests]
        if any(shown[1:]):
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--probe", nargs="+", default=["mqar", "parity"])
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--steps", type=int, default=800, help=f"a multiple of {TOGETHER}")
    args = parser.parse_args()
    for variant in args.only:
        for probe in args.probe:
            tries = read().get(variant, {}).get(probe, [])
            done = [(found["learning_rate"], TOGETHER * len(found["losses"])) for found in tries]
            if (args.learning_rate, args.steps) in done:
                continue
            found = measure(VARIANTS[variant], probe, args.learning_rate, args.steps)
            results = read()
            results.setdefault(variant, {}).setdefault(probe, []).append(found)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(variant, probe, found, flush=True)
    print(table(read()))


if __name__ == "__main__":
    main()
