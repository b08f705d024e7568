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
from memjax.describe import state_bytes
from memjax.evals.perplexity import token_nll
from memjax.evals.run import Run, load_run
from memjax.model import LANE_AXIS, merge
from memjax.platform import enable_compilation_cache

RESULTS = Path(__file__).parent / "streams.json"
CARRIES = ("carried", "zeroed", "foreign")


@functools.partial(jax.jit, static_argnums=0)
def read(definition, params, state, tokens_BT, targets_BT):
    """The state carried on, and nats of the segment from each of the three states."""
    lm, lanes = merge(definition, params), tokens_BT.shape[0]
    foreign = jax.tree.map(lambda a: jnp.roll(a, 1, LANE_AXIS), state)
    states = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves, LANE_AXIS), state, lm.init_state(lanes), foreign
    )
    tokens, targets = (jnp.tile(a, (len(CARRIES), 1)) for a in (tokens_BT, targets_BT))
    reading = lm.read(states, tokens, jnp.zeros(tokens.shape, bool))
    nats = token_nll(lm, reading.hidden_BTD, targets).reshape(len(CARRIES), -1).sum(1)
    own = jax.tree.map(lambda a: jax.lax.slice_in_dim(a, 0, lanes, axis=LANE_AXIS), reading.state)
    return own, nats


def measure(run: Run, books: str, count: int) -> dict[str, float]:
    data = dataclasses.replace(run.experiment.data, path=books)
    corpus = open_corpus(data, "test", tokenizer=run.tokenizer)
    size, (definition, params) = data.sequence, run.parts
    count = count // size * size
    rows = np.stack([corpus.tokens[s : s + count + 1] for s in corpus.starts[:-1]]).astype(np.int32)
    words = sum(len(run.tokenizer.decode(row[1:]).split()) for row in rows)
    state, total = merge(definition, params).init_state(len(rows)), np.zeros(len(CARRIES))
    for at in range(0, count, size):
        text = rows[:, at : at + size], rows[:, at + 1 : at + size + 1]
        state, nats = read(definition, params, state, *text)
        total += np.asarray(nats, np.float64)
    found = dict(zip(CARRIES, map(float, np.exp(total / words))))
    return {**found, "state_bytes": state_bytes(run.experiment.model, run.tokenizer.vocab_size)}


def change(found: dict[str, dict], carry: str, others: dict[str, dict]) -> str:
    """Of perplexities over those with the state carried, seed by seed, in per cent."""
    changes = [100 * (found[seed][carry] / others[seed]["carried"] - 1) for seed in found]
    spread = f" ± {statistics.stdev(changes):.1f}" if len(changes) > 1 else ""
    return f"{statistics.mean(changes):+.1f}{spread} %"


def table(results: dict[str, dict]) -> str:
    """Means and standard deviations over seeds."""
    heads = ("memory", "carried", "against none", "zeroed", "foreign", "state, KiB")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    seeds: dict[str, dict[str, dict]] = {}
    for name, found in results.items():
        point = dict(part.split("=") for part in name.split(","))
        seeds.setdefault(point["memory"], {})[point["seed"]] = found
    for memory, found in seeds.items():
        carried = [values["carried"] for values in found.values()]
        spread = f" ± {statistics.stdev(carried):.0f}" if len(carried) > 1 else ""
        cells = [
            f"{statistics.mean(carried):.0f}{spread}",
            change(found, "carried", seeds["none"]),
            change(found, "zeroed", found),
            change(found, "foreign", found),
            f"{next(iter(found.values()))['state_bytes'] / 1024:.0f}",
        ]
        lines.append(f"| {memory} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="the folder of the sweep")
    parser.add_argument("books", help="a folder of books in the layout of PG-19")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    enable_compilation_cache()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for folder in sorted((arguments.runs / "runs").iterdir()):
        if folder.name in results or not any((folder / "checkpoints").iterdir()):
            continue
        run = load_run(folder)
        if run.step == run.experiment.train.steps:  # others go on, or did not come to their end
            results[folder.name] = measure(run, arguments.books, arguments.tokens)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(folder.name, results[folder.name], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
