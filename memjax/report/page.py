"""The page of a report: one HTML file, its style and its few lines of script inside."""

import datetime
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from memjax import __version__
from memjax.report.collect import Run, by_setting
from memjax.report.evaluations import Evaluated, tell_apart
from memjax.report.figures import Figure
from memjax.sweeps.directory import FAILED
from memjax.tables import hours as duration
from memjax.tables import number, size

HERE = Path(__file__).parent
MEASURES = {
    "loss": "loss",
    "eval_loss": "valid loss",
}
EVALUATED = {
    "word_perplexity": "word ppl",
    "bits_per_byte": "bits/byte",
    "accuracy": "accuracy",
}


class Cell:
    """What a cell shows, what it is sorted by, and its full value."""

    def __init__(self, value: Any, shown: str | None = None):
        self.value, self.shown = value, number(value) if shown is None else shown

    def html(self, numeric: bool) -> str:
        """The element; in a column of numbers one without a value is empty."""
        if not numeric:
            return f"<td>{escape(self.shown)}</td>"
        if self.value is None:
            return '<td class="n"></td>'
        value = repr(self.value)
        return f'<td class="n" data-v="{value}" title="{value}">{escape(self.shown)}</td>'


def render(title: str, runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    """The whole page."""
    parts = [
        _summary(runs),
        _settings_table(runs),
        _figures(figures),
        _runs_table(runs),
        _failures(runs),
    ]
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{(HERE / 'page.css').read_text()}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            *filter(None, parts),
            f"<footer>memjax {__version__}, {made}</footer>",
            f"</main><script>{(HERE / 'page.js').read_text()}</script></body></html>",
        ]
    )


def _summary(runs: Sequence[Run]) -> str:
    counts = Counter(run.state for run in runs)
    tokens = sum(run.last.get("tokens") or 0 for run in runs)
    seconds = sum(run.wall or 0 for run in runs)
    facts = [
        ("runs", number(len(runs))),
        *((state, number(count)) for state, count in counts.most_common()),
        ("tokens", number(tokens)),
        ("time, all together", duration(seconds / 3600)),
    ]
    spent = [(run.goodput, run.wall) for run in runs if run.goodput is not None and run.wall]
    if spent:
        useful = sum(good * wall for good, wall in spent)
        facts.append(("goodput", f"{useful / sum(wall for _, wall in spent):.0%}"))
    if runs[0].last:
        facts.append(("best loss", f"{runs[0].score:.4f} ({runs[0].name})"))
    shown = {k: f'<a href="#failures">{v}</a>' if k == FAILED else escape(v) for k, v in facts}
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in shown.items())
    return f"<dl>{items}</dl>"


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    items = "".join(
        f"<figure>{figure.html}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    )
    return f'<h2>Curves</h2><div class="figures">{items}</div>'


def _settings_table(runs: Sequence[Run]) -> str:
    """Mean and spread over seeds, if there are seeds."""
    groups, (common, names) = by_setting(runs), _evaluations(runs)
    if not groups:
        return ""
    rows = []
    for key, members in groups.items():
        row = {name: Cell(_number(value)) for name, value in key}
        row["seeds"] = Cell(len(members))
        for measure, shown in MEASURES.items():
            values = [v for run in members if (v := run.final(measure)) is not None]
            if values:
                row |= _spread(shown, values)
        for what, name in names.items():
            for measure, shown in EVALUATED.items():
                found = [run.evals.get(what, {}).get(measure) for run in members]
                values = [v for v in found if v is not None]
                if values:
                    row |= _spread(_column(name, shown), values, number)
        rows.append(row)
    return f"<h2>By setting, over seeds</h2>{_note(common)}{_table(rows)}"


def _evaluations(runs: Sequence[Run]) -> tuple[str, dict[Evaluated, str]]:
    return tell_apart(list(dict.fromkeys(what for run in runs for what in run.evals)))


def _note(common: str) -> str:
    """What holds for all columns of evaluations."""
    return f"<p>Evaluated: {escape(common)}</p>" if common else ""


def _column(name: str, measure: str) -> str:
    return f"{name}: {measure}" if name else measure


def _nats(value: float) -> str:
    return f"{value:.4f}"


def _spread(
    name: str, values: list[float], shown: Callable[[float], str] = _nats
) -> dict[str, Cell]:
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {name: Cell(mean, shown(mean)), f"± {name}": Cell(deviation)}


def _runs_table(runs: Sequence[Run]) -> str:
    common, names = _evaluations(runs)
    rows = [_row(run, names) for run in runs]
    return f"<h2>Runs</h2>{_note(common)}{_table(rows, search=len(runs) > 10)}"


def _row(run: Run, names: dict[Evaluated, str]) -> dict[str, Cell]:
    row = {"run": Cell(run.name), "state": Cell(run.state)}
    row |= {key: Cell(_number(value)) for key, value in run.settings.items()}
    row["step"] = Cell(run.last.get("step"))
    for measure, shown in MEASURES.items():
        value = run.final(measure)
        if value is not None:
            row[shown] = Cell(value, f"{value:.4f}")
    for what, name in names.items():
        for measure, shown in EVALUATED.items():
            if measure in run.evals.get(what, {}):
                row[_column(name, shown)] = Cell(run.evals[what][measure])
    row["params"] = Cell(run.params)
    if run.state_bytes is not None:
        row["state a sequence"] = Cell(run.state_bytes, size(run.state_bytes))
    rate, good = run.tokens_per_s, run.goodput
    row["tokens/s"] = Cell(rate, "-" if rate is None else f"{rate:,.0f}")
    row["goodput"] = Cell(good, "-" if good is None else f"{good:.0%}")
    seconds = run.wall
    row["time"] = Cell(seconds, "-" if seconds is None else duration(seconds / 3600))
    return row


def _number(value: Any) -> Any:
    """A label that is a number, as one, so that the column sorts."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _table(rows: Sequence[dict[str, Cell]], search: bool = False) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    filled = [c for c in columns if any(r.get(c) and r[c].value is not None for r in rows)]
    numeric = {c for c in filled if all(_is_number(r[c].value) for r in rows if c in r)}
    head = "".join(  # spans: browsers leave buttons out where a printed table repeats its head
        f"<th{' class=n' if c in numeric else ''}>"
        f"<span role=button tabindex=0>{escape(c)}</span></th>"
        for c in filled
    )
    empty = Cell(None)
    body = "".join(
        "<tr>" + "".join(row.get(c, empty).html(c in numeric) for c in filled) + "</tr>"
        for row in rows
    )
    tools = '<button class="copy">Copy as TSV</button>'
    if search:
        tools = '<input type="search" placeholder="filter rows" aria-label="filter rows">' + tools
    return (
        f'<div class="tools">{tools}</div><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _failures(runs: Sequence[Run]) -> str:
    failed = [run for run in runs if run.state == FAILED or run.error]
    if not failed:
        return ""
    items = []
    for run in failed:
        log = escape("\n".join(run.log)) if run.log else ""
        said = f"<b>{escape(run.name)}</b> {escape(run.error or 'no message')}"
        items.append(
            f"<details{' open' if len(failed) <= 5 else ''}><summary>{said}</summary>"
            f"{f'<pre>{log}</pre>' if log else ''}</details>"
        )
    return f"<h2 id=failures>Failures</h2>{''.join(items)}"
