"""What each memory recalls from beyond its segment: python experiments/memory_modules/recall.py

Rows of 128 symbols, of which attention alone sees 32: a needle anywhere, MQAR with four pairs, and
MQAR in which each key is written twice and the latest value wins. Accuracy on fresh rows of the
same length, three seeds. Trains what `recall.json` beside this file lacks and adds it there; prints
the table. `--only NAME [NAME ...]` for some memories, `--seeds N` for fewer seeds.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from models import MODELS

from memjax.data import Data, open_data
from memjax.data.tasks import MQAR, Needle
from memjax.evals.run import load_run
from memjax.evals.tasks import evaluate_task
from memjax.experiment import Experiment
from memjax.training.config import Optimizer, Train
from memjax.training.loop import train

RESULTS = Path(__file__).parent / "recall.json"
LENGTH, BATCH, STEPS = 128, 32, 400
TASKS = {
    "needle": Needle(keys=8, values=8, noise=16),
    "mqar": MQAR(pairs=4, vocab=32, power=1.0),
    "latest": MQAR(pairs=4, vocab=32, power=1.0, writes=2),
}


def recall(name: str, task: str, seed: int) -> float:
    data = Data(source="task", task=TASKS[task], sequence=LENGTH, batch=BATCH, seed=seed)
    experiment = Experiment(
        model=MODELS[name],
        data=data,
        optimizer=Optimizer(learning_rate=3e-3, warmup=50),
        train=Train(steps=STEPS, seed=seed, tensorboard=False, log_every=100),
    )
    with tempfile.TemporaryDirectory() as folder:
        train(experiment, Path(folder) / "run")
        run = load_run(Path(folder) / "run")
    corpus = open_data(data, "test")
    return evaluate_task(run.parts, corpus, length=LENGTH, rows=512)["accuracy"]


def table(results: dict) -> str:
    lines = ["| memory | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for name, found in results.items():
        means = [statistics.mean(found[t].values()) if t in found else None for t in TASKS]
        cells = ["" if mean is None else f"{mean:.2f}" for mean in means]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            for task in TASKS:
                found = results.setdefault(name, {}).setdefault(task, {})
                if str(seed) not in found:
                    found[str(seed)] = recall(name, task, seed)
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    print(name, task, seed, found[str(seed)], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
