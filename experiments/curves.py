"""Draw the loss of runs: python experiments/curves.py OUT.png RUN [RUN ...]

Training loss as a running mean over 10 records, validation loss as points, both in nats a token.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

MEAN_OVER = 10


def draw(out: str, runs: list[str]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for run in runs:
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = np.array([record["loss"] for record in records])
        window = min(MEAN_OVER, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        steps = [record["step"] for record in records][window - 1 :]
        (line,) = axes.plot(steps, smooth, label=f"{Path(run).name}, training")
        valid = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
        if valid:
            label = f"{Path(run).name}, validation"
            axes.plot(*zip(*valid), "o", color=line.get_color(), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    draw(sys.argv[1], sys.argv[2:])
