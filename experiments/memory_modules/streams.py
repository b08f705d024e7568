"""Word perplexity of the runs of a sweep with their state carried, zeroed and foreign.

    python experiments/memory_modules/streams.py RUNS BOOKS [--tokens N]

Reads the first N tokens of every test book, side by side, in segments as in training. carried: each
book goes on with its own state; zeroed: with the initial state; foreign: with that of the book
beside it. All three are scored on the same tokens. Adds to `streams.json` beside this file, and
prints the table.
"""

import argparse
import dataclasses
import functools
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from memjax.data import open_corpus
from memjax.evals.perplexity import token_nll
from memjax.evals.run import Run, load_run
from memjax.model import LANE_AXIS, merge

RESULTS = Path(__file__).parent / "streams.json"


def measure(run: Run, books: str, count: int) -> dict[str, float]:
    data = dataclasses.replace(run.experiment.data, path=books)
    corpus = open_corpus(data, "test", tokenizer=run.tokenizer)
    size, (definition, params) = data.sequence, run.parts
    count = count // size * size
    rows = np.stack([corpus.tokens[s : s + count + 1] for s in corpus.starts[:-1]]).astype(np.int32)
    texts = [run.tokenizer.decode(row[1:]) for row in rows]
    words = sum(len(text.split()) for text in texts)

    @functools.partial(jax.jit, static_argnames="carry")
    def read(state, tokens_BT, targets_BT, carry: str):
        lm = merge(definition, params)
        if carry == "zeroed":
            state = lm.init_state(len(rows))
        if carry == "foreign":
            state = jax.tree.map(lambda a: jnp.roll(a, 1, LANE_AXIS), state)
        no_reset_BT = jnp.zeros(tokens_BT.shape, bool)
        state, hidden_BTD, _ = lm.read(state, tokens_BT, no_reset_BT)
        return state, token_nll(lm, hidden_BTD, targets_BT).sum()

    nats = dict.fromkeys(("carried", "zeroed", "foreign"), 0.0)
    state = merge(definition, params).init_state(len(rows))
    for at in range(0, count, size):
        text = rows[:, at : at + size], rows[:, at + 1 : at + size + 1]
        for carry in ("foreign", "zeroed", "carried"):
            after, nll = read(state, *text, carry=carry)
            nats[carry] += float(nll)
        state = after
    return {carry: float(np.exp(total / words)) for carry, total in nats.items()}


def table(results: dict) -> str:
    lines = ["| memory | carried | zeroed | foreign |", "|---|---|---|---|"]
    by_memory: dict[str, list[dict]] = {}
    for name, found in results.items():
        by_memory.setdefault(name.partition(",")[0].removeprefix("memory="), []).append(found)
    for memory, found in by_memory.items():
        cells = []
        for carry in ("carried", "zeroed", "foreign"):
            values = [seed[carry] for seed in found]
            spread = f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.0f}{spread}")
        lines.append(f"| {memory} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="the folder of the sweep")
    parser.add_argument("books", help="a folder of books in the layout of PG-19")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for folder in sorted((arguments.runs / "runs").iterdir()):
        if folder.name not in results and (folder / "checkpoints").exists():
            results[folder.name] = measure(load_run(folder), arguments.books, arguments.tokens)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(folder.name, results[folder.name], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
