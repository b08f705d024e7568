"""Reports: one HTML file that shows runs side by side.

make_report("runs/carry")      # runs/carry/report/report.html, and its figures as PNG
"""

from pathlib import Path
from typing import Any

from memjax.config import ConfigError
from memjax.report.collect import collect
from memjax.report.figures import draw_all
from memjax.report.page import render
from memjax.training.workdir import write_atomically


def make_report(folder: str, out: str | None = None, title: str | None = None) -> dict[str, Any]:
    """Write report.html and figures for the runs in `folder` into `out` (folder/report).

    Returns what was written. Raises ConfigError, one line, if there is nothing to report.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{folder}: no such folder; name a run, a sweep or a folder of runs")
    runs = collect(root)
    if not runs:
        raise ConfigError(f"{folder}: there is no run in it (a folder with config.json)")
    target = Path(out) if out is not None else root / "report"
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={target}: cannot be made ({error.strerror})") from None
    figures = draw_all(runs)
    for figure in figures:
        (target / f"{figure.name}.png").write_bytes(figure.png)
    page = target / "report.html"
    write_atomically(page, render(title or root.absolute().name, runs, figures))
    return {
        "report": str(page),
        "runs": len(runs),
        "figures": [str(target / f"{figure.name}.png") for figure in figures],
        "bytes": page.stat().st_size,
    }
