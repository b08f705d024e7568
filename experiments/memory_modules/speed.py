"""Does a step with a memory cost what its operations say?

    python experiments/memory_modules/speed.py

Two layers at d_model=256, every memory with its defaults in them, rows of 1,024 tokens. For each:
the training step over that of the layers with attention alone (measured), the operations a token
of `memjax describe` over theirs (predicted), and the first over the second. Steps of all models
alternate; medians. Writes `speed.json` beside this file and prints the table. `--only NAME ...`
for some memories, `--tokens N` for other rows.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from memjax.data import Data
from memjax.describe import training_flops
from memjax.experiment import Experiment
from memjax.memory import (
    ARMT,
    LM2,
    CompressiveMemory,
    InfiniMemory,
    LandmarkMemory,
    MemorizingMemory,
    MemoryPlus,
    Persistent,
    ProductKeys,
    RecurrentTokens,
    TransformerXLMemory,
)
from memjax.mixers import Attention, TitansMAC
from memjax.model import Model
from memjax.platform import restart_with_fast_allocator
from memjax.sharding import make_mesh
from memjax.training.config import Train
from memjax.training.step import make_trainer, put_batch

RESULTS = Path(__file__).parent / "speed.json"
WIDTH, VOCAB, SEGMENT = 256, 1024, 128
LOCAL, PLAIN = Attention(window=SEGMENT), Attention()
WITHIN = Attention(context=SEGMENT + 32)

BACKBONES = {"none": (LOCAL, None), "segments alone": (WITHIN, None)}
MODELS = BACKBONES | {
    "transformer_xl": (PLAIN, TransformerXLMemory()),
    "compressive": (PLAIN, CompressiveMemory()),
    "infini linear": (PLAIN, InfiniMemory(update="linear")),
    "infini delta": (PLAIN, InfiniMemory()),
    "landmark": (PLAIN, LandmarkMemory()),
    "memorizing": (PLAIN, MemorizingMemory(layers=("second",))),
    "recurrent_tokens": (WITHIN, RecurrentTokens()),
    "armt": (WITHIN, ARMT()),
    "lm2": (LOCAL, LM2()),
    "product_keys": (LOCAL, ProductKeys(at=(1,))),
    "memory_plus": (LOCAL, MemoryPlus(at=(1,))),
    "persistent": (LOCAL, Persistent()),
    "titans_mac": (TitansMAC(), None),
}


def experiment(name: str, tokens: int) -> Experiment:
    mixer, memory = MODELS[name]
    first = LOCAL if name == "memorizing" else mixer
    model = Model(
        d_model=WIDTH,
        pattern=("first", "second"),
        repeat=1,
        mixers={"first": first, "second": mixer},
        memory=memory,
    )
    data = Data(stream="documents", sequence=tokens, batch=2)
    return Experiment(model=model, data=data, train=Train(carry=True))


class Stepper:
    """Training steps of one model, timed one by one."""

    def __init__(self, name: str, tokens: int):
        config = experiment(name, tokens)
        mesh = make_mesh(config.mesh, config.data.batch)
        trainer = make_trainer(config, VOCAB, mesh)
        ids = np.random.default_rng(0).integers(0, VOCAB, (config.data.batch, tokens + 1))
        batch = {
            "tokens_BT": ids[:, :-1].astype(np.int32),
            "targets_BT": ids[:, 1:].astype(np.int32),
            "weight_BT": np.ones((len(ids), tokens), np.float32),
            "reset_BT": np.zeros((len(ids), tokens), bool),
        }
        self.batch, self.step = put_batch(batch, mesh), trainer.step
        self.state = trainer.init()
        self.flops = training_flops(config.model, VOCAB, tokens)
        self.times: list[float] = []

    def __call__(self) -> float:
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def table(results: dict) -> str:
    lines = ["| memory | measured | predicted | measured over predicted |", "|---|---|---|---|"]
    for name, found in results["ratios"].items():
        over = found["measured"] / found["predicted"]
        lines.append(
            f"| {name} | {found['measured']:.2f} | {found['predicted']:.2f} | {over:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    restart_with_fast_allocator()  # as the command line does
    names = list(dict.fromkeys(("none", *arguments.only)))
    steppers = {}
    for name in names:
        steppers[name] = Stepper(name, arguments.tokens)
        for _ in range(2):
            steppers[name]()
    for _ in range(arguments.repeats):
        for stepper in steppers.values():
            stepper.times.append(stepper())
    seconds = {name: statistics.median(stepper.times) for name, stepper in steppers.items()}
    ratios = {
        name: {
            "measured": seconds[name] / seconds["none"],
            "predicted": stepper.flops / steppers["none"].flops,
        }
        for name, stepper in steppers.items()
    }
    results = {
        "cores": len(os.sched_getaffinity(0)),
        "tokens": arguments.tokens,
        "seconds_of_none": seconds["none"],
        "ratios": ratios,
    }
    if set(names) == set(MODELS):
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
