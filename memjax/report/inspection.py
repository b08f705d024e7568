"""`memjax inspect`: what a run's memories wrote, kept and read along a text, drawn."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas

from memjax.config import ConfigError
from memjax.evals.generation import encode_prompt
from memjax.evals.inspection import MEASURES, Inspection, inspect
from memjax.evals.run import load_run
from memjax.report.figures import COLOURS, STYLE
from memjax.training.workdir import write_atomically

UNITS = {
    "norm": "norm of what is there",
    "written": "norm of what is written",
    "forget": "share forgotten",
    "read": "read, nats a token",
    "gain": "gain, nats a token",
    "rank": "effective rank",
}


def run_inspect(
    workdir: str | Path,
    text: str | Path,
    *,
    stride: int | None = None,
    tokens: int = 4096,
    step: int | None = None,
) -> dict[str, Any]:
    """Read the start of a text with a run and measure its memories (`memjax.evals.inspection`).

    text: a UTF-8 file, read as one document. stride: tokens between two measurements; None for 64
    of them. tokens: at most so many are read. Writes RUN/inspect/<text>-step<N>.json and .png and
    returns what is in the first, with the path of the second.
    Raises ConfigError, one line, for a text that cannot be read or is too short.
    """
    for name, value in (("stride", stride), ("tokens", tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value} must be at least 1")
    document = _read_text(Path(text))
    run = load_run(workdir, step)
    ids = encode_prompt(run.tokenizer, document)[: tokens + 1]
    if len(ids) < 2:
        raise ConfigError(f"--text={text}: holds no token; give a file with text")
    stride = stride if stride is not None else max(1, (len(ids) - 1) // 64)
    inspection = inspect(run.parts, run.experiment.model, ids, stride=stride)
    folder = Path(workdir) / "inspect"
    name = f"{Path(text).stem}-step{run.step}"
    result = {"text": str(text), "step": run.step, **to_dict(inspection)}
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(
            draw(inspection, f"{Path(text).name}, step {run.step}")
        )
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror})") from None
    result["figure"] = str(folder / f"{name}.png")
    write_atomically(folder / f"{name}.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def to_dict(inspection: Inspection) -> dict[str, Any]:
    """Plain data; null where there was nothing to measure."""
    stretches = inspection.nll.reshape(-1, inspection.stride).mean(1)

    def plain(values: np.ndarray) -> list[float | None]:
        return [float(value) if np.isfinite(value) else None for value in values]

    memories = [
        {
            "name": memory.name,
            "layer": memory.layer,
            "kind": memory.kind,
            **{measure: plain(inspection.measures[measure][i]) for measure in MEASURES},
        }
        for i, memory in enumerate(inspection.memories)
    ]
    notes = [
        {"layer": layer, "name": name, "values": plain(values)}
        for (layer, name), values in inspection.notes.items()
    ]
    return {
        "tokens": int(inspection.nll.size),
        "stride": inspection.stride,
        "loss": float(inspection.nll.mean()),
        "positions": [inspection.stride * (i + 1) for i in range(len(stretches))],
        "nll": plain(stretches),
        "memories": memories,
        "notes": notes,
    }


def draw(inspection: Inspection, title: str) -> bytes:
    """A PNG: the loss along the text, and for each measure a row a memory."""
    shown = [m for m in MEASURES if np.isfinite(inspection.measures[m]).any()]
    names = [memory.name for memory in inspection.memories]
    tall = max(0.8, 0.22 * len(names))
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(8, 1.6 + len(shown) * (tall + 0.35)), layout="constrained")
        ratios = [1.4, *[tall] * len(shown)]
        panels = canvas.subplots(len(shown) + 1, 1, squeeze=False, height_ratios=ratios)[:, 0]
        end = inspection.nll.size
        losses = inspection.nll.reshape(-1, inspection.stride).mean(1)
        middle = inspection.stride * (np.arange(len(losses)) + 0.5)
        panels[0].plot(middle, losses, color=COLOURS[0], linewidth=1.2)
        panels[0].set(xlim=(0, end), ylabel="loss, nats", title=title)
        for panel, measure in zip(panels[1:], shown):
            values = inspection.measures[measure]
            extent = (0.0, float(end), len(names) - 0.5, -0.5)
            image = panel.imshow(
                values, aspect="auto", interpolation="nearest", extent=extent, cmap="viridis"
            )
            panel.set_yticks(range(len(names)), names, fontsize=7)
            panel.set_title(UNITS[measure], fontsize=8, loc="left")
            panel.grid(False)
            canvas.colorbar(image, ax=panel, fraction=0.03, pad=0.01)
        panels[-1].set_xlabel("token")
        png = io.BytesIO()
        canvas.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--text={path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text={path}: not UTF-8 at byte {error.start}") from None
