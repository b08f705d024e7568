"""Recall and state tracking, small: python experiments/backbones/probes.py [--only NAME ...]

Trains what `probes.json` beside this file lacks and adds it there, a line of progress each; prints
the table of what is there. Ctrl-C loses only the probe that runs.

MQAR (arXiv:2312.04927): two blocks of (gated short convolution, mixer), no MLP, d = 32, so that
every mixer sees the same local convolution; accuracy on fresh rows. Parity: two blocks (mixer,
SwiGLU), d = 32, trained on rows of 32 bits, accuracy on rows of 32 and of 256.
A memory has about 256 numbers a layer (2 heads, keys of 8, values of 16) where its size can be
chosen: 4 pairs must fit, 16 must not.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

from memjax.data import Data, open_data
from memjax.data.tasks import MQAR, Parity, Task
from memjax.describe import describe
from memjax.evals.run import load_run
from memjax.evals.tasks import evaluate_task
from memjax.experiment import Experiment
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
    MoM,
    RetNet,
    TitansLMM,
    TTTLinear,
)
from memjax.mixers.base import MixerConfig
from memjax.mixers.deep_memory import DeepMemory
from memjax.model import Model
from memjax.training.config import Checkpoint, Optimizer, Train
from memjax.training.loop import train

RESULTS = Path(__file__).parent / "probes.json"
WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Probe:
    """A task, the length and size of its training, and the lengths of its tests."""

    task: Task
    length: int
    lengths: tuple[int, ...]
    steps: int
    batch: int
    learning_rate: float = 3e-3


PROBES = {
    "mqar_4": Probe(MQAR(pairs=4, vocab=64), 64, (64,), steps=600, batch=32),
    "mqar_16": Probe(MQAR(pairs=16, vocab=64), 64, (64,), steps=600, batch=32),
    "parity": Probe(Parity(), 32, (32, 256), steps=600, batch=32),
}
SMALL = dict(heads=2, key_size=8, value_size=16)
VARIANTS: dict[str, MixerConfig] = {
    "attention": Attention(heads=2, context=256),
    "attention, window 8": Attention(heads=2, window=8),
    "linear_attention, no decay": LinearAttention(decay="none", **SMALL),
    "linear_attention, scalar decay": LinearAttention(decay="scalar", **SMALL),
    "linear_attention, vector decay": LinearAttention(decay="vector", **SMALL),
    "linear_transformer": LinearTransformer(heads=2),
    "based": Based(heads=2, key_size=2),
    "retnet": RetNet(heads=2, key_size=8, value_size=16),
    "gla": GLA(**SMALL),
    "hgrn2": HGRN2(expand=8),
    "mlstm": MLSTM(heads=2, expand=1),
    "mamba": Mamba(states=4),
    "mamba2": Mamba2(head_size=16, state_size=4),
    "rg_lru": RGLRU(),
    "deltanet": DeltaNet(**SMALL),
    "deltanet, eigenvalues to -1": DeltaNet(negative_eigenvalues=True, **SMALL),
    "gated_deltanet": GatedDeltaNet(**SMALL),
    "gated_deltanet, eigenvalues to -1": GatedDeltaNet(negative_eigenvalues=True, **SMALL),
    "mom": MoM(**SMALL),
    "ttt_linear": TTTLinear(heads=2),
    "titans_lmm": TitansLMM(memory=DeepMemory(heads=2, expansion=1, update_every=16)),
    "lstm": LSTM(),
}


def experiment_of(config: MixerConfig, probe: Probe, learning_rate: float) -> Experiment:
    parity = isinstance(probe.task, Parity)
    model = Model(
        d_model=WIDTH,
        pattern=("mixer",) if parity else ("base_conv", "mixer"),
        repeat=2,
        mixers={"mixer": config},
        layers="unroll",
        **({} if parity else {"mlp": None}),
    )
    return Experiment(
        model=model,
        data=Data(source="task", task=probe.task, sequence=probe.length, batch=probe.batch),
        optimizer=Optimizer(learning_rate=learning_rate, warmup=50),
        train=Train(steps=probe.steps, tensorboard=False, log_every=100),
        checkpoint=Checkpoint(every=probe.steps),
    )


def measure(config: MixerConfig, probe: Probe, learning_rate: float) -> dict:
    experiment = experiment_of(config, probe, learning_rate)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(experiment, Path(folder) / "run")
        run = load_run(Path(folder) / "run")
    seconds, corpus = time.perf_counter() - begin, open_data(experiment.data, "test")
    accuracy = {
        str(n): evaluate_task(run.parts, corpus, length=n, rows=512)["accuracy"]
        for n in probe.lengths
    }
    cost = describe(experiment, probe.task.vocab_size)
    return {
        "accuracy": accuracy,
        "learning_rate": learning_rate,
        "steps": probe.steps,
        "params": cost["params"],
        "state_bytes": cost["state_bytes_per_sequence"],
        "train_seconds": round(seconds, 1),
    }


def read() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def table(results: dict) -> str:
    """Best of the learning rates tried, by the accuracy at the length of training."""
    columns = [(name, str(n)) for name, probe in PROBES.items() for n in probe.lengths]
    lines = ["| mixer | " + " | ".join(f"{name} at {n}" for name, n in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for variant in VARIANTS:
        shown = []
        for name, n in columns:
            tries, first = results.get(variant, {}).get(name, []), str(PROBES[name].length)
            best = max(tries, key=lambda found: found["accuracy"][first], default=None)
            shown.append(f"{best['accuracy'][n]:.3f}" if best else "")
        lines.append(f"| {variant} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--probe", nargs="+", default=list(PROBES), choices=list(PROBES))
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    for name in args.probe:
        for variant in args.only:
            tries = read().get(variant, {}).get(name, [])
            if any(found["learning_rate"] == args.learning_rate for found in tries):
                continue
            found = measure(VARIANTS[variant], PROBES[name], args.learning_rate)
            results = read()
            results.setdefault(variant, {}).setdefault(name, []).append(found)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(variant, name, found, flush=True)
    print(table(read()))


if __name__ == "__main__":
    main()
