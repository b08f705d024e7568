"""The evaluations of a sweep side by side: python experiments/evaluations.py runs/NAME OUT.json

Prints a table: word perplexity of each setting by seed, its geometric mean over seeds, and bits a
byte. Writes every evaluation, with the axes of its point, to OUT.json.
"""

import json
import math
import statistics
import sys
from pathlib import Path

KEPT = ("split", "documents", "tokens", "words", "carry", "nll_nats", "word_perplexity")
KEPT += ("token_perplexity", "bits_per_byte")


def read(sweep: Path) -> list[dict]:
    """A row an evaluation of a finished point."""
    found = []
    for point in json.loads((sweep / "sweep.json").read_text())["points"]:
        for path in sorted((sweep / "runs" / point["name"] / "eval").glob("*.json")):
            values = json.loads(path.read_text())
            found.append({"point": point["labels"], **{key: values[key] for key in KEPT}})
    return found


def main(sweep: str, out: str) -> None:
    """Print the table, write the file."""
    rows = read(Path(sweep))
    axes = [key for key in rows[0]["point"] if key != "seed"]
    seeds = sorted({row["point"]["seed"] for row in rows}, key=int)
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        read_with = "carried" if row["carry"] else "zeroed"
        setting = (*(row["point"][axis] for axis in axes), read_with)
        groups.setdefault(setting, []).append(row)
    head = [*axes, "evaluated", *(f"seed {seed}" for seed in seeds), "mean", "bits a byte"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for setting, members in groups.items():
        by_seed = {row["point"]["seed"]: row["word_perplexity"] for row in members}
        mean = math.exp(statistics.fmean(map(math.log, by_seed.values())))
        bits = statistics.fmean(row["bits_per_byte"] for row in members)
        cells = [f"{by_seed[s]:,.0f}" if s in by_seed else "" for s in seeds]
        print(f"| {' | '.join([*setting, *cells, f'{mean:,.0f}', f'{bits:.3f}'])} |")
    Path(out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
