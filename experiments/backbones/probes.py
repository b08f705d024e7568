"""Recall and state tracking, small: python experiments/backbones/probes.py [--only NAME ...]
    [--probe NAME ...] [--learning-rate RATE] [--steps COUNT]

Trains what `probes.json` beside this file lacks and adds it there, a line of progress each; prints
the tables of what is there. Ctrl-C loses only the probe that runs.

MQAR (arXiv:2312.04927): one gated short convolution, so that every mixer sees the same, then one
mixer, no MLP, d = 64, embedding and output matrix apart. Rows of 64 symbols of 64, trained on 2
pairs until they are known (but at most for two thirds of all steps), then on 4 and on 16 pairs,
half of the rows each, on which it is tested. Answers are one of 32 values: chance is 0.03, and a
model that knows which values occurred, but not whose they are, is right 0.25 and 0.06 of the time.
`mqar_wide` is asked of memories of 1,000 numbers and more (`WIDE`), `mqar` of smaller ones, 64 to
600: where the size can be chosen, one head with keys of 4 and values of 16.
`mqar_tied` is `mqar` with the output matrix tied to the embedding.
Parity: two blocks (mixer, SwiGLU), d = 64, trained on rows of 32 bits, tested at 32 and at 256,
whose last quarter is scored by itself too; chance is 0.5. Delta rules have no convolution here.
"""

import argparse
import dataclasses
import itertools
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
    BaseConv,
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
WIDTH, WARMUP, TOGETHER, TESTED = 64, 30, 100, 512
FIRST, FEW, MANY = (MQAR(pairs=pairs, vocab=64) for pairs in (2, 4, 16))
KNOWN = 0.2  # a training loss below which two pairs are known
PARITY = Parity()
SHORT, MEDIUM, LONG = 32, 64, 256  # lengths of rows

