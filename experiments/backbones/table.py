"""The losses side by side: python experiments/backbones/table.py runs/backbones

Prints the table of finished points and writes losses.json and loss.png beside this file; what
losses.json holds of other points stays. Train loss is the mean of the last 50 steps' records,
held-out loss that of 100,000 bytes of the validation split, read in order with the memory carried.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from memjax.config import build
from memjax.describe import describe
from memjax.experiment import Experiment

BYTES = 257
LAST, SMOOTH = 5, 3  # records, one every ten steps
COLOURS = {
    "attention": "black",
    "linear memory": "tab:blue",
    "delta rule": "tab:green",
    "state space": "tab:orange",
    "test-time training": "tab:red",
    "hybrid": "tab:purple",
    "control": "tab:gray",
}
FAMILIES = {
    "attention": ("attention", "attention_window", "all_attention", "compressive", "landmark")
    + ("memorizing", "transformer_xl"),
    "delta rule": ("deltanet", "gated_deltanet", "mom"),
    "state space": ("mamba", "mamba2", "rg_lru"),
    "hybrid": ("based", "griffin", "samba", "jamba", "mamba2_attention", "gated_deltanet_h1")
    + ("gated_deltanet_h2", "titans_mac", "titans_mag", "titans_mal"),
    "test-time training": ("ttt_linear", "ttt_mlp", "titans_lmm", "miras", "moneta", "yaad")
    + ("memora",),
    "control": ("lstm", "base_conv"),
}


def family(name: str) -> str:
    return next((f for f, names in FAMILIES.items() if name in names), "linear memory")


def read(sweep: Path) -> dict:
    """What is known of every finished point."""
    points = {}
    for metrics in sorted((sweep / "runs").glob("*/metrics.jsonl")):
        run = metrics.parent
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        experiment = build(Experiment, json.loads((run / "config.json").read_text()))
        if not records or records[-1]["step"] < experiment.train.steps:
            continue
        cost = describe(experiment, BYTES)
        points[run.name.partition("=")[2]] = {
            "params": cost["params"],
            "state_bytes": cost["state_bytes_per_sequence"],
            "train_loss": float(np.mean([record["loss"] for record in records[-LAST:]])),
            "held_out_loss": records[-1]["eval_loss"],
            "steps": [record["step"] for record in records],
            "losses": [round(record["loss"], 4) for record in records],
        }
    return points


def table(points: dict) -> str:
    lines = ["| backbone | family | parameters | state, KiB | train loss | held-out loss |"]
    lines.append("|---|---|---|---|---|---|")
    for name, point in points.items():
        cells = (name, family(name), f"{point['params']:,}", f"{point['state_bytes'] / 1024:.1f}")
        losses = (f"{point['train_loss']:.3f}", f"{point['held_out_loss']:.3f}")
        lines.append("| " + " | ".join((*cells, *losses)) + " |")
    return "\n".join(lines)


def draw(points: dict, out: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6.5), layout="constrained")
    for name, point in points.items():
        smooth = np.convolve(point["losses"], np.ones(SMOOTH) / SMOOTH, "valid")
        left.plot(point["steps"][SMOOTH - 1 :], smooth, color=COLOURS[family(name)], lw=0.8)
    left.set(xlabel="step", ylabel="train loss, nats a byte", ylim=(1.6, 4))
    names = list(points)[::-1]
    held_out = [points[name]["held_out_loss"] for name in names]
    right.barh(names, held_out, color=[COLOURS[family(name)] for name in names])
    right.set(xlabel="held-out loss, nats a byte", xlim=(1.6, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=colour, lw=4) for colour in COLOURS.values()]
    left.legend(handles, COLOURS, frameon=False)
    figure.savefig(out, dpi=110)


def main() -> None:
    here = Path(__file__).parent
    known = (
        json.loads((here / "losses.json").read_text()) if (here / "losses.json").exists() else {}
    )
    points = known | read(Path(sys.argv[1]))
    points = dict(sorted(points.items(), key=lambda item: item[1]["held_out_loss"]))
    (here / "losses.json").write_text(json.dumps(points, indent=1) + "\n")
    draw(points, here / "loss.png")
    print(table(points))


if __name__ == "__main__":
    main()
