"""Figures of a report: curves of losses, and losses against what runs cost."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter

from memjax.report.collect import Run
from memjax.sweeps.directory import DONE

HIGHLIGHTED = 8
SHOWN_AS_SVG = 40
POINTS = 300
SMOOTH_OVER = 10
GREY = "#b8bec6"
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e0b", "#6a4c93", "#00868b", "#a0522d", "#555555")
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


class Figure(NamedTuple):
    """A figure in the two forms it is used in. html: an element that needs no other file."""

    name: str
    caption: str
    png: bytes
    html: str


def draw_all(runs: Sequence[Run]) -> list[Figure]:
    """The figures for which the runs have data."""
    with matplotlib.rc_context(STYLE):
        figures = [
            _curves(runs, "loss", "Training loss"),
            _curves(runs, "eval_loss", "Validation loss"),
        ]
        figures += [
            _against(runs, "parameters", lambda run: run.params),
            _against(runs, "state bytes a sequence", lambda run: run.state_bytes),
            _against(runs, "tokens a second", lambda run: run.tokens_per_s),
        ]
    return [figure for figure in figures if figure is not None]


def _curves(runs: Sequence[Run], key: str, title: str) -> Figure | None:
    """A line a run; the best are coloured and named, the others grey."""
    curves = {run.name: run.curve(key) for run in runs}
    shown = [run for run in runs if curves[run.name]]
    if not shown:
        return None
    canvas = Canvas(figsize=(7.2, 3.9), layout="constrained")
    axes = canvas.add_subplot()
    best = {run.name: COLOURS[i] for i, run in enumerate(shown[:HIGHLIGHTED])}
    for run in reversed(shown):
        curve = np.array(curves[run.name])
        steps, values = _smooth(curve, _over(len(curve)) if key == "loss" else 1)
        marker = "o" if len(steps) == 1 or key == "eval_loss" and len(shown) <= SHOWN_AS_SVG else ""
        colour = best.get(run.name)
        axes.plot(
            steps,
            values,
            marker=marker,
            markersize=3,
            color=colour or GREY,
            linewidth=1.5 if colour else 0.6,
            alpha=1 if colour or len(shown) <= SHOWN_AS_SVG else 0.25,
            label=_clip(run.name) if colour else None,
        )
    _limit(axes, [v for run in shown for _, v in curves[run.name]])
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    handles, labels = axes.get_legend_handles_labels()  # drawn last to first; named first to last
    axes.legend(
        handles[::-1], labels[::-1], fontsize=7.5, loc="upper right", framealpha=0.85, edgecolor="w"
    )
    means = sorted({_over(len(curves[run.name])) for run in shown}) if key == "loss" else [1]
    caption = title
    if means[-1] > 1:
        caption += f", running mean over {'up to ' if len(means) > 1 else ''}{means[-1]} records"
    if len(shown) > HIGHLIGHTED:
        caption += f"; the best {HIGHLIGHTED} of {len(shown)} runs in colour"
    return _finish(canvas, f"curve-{key}", caption, len(shown) <= SHOWN_AS_SVG)


def _limit(axes: Any, values: list[float]) -> None:
    """Cut the top off when a few values are far above the others."""
    low, middle, high = np.percentile(values, [0, 90, 100])
    if high - low > 4 * (middle - low) > 0:
        axes.set_ylim(low - 0.05 * (middle - low), low + 2 * (middle - low))


def _against(runs: Sequence[Run], name: str, value: Callable[[Run], float | None]) -> Figure | None:
    """Final loss against a cost, if the cost differs between runs."""
    ended = [run for run in runs if run.state == DONE and np.isfinite(run.score)]
    points = [(x, run.score) for run in ended if (x := value(run))]
    if len({x for x, _ in points}) < 3 or max(points)[0] < 1.5 * min(points)[0]:
        return None
    canvas = Canvas(figsize=(7.2, 3.9), layout="constrained")
    axes = canvas.add_subplot()
    costs, losses = zip(*points)
    axes.scatter(costs, losses, s=14, color=COLOURS[0], alpha=0.7, linewidths=0)
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    if high > 8 * low:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(name)
    axes.set_ylabel("final loss, nats a token")
    slug = re.sub(r"\W+", "-", name)
    return _finish(canvas, f"loss-by-{slug}", f"Final loss by {name}", len(points) <= 300)


def _over(count: int) -> int:
    """Over how many of `count` records a training loss is averaged."""
    return min(SMOOTH_OVER, max(1, count // 4))


def _smooth(curve: np.ndarray, over: int) -> tuple[np.ndarray, np.ndarray]:
    """A running mean, thinned to what a figure can show."""
    steps, values = curve[:, 0], curve[:, 1]
    values = np.convolve(values, np.ones(over) / over, "valid")
    steps = steps[over - 1 :]
    keep = np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).astype(int))
    return steps[keep], values[keep]


def _clip(name: str, length: int = 44) -> str:
    return name if len(name) <= length else f"...{name[-length:]}"


def _finish(canvas: Canvas, name: str, caption: str, vector: bool) -> Figure:
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=150)
    if vector:
        text = io.StringIO()
        canvas.savefig(text, format="svg")
        svg = text.getvalue()
        html = svg[svg.index("<svg") :]
        html = re.sub(r"<metadata>.*?</metadata>", "", html, flags=re.DOTALL)
        html = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", html, count=1)
        html = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", html, count=1)
    else:
        data = base64.b64encode(png.getvalue()).decode()
        html = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return Figure(name, caption, png.getvalue(), html)