SMALL = dict(heads=1, key_size=4, value_size=16)
VARIANTS: dict[str, MixerConfig] = {
    "no memory": BaseConv(),
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

LARGE = dict(heads=2, key_size=32, value_size=32)
WIDE: dict[str, MixerConfig] = {
    "deltanet": DeltaNet(**LARGE),
    "deltanet, eigenvalues to -1": DeltaNet(negative_eigenvalues=True, **LARGE),
    "linear_attention, scalar decay": LinearAttention(decay="scalar", **LARGE),
    "mamba": Mamba(states=16, expand=2),
    "gated_deltanet": GatedDeltaNet(**LARGE),
    "mamba2": Mamba2(expand=1, head_size=32, state_size=32),
    "retnet": RetNet(**LARGE),
    "gla": GLA(**LARGE),
    "linear_attention, no decay": LinearAttention(decay="none", **LARGE),
    "linear_attention, vector decay": LinearAttention(decay="vector", **LARGE),
    "mom": MoM(**LARGE),
    "gated_deltanet, eigenvalues to -1": GatedDeltaNet(negative_eigenvalues=True, **LARGE),
    "linear_transformer": LinearTransformer(heads=2),
    "based": Based(heads=2, key_size=8),
    "hgrn2": HGRN2(expand=32),
}
NARROW: dict[str, MixerConfig] = {
    "mlstm": MLSTM(heads=16, expand=1),
    "ttt_linear": TTTLinear(heads=16),
    "titans_lmm": TitansLMM(memory=DeepMemory(heads=16, expansion=1, update_every=16)),
}
SIZES = {"mqar_wide": WIDE, "mqar": NARROW, "mqar_tied": NARROW}


def draw(task: Task, count: int, length: int, seed: tuple[int, ...]) -> Rows:
    return task.rows(np.random.SeedSequence(seed).spawn(count), length)


def join(*parts: Rows) -> Rows:
    return Rows(*(np.concatenate(arrays, 1) for arrays in zip(*parts)))


def training_rows(probe: str, first: int, basics: bool) -> Rows:
    """Batches for `TOGETHER` steps, from step `first` on: [step, row, symbol]."""

    def batches(task: Task, rows: int, length: int, kind: int) -> Rows:
        drawn = draw(task, TOGETHER * rows, length, (first, kind))
        return Rows(*(array.reshape(TOGETHER, rows, length) for array in drawn))

    if probe == "parity":
        return batches(PARITY, 32, SHORT, 0)
    if basics:
        return batches(FIRST, 64, MEDIUM, 1)
    return join(batches(FEW, 32, MEDIUM, 2), batches(MANY, 32, MEDIUM, 3))


def make_model(variant: str, probe: str) -> Model:
    config = SIZES.get(probe, {}).get(variant, VARIANTS[variant])
    if probe != "parity":
        return Model(
            d_model=WIDTH,
            pattern=("base_conv", "mixer"),
            repeat=1,
            mixers={"mixer": config},
            layers="unroll",
            mlp=None,
            tied=probe == "mqar_tied",
        )
    if isinstance(config, DeltaNet | GatedDeltaNet):
        config = dataclasses.replace(config, conv=None)  # a key that sees one bit alone
    mixers = {"mixer": config}
    return Model(d_model=WIDTH, pattern=("mixer",), repeat=2, mixers=mixers, layers="unroll")


def measure(variant: str, probe: str, learning_rate: float, steps: int) -> dict:
    """Train on one kind of rows; accuracy on others never seen."""
    begin, parity = time.process_time(), probe == "parity"
    model = make_model(variant, probe)
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
    basics = True
    for first in range(0, steps, TOGETHER):
        basics = basics and first < 2 * steps // 3 and min(curve, default=KNOWN) >= KNOWN
        params, state, losses = train(params, state, training_rows(probe, first, basics))
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
        found = {"4 pairs": accuracy(FEW, MEDIUM), "16 pairs": accuracy(MANY, MEDIUM)}
    return {
        "accuracy": found,
        "learning_rate": learning_rate,
        "losses": curve,
        "state_bytes": state_bytes(model, vocab),
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def read() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


MQAR_TESTS = ("4 pairs", "16 pairs")
PROBES = {  # what is tested, and the learning rate and the steps of training
    "mqar_wide": (MQAR_TESTS, 3e-3, 1200),
    "mqar": (MQAR_TESTS, 3e-3, 1200),
    "mqar_tied": (MQAR_TESTS, 3e-3, 1200),
    "parity": (("32", "256", "last 64 of 256"), 5e-3, 800),
}


def table(results: dict, *probes: str) -> str:
    """The best of the learning rates and numbers of steps tried, by the last training loss."""
    names = ["mixer"]
    for probe in probes:
        names += [f"{probe}: state, KiB", "steps", "loss", *PROBES[probe][0]]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for variant in VARIANTS:
        shown = [variant]
        for probe in probes:
            tries, tests = results.get(variant, {}).get(probe, []), PROBES[probe][0]
            best = min(tries, key=lambda found: found["losses"][-1], default=None)
            if best is None:
                shown += [""] * (3 + len(tests))
                continue
            shown += [f"{best['state_bytes'] / 1024:.1f}", str(TOGETHER * len(best["losses"]))]
            shown += [f"{best['losses'][-1]:.2f}"]
            shown += [f"{best['accuracy'][test]:.3f}" for test in tests]
        if any(shown[1:]):
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    default = ["mqar_wide", "mqar", "parity"]
    parser.add_argument("--probe", nargs="+", default=default, choices=list(PROBES))
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--steps", type=int, help=f"a multiple of {TOGETHER}")
    args = parser.parse_args()
    for variant, probe in itertools.product(args.only, args.probe):
        if probe == "mqar_wide" and variant not in {**WIDE, **NARROW}:
            continue
        _, learning_rate, steps = PROBES[probe]
        learning_rate, steps = args.learning_rate or learning_rate, args.steps or steps
        tries = read().get(variant, {}).get(probe, [])
        done = [(found["learning_rate"], TOGETHER * len(found["losses"])) for found in tries]
        if (learning_rate, steps) in done:
            continue
        found = measure(variant, probe, learning_rate, steps)
        results = read()
        results.setdefault(variant, {}).setdefault(probe, []).append(found)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(variant, probe, found, flush=True)
    print(table(read(), "mqar_wide", "mqar"), table(read(), "parity"), sep="\n\n")


if __name__ == "__main__":
    main()
