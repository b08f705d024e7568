"""Recall and state tracking of every backbone, small: python experiments/backbones/probes.py

Trains what `probes.json` beside this file lacks and adds it there, a line of progress each; prints
the table of what is there. `--only KIND [KIND ...]` for some kinds.

MQAR (arXiv:2312.04927): two blocks of (gated short convolution, mixer), no MLP, d = 64, so that
every mixer has the same local convolution; accuracy on fresh rows of the length trained on.
Parity: two blocks (mixer, SwiGLU), d = 64, trained on 32 bits, accuracy at 32 and at 256.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

from memjax.data import Data, open_data
from memjax.data.tasks import MQAR, Parity
from memjax.evals.run import load_run
from memjax.evals.tasks import evaluate_task
from memjax.experiment import Experiment
from memjax.mixers import MIXERS, Attention, DeltaNet, GatedDeltaNet
from memjax.model import Model
from memjax.training.config import Optimizer, Train
from memjax.training.loop import train

RESULTS = Path(__file__).parent / "probes.json"
WIDTH, STEPS, BATCH = 64, 1500, 64
TASKS = {
    "mqar_4": (MQAR(pairs=4, vocab=256), 64, (64,)),
    "mqar_32": (MQAR(pairs=32, vocab=256), 128, (128,)),
    "parity": (Parity(), 32, (32, 256)),
}
VARIANTS = {
    **{kind: config() for kind, (config, _) in MIXERS.items()},
    "attention, window 16": Attention(window=16),
    "deltanet, eigenvalues to -1": DeltaNet(negative_eigenvalues=True),
    "gated_deltanet, eigenvalues to -1": GatedDeltaNet(negative_eigenvalues=True),
}


def model_of(config, task: str) -> Model:
    if task == "parity":
        pattern, mlp = ("mixer",), {}
    else:
        pattern, mlp = ("base_conv", "mixer"), {"mlp": None}
    mixers = {"mixer": config}
    return Model(d_model=WIDTH, pattern=pattern, repeat=2, mixers=mixers, layers="unroll", **mlp)


def probe(config, name: str) -> dict:
    task, length, lengths = TASKS[name]
    data = Data(source="task", task=task, sequence=length, batch=BATCH)
    experiment = Experiment(
        model=model_of(config, name),
        data=data,
        optimizer=Optimizer(learning_rate=3e-3, warmup=100),
        train=Train(steps=STEPS, tensorboard=False, log_every=100),
    )
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(experiment, Path(folder) / "run")
        run = load_run(Path(folder) / "run")
    seconds, corpus = time.perf_counter() - begin, open_data(data, "test")
    accuracy = {
        str(n): evaluate_task(run.parts, corpus, length=n, rows=1024)["accuracy"] for n in lengths
    }
    return {"accuracy": accuracy, "train_seconds": round(seconds, 1)}


def table(results: dict) -> str:
    columns = [(task, str(n)) for task, (_, _, lengths) in TASKS.items() for n in lengths]
    lines = ["| mixer | " + " | ".join(f"{task} at {n}" for task, n in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, found in sorted(results.items()):
        cells = [found.get(task, {}).get("accuracy", {}).get(n) for task, n in columns]
        shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in parser.parse_args().only:
        config = VARIANTS[name]
        for task in TASKS:
            if task in results.get(name, {}):
                continue
            found = probe(config, task)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results.setdefault(name, {"config": dataclasses.asdict(config)})[task] = found
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True, default=str) + "\n")
            print(name, task, found, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
