"""What each memory recalls from beyond its segment: python experiments/memory_modules/recall.py

Short rows of symbols, of which two layers of attention alone see less than half:

    needle  one of two keys and its value (of four) in noise; the last symbol asks for the value
    mqar    three keys and their values, then each key again at some distance, mostly a short one;
            convolutions before the layers, as is usual with this task
    latest  one key that is given three values, then the key again: the last value counts

Scored on fresh rows in which mqar and latest ask at the end, far from the answer. Trains what
`recall.json` beside this file lacks and adds it there; prints the table. `--only NAME ...` for some
memories, `--tasks NAME ...` for some tasks, `--seeds N` for other numbers of seeds; `--times N`, N
times as many steps, `--learning-rate`, another than 5e-3, and `--untied`, an output matrix beside
the embedding, make columns of their own.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from models import make_models, with_convolutions

from memjax.data import Data, open_data
from memjax.data.tasks import MQAR, Needle, Task
from memjax.evals.run import load_run
from memjax.evals.tasks import evaluate_task
from memjax.experiment import Experiment
from memjax.platform import enable_compilation_cache, restart_with_fast_allocator
from memjax.training.config import Optimizer, Train
from memjax.training.loop import train

RESULTS = Path(__file__).parent / "recall.json"


class Recall(NamedTuple):
    """train: what is trained on. test: what is scored. chance: of a guess among all values.

    convolutions: whether layers have one before them, see `with_convolutions`.
    """

    train: Task
    test: Task
    segment: int
    length: int
    batch: int
    steps: int
    chance: float
    convolutions: bool = False


def mqar(pairs: int, writes: int, power: float, vocab: int = 8) -> MQAR:
    """power: below 1, questions mostly follow soon; far above, they come at the end."""
    return MQAR(pairs=pairs, vocab=vocab, writes=writes, power=power)


NEEDLE = Needle(keys=2, values=4, noise=2)
TASKS = {
    "needle": Recall(NEEDLE, NEEDLE, 16, 64, 32, 300, 1 / 4),
    "mqar": Recall(mqar(3, 1, 0.5, 32), mqar(3, 1, 8.0, 32), 8, 32, 64, 600, 1 / 16, True),
    "latest": Recall(mqar(1, 3, 0.5), mqar(1, 3, 8.0), 8, 32, 64, 300, 1 / 4),
}
NAMES = list(make_models(16))
LEARNING_RATE = 5e-3


def recall(name: str, task: Recall, seed: int, learning_rate: float, tied: bool) -> float:
    model = dataclasses.replace(make_models(task.segment)[name], tied=tied)
    data = Data(source="task", task=task.train, sequence=task.length, batch=task.batch, seed=seed)
    experiment = Experiment(
        model=with_convolutions(model) if task.convolutions else model,
        data=data,
        optimizer=Optimizer(learning_rate=learning_rate, warmup=50, weight_decay=0.0),
        train=Train(steps=task.steps, seed=seed, tensorboard=False, log_every=100),
    )
    with tempfile.TemporaryDirectory() as folder:
        train(experiment, Path(folder) / "run")
        run = load_run(Path(folder) / "run")
    corpus = open_data(dataclasses.replace(data, task=task.test), "test")
    return evaluate_task(run.parts, corpus, length=task.length, rows=512)["accuracy"]


def read_results() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def table(results: dict) -> str:
    longer = sorted({column for found in results.values() for column in found} - set(TASKS))
    columns = [*TASKS, *longer]
    lines = ["| memory | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    chances = [f"{TASKS[column.partition(',')[0]].chance:.2f}" for column in columns]
    lines.append("| chance | " + " | ".join(chances) + " |")
    for name in NAMES:
        found = results.get(name, {})
        cells = []
        for task in columns:
            values = list(found.get(task, {}).values())
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--untied", action="store_true")
    arguments = parser.parse_args()
    rate, tied = arguments.learning_rate, not arguments.untied
    restart_with_fast_allocator()  # as the command line does
    enable_compilation_cache()
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            steps = arguments.times * TASKS[task].steps
            column = task if arguments.times == 1 else f"{task}, {steps} steps"
            column += "" if rate == LEARNING_RATE else f", rate {rate}"
            column += ", untied" if arguments.untied else ""
            for name in arguments.only:
                if str(seed) not in read_results().get(name, {}).get(column, {}):
                    accuracy = recall(name, TASKS[task]._replace(steps=steps), seed, rate, tied)
                    results = read_results()  # others may have added to it
                    results.setdefault(name, {}).setdefault(column, {})[str(seed)] = accuracy
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    print(name, column, seed, accuracy, flush=True)
    print(table(read_results()))


if __name__ == "__main__":
    main()
