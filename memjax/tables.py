"""Results of commands as text for people; `--json` prints them for programs."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
Part = Table | str
"""What is printed: a table, or a line beside one."""
SHOWN_ROWS = 40
WIDE = 1000
"""Columns of a pipe or a file: whoever reads it wants names whole."""


def number(value: Any) -> str:
    """A number as people write it: 1,234 or 0.1234 or 12.3."""
    if isinstance(value, bool) or value is None:
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def pairs(title: str, values: Row) -> Table:
    """One name and value a line."""
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, number(value))
    return table


def rows(title: str, values: Sequence[Row]) -> Table:
    """One column a name, one line a row."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    names = list(dict.fromkeys(name for row in values for name in row))
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in values)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in values:
        table.add_row(*(number(row.get(name)) for name in names))
    return table


def _flat(result: Row) -> dict[str, Any]:
    return {k: v for k, v in result.items() if not isinstance(v, dict | list)}


def _describe(result: Row) -> list[Table]:
    head = {**_flat(result)}
    head["state_bytes_per_sequence"] = size(head["state_bytes_per_sequence"])
    memory = dict(result["memory_bytes"])
    devices = memory.pop("devices")
    where = "Memory" if devices == 1 else f"Memory of each of {devices} devices"
    tables = [
        pairs("Model", head),
        pairs("Parameters", result["parameters"]),
        rows("Layers, for one token and one sequence", _layers(result["layers"])),
        pairs(f"{where}, predicted", {_part(name): size(memory[name]) for name in memory}),
    ]
    return tables + (_mesh(result["mesh"]) if "mesh" in result else [])


def _part(name: str) -> str:
    """Rows behind that of `temporary` are parts of it."""
    return f"  of it {name}" if name in ("gradients", "saved_activations") else name


def _mesh(result: Row) -> list[Table]:
    """The step as compiled for a mesh."""
    names = ("argument_bytes", "temporary_bytes")
    sent = [
        {
            "over": row["axes"],
            "kind": row["kind"],
            "a step": row["count"],
            "sent": size(row["bytes"]),
        }
        for row in result["collectives"]
    ]
    return [
        pairs("Devices", result["devices"]),
        pairs("A device, as compiled", {name: size(result[name]) for name in names}),
        rows("Collectives of a step, and what a device sends in them", sent),
    ]


def _layers(layers: Sequence[Row]) -> Sequence[Row]:
    """A row for each stretch of layers that are alike."""
    table: list[dict[str, Any]] = []
    for layer in layers:
        name, kind = layer["mixer"], layer["kind"]
        alike = {
            "mixer": name if name == kind else f"{name} ({kind})",
            "state": size(layer["state_bytes"]),
            "FLOPs": layer["flops_per_token"],
            "of recurrence": layer["recurrence_flops"],
        }
        if "memory_state_bytes" in layer:
            alike["memory"] = size(layer["memory_state_bytes"])
            alike["its FLOPs"] = layer["memory_flops_per_token"]
        if table and alike.items() <= table[-1].items():
            table[-1]["layer"] = f"{table[-1]['layer'].partition('-')[0]}-{layer['layer']}"
        else:
            table.append({"layer": str(layer["layer"]), **alike})
    return table


def _bench(result: Row) -> list[Table]:
    head = _flat(result)
    for name in ("peak_bytes", "temporary_bytes", "state_bytes_per_sequence"):
        head[name] = size(head[name])
    tables = [pairs("Bench", head)]
    return tables + [rows(k, v) for k, v in result.items() if isinstance(v, list)]


def _data(result: Row) -> list[Table]:
    """The source, and a row a split; digests and paths of the cache are for programs."""
    head = pairs("Data", _flat(result))
    if "splits" not in result:
        return [head, pairs("Task", result["task"])]
    splits = [{"split": name, **_counts(split)} for name, split in result["splits"].items()]
    return [head, rows("Splits", splits)]


def _counts(split: Row) -> Row:
    return {key: value for key, value in split.items() if not isinstance(value, str)}


def _eval(result: Row) -> list[Part]:
    tables: list[Part] = [pairs("Evaluation", _flat(result))]
    tables += [pairs(k, v) for k, v in result.items() if isinstance(v, dict)]
    return tables + [f"note: {note}" for note in result.get("notes", [])]


def short(value: float | None) -> str:
    """A count with a letter: 1.2M, 3.4G; rounded to three figures."""
    if value is None:
        return "-"
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return f"{value:.3g}"


def hours(value: float | None) -> str:
    """A time for people: 12 s, 34 min, 5.6 h."""
    if value is None:
        return "-"
    if value < 1 / 60:
        return f"{value * 3600:.0f} s"
    return f"{value * 60:.0f} min" if value < 1 else f"{value:.1f} h"


def changed(values: Row) -> str:
    """old -> new of each field; the last part of its path stands for it."""
    pairs = ((key.rpartition(".")[2], old, new) for key, (old, new) in values.items())
    return ", ".join(f"{name} {number(old)} -> {number(new)}" for name, old, new in pairs)


