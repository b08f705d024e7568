"""Results of commands as text for people; `--json` prints them for programs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def number(value: Any) -> str:
    """A number as people write it: 1,234 or 0.1234 or 12.3."""
    if isinstance(value, bool) or value is None:
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
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
    table.add_column()
    for name, value in values.items():
        table.add_row(name, number(value))
    return table


def rows(title: str, values: Sequence[Row]) -> Table:
    """One column a name, one line a row."""
    table = Table(title=title, title_justify="left", box=None)
    names = list(dict.fromkeys(name for row in values for name in row))
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in values)
        table.add_column(name, justify="right" if numeric else "left")
    for row in values:
        table.add_row(*(number(row.get(name)) for name in names))
    return table


def _flat(result: Row) -> dict[str, Any]:
    return {k: v for k, v in result.items() if not isinstance(v, dict | list)}


def _describe(result: Row) -> list[Table]:
    layers = [{**layer, "state_bytes": size(layer["state_bytes"])} for layer in result["layers"]]
    head = {**_flat(result)}
    head["state_bytes_per_sequence"] = size(head["state_bytes_per_sequence"])
    memory = {name: size(value) for name, value in result["memory_bytes"].items()}
    return [
        pairs("Model", head),
        pairs("Parameters", result["parameters"]),
        rows("Layers", layers),
        pairs("Memory, without activations", memory),
    ]


def _bench(result: Row) -> list[Table]:
    head = _flat(result)
    for name in ("peak_bytes", "temporary_bytes", "state_bytes_per_sequence"):
        head[name] = size(head[name])
    tables = [pairs("Bench", head)]
    return tables + [rows(k, v) for k, v in result.items() if isinstance(v, list)]


def _data(result: Row) -> list[Table]:
    tables = [pairs("Data", _flat(result))]
    return tables + [pairs(k, v) for k, v in result.items() if isinstance(v, dict)]


def _eval(result: Row) -> list[Table]:
    tables = [pairs("Evaluation", _flat(result))]
    return tables + [pairs(k, v) for k, v in result.items() if isinstance(v, dict)]


_TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "bench": _bench,
    "data": _data,
    "describe": _describe,
    "eval": _eval,
    "list": lambda result: [rows("Runs", result)],
}


def show(command: str, result: Any) -> None:
    """Print the result of a command; training and generation have printed theirs already."""
    if command in _TABLES:
        console = Console()
        for table in _TABLES[command](result):
            console.print(table)
            console.print()
