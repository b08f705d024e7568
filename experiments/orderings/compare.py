"""Published orderings beside those of the tiny backbones: python experiments/orderings/compare.py

Reads ../backbones/losses.json, prints a table of pairs and draws orderings.png beside this file.
Published: perplexity on WikiText of models of 340 million parameters after 15 billion tokens, the
table of arXiv:2501.00663 in which all were trained alike.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PUBLISHED = {
    "retnet": 32.50,
    "attention": 31.52,
    "mamba": 30.83,
    "deltanet": 28.65,
    "ttt_linear": 27.44,
    "gated_deltanet": 27.01,
}


def main() -> None:
    found = json.loads((HERE.parent / "backbones" / "losses.json").read_text())
    loss = {kind: found[kind]["held_out_loss"] for kind in PUBLISHED if kind in found}
    print(
        "| published: better | than | ppl | here, nats a byte | same order |\n|---|---|---|---|---|"
    )
    for better, low in sorted(PUBLISHED.items(), key=lambda pair: pair[1]):
        for worse, high in sorted(PUBLISHED.items(), key=lambda pair: pair[1]):
            if low < high and better in loss and worse in loss:
                pair = f"{loss[better]:.3f}, {loss[worse]:.3f}"
                same = "yes" if loss[better] < loss[worse] else "no"
                print(f"| {better} | {worse} | {low}, {high} | {pair} | {same} |")
    figure, axes = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    for kind, value in loss.items():
        axes.plot(PUBLISHED[kind], value, "o", color="#1b6ca8")
        axes.annotate(
            kind, (PUBLISHED[kind], value), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    axes.set_xlabel("published perplexity, 340 M parameters, 15 G tokens")
    axes.set_ylabel("held-out loss here, nats a byte")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "orderings.png", dpi=120)


if __name__ == "__main__":
    main()