def _sweep(result: Row) -> list[Part]:
    if "rows" not in result:
        return _planned(result)
    table = []
    for row in result["rows"][:SHOWN_ROWS]:
        cells = {"point": row["point"], "state": row["state"], "step": row["step"]}
        for name, key in (("loss", "loss"), ("valid", "eval_loss")):
            if any(other[key] is not None for other in result["rows"]):
                cells[name] = row[key]
        for name, measures in row["evaluations"].items():
            for measure, value in measures.items():
                shown = {"word_perplexity": "word ppl"}.get(measure, measure)
                cells[f"{shown} {name}".rstrip()] = value
        table.append({**cells, "params": short(row["params"])})
    states = ("done", "running", "waiting", "stopped", "ended_early", "failed")
    counts = [f"{result[name]} {name.replace('_', ' ')}" for name in states if result[name]]
    title = f"{result['workdir']}: {', '.join(counts) or 'nothing'} of {result['points']}"
    more = len(result["rows"]) - SHOWN_ROWS
    if more > 0:
        title += f" (the best {SHOWN_ROWS}; memjax report {result['workdir']} shows all)"
    tables: list[Part] = [title, rows("", table)]
    failures = [row for row in result["rows"] if row["error"]]
    if failures:
        failed = [{"point": row["point"], "error": row["error"]} for row in failures[:SHOWN_ROWS]]
        tables.append(rows("Failed", failed))
    return tables


def _planned(result: Row) -> list[Part]:
    points = result["points"]
    same = len({row["tokens"] for row in points}) == 1
    table = []
    for row in points:
        cells = {"point": row["point"]}
        if any(other["state"] != "waiting" for other in points):
            cells["state"] = row["state"]
        cells |= {"params": short(row["params"]), "memory": size(row["state_bytes"])}
        cells["FLOPs/token"] = short(row["flops_per_token"])
        if not same:
            cells["tokens"] = short(row["tokens"])
        cells["FLOPs"] = short(row["flops"])
        if result["flops_per_s"] is not None:
            cells["time"] = hours(row["hours"])
        table.append(cells)
    total = f"{len(points)} points, {short(result['flops'])}FLOPs"
    if same:
        total += f", {short(points[0]['tokens'])} tokens each"
    if result["flops_per_s"] is not None:
        speed = f"{short(result['flops_per_s'])}FLOP/s ({result['basis']})"
        total += f", {hours(result['hours'])} one after another at {speed}"
    alike: dict[str, list[str]] = {}
    for row in points:
        if row["matched"]:
            alike.setdefault(changed(row["matched"]), []).append(row["point"])
    lines = [
        f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {change}"
        for change, names in alike.items()
    ]
    return [total, rows("", table), *(["matched:", *lines] if lines else [])]


def _match(result: Row) -> list[Table]:
    values = {key: result[key] for key in ("by", "target", "before", "after")}
    values["difference"] = f"{result['difference']:+.2%}"
    values["changed"] = changed(result["changed"]) or "nothing: they agree already"
    if result["arguments"]:
        values["arguments"] = " ".join(result["arguments"])
    if result["saved"]:
        values["saved"] = result["saved"]
    return [pairs("Match", values)]


BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None]) -> str:
    """A character a value, from the smallest to the largest; a blank for None."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        " " if value is None else BLOCKS[round((value - low) * scale)] for value in values
    )


def _inspect(result: Row) -> list[Part]:
    """The loss along the text, then of each memory what it wrote, kept and read."""

    def line(memory: str, measure: str, values: Sequence[float | None]) -> Row:
        known = [value for value in values if value is not None]
        ends = {"from": min(known), "to": max(known)}
        return {"memory": memory, "measure": measure, "along the text": sparkline(values), **ends}

    lines = [line("", "loss", result["nll"])]
    for memory in result["memories"]:
        name = memory["name"]
        for measure, values in memory.items():
            if isinstance(values, list) and any(value is not None for value in values):
                lines.append(line(name, measure, values))
                name = ""
    for note in result["notes"]:
        if all(value is None for value in note["values"]):
            continue
        lines.append(line(f"layer {note['layer']}", note["name"], note["values"]))
    head = f"{result['text']} at step {result['step']}: {number(result['tokens'])} tokens, "
    head += f"{result['stride']} a column"
    return [head, rows("", lines), f"figure    {result['figure']}"]


_TABLES: dict[str, Callable[[Any], Sequence[Part]]] = {
    "bench": _bench,
    "data": _data,
    "describe": _describe,
    "eval": _eval,
    "inspect": _inspect,
    "list": lambda result: [rows("Runs", result)],
    "match": _match,
    "report": lambda result: [pairs("Report", _flat(result))],
    "sweep": _sweep,
}


def show(command: str, result: Any) -> None:
    """Print the result of a command; training and generation have printed theirs already."""
    if command in _TABLES:
        known = sys.stdout.isatty() or "COLUMNS" in os.environ
        console = Console(width=None if known else WIDE)
        for table in _TABLES[command](result):
            console.print(table, markup=False, highlight=False, soft_wrap=isinstance(table, str))
            if not isinstance(table, str):
                console.print()
