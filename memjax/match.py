"""Match architectures before they are trained: solve a width until two configs cost the same.

What is compared is what `memjax describe` counts, by the same functions: parameters, bytes of
state a sequence, or training FLOPs a token.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from memjax.config import ConfigError, build, check, override, to_dict, to_json
from memjax.data import load_tokenizer
from memjax.describe import count_parameters, flops, state_bytes
from memjax.experiment import Experiment

By = Literal["params", "non_embedding", "state", "flops"]
UNITS = {
    "params": "parameters",
    "non_embedding": "parameters outside embeddings",
    "state": "bytes of state a sequence",
    "flops": "FLOPs a token",
}
STEPS = (128, 64, 32, 16, 8, 4, 2, 1)
MEMORY_SIZES = ("slots", "window", "context")
SPEED_ONLY = ("chunk", "conv", "unroll")
LARGEST = 1 << 24
UNSET = 64
"""Where the search for a size begins that the config leaves to its default, None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """Make configs agree in one quantity.

    by: parameters ("params"; "non_embedding" leaves out input and output tables), bytes of state a
        sequence, or training FLOPs a token.
    to: a number, or a config file FILE[:variant]; None is the first point of the sweep.
    change: fields to solve for, such as "model.d_model"; the first that gets within `tolerance`
        ends the search, and each later one starts where those before it ended. Empty: chosen here
        (d_model, then the ratio of the MLP; for state, a size of the memory).
    tolerance: largest relative difference.
    """

    by: By = "params"
    to: float | str | None = None
    change: tuple[str, ...] = ()
    tolerance: float = 0.01

    def __post_init__(self):
        check(self, "tolerance", 0 < self.tolerance < 1, "must be in (0, 1)")
        for field in self.change:
            inside = field.startswith("model.")
            check(self, "change", inside, f"must name fields of the model, and {field} is none")
        positive = not isinstance(self.to, int | float) or self.to > 0
        check(self, "to", positive, "must be greater than 0, a config file, or none")


class Matched(NamedTuple):
    """A config that meets the target, and what it took: path -> (old, new)."""

    experiment: Experiment
    changed: dict[str, tuple[Any, Any]]
    before: float
    value: float
    target: float


def quantity(experiment: Experiment, vocab_size: int, by: By) -> float:
    """What `describe` counts."""
    model = experiment.model
    if by == "state":
        return state_bytes(model, vocab_size)
    if by == "flops":
        return flops(model, vocab_size, experiment.data.sequence)["training"]
    counts = count_parameters(model, vocab_size)
    return counts["total" if by == "params" else "non_embedding"]


def match(experiment: Experiment, vocab_size: int, target: float, settings: Match) -> Matched:
    """The config with its widths solved for. Raises ConfigError, one line, if none fits."""
    measure = partial(quantity, vocab_size=vocab_size, by=settings.by)
    before = measure(experiment)
    if _off(before, target) <= settings.tolerance:
        return Matched(experiment, {}, before, before, target)
    chosen = bool(settings.change) or settings.by != "state"
    fields = settings.change or _candidates(experiment, settings.by)
    closest, inert = before, []
    current = experiment
    changed: dict[str, tuple[Any, Any]] = {}
    for field in fields:
        start = current if chosen else experiment
        found = _solve(start, field, target, measure, settings.tolerance)
        if found is None:
            inert.append(field)
            continue
        new, value = found
        if abs(value - target) < abs(closest - target):
            closest = value
            kept = changed if chosen else {}
            changed = {**kept, field: (_read(experiment, field), _read(new, field))}
            current = new
        if _off(closest, target) <= settings.tolerance:
            return Matched(current, changed, before, closest, target)
    raise ConfigError(_failure(settings, target, before, closest, changed, fields, inert))


def _failure(
    settings: Match,
    target: float,
    before: float,
    closest: float,
    changed: dict[str, tuple[Any, Any]],
    fields: Sequence[str],
    inert: Sequence[str],
) -> str:
    unit = UNITS[settings.by]
    line = f"match: {target:,.0f} {unit} cannot be met within {settings.tolerance:.2%} "
    if inert and len(inert) == len(fields):
        return line + f"by {', '.join(fields)}: it changes nothing there; name another field"
    tried = ", ".join(f"{k}={new}" for k, (_, new) in changed.items()) or "no change"
    return line + (
        f"from {before:,.0f} by {', '.join(fields)}; the closest is {closest:,.0f} with {tried}; "
        "name other fields to change, or a larger tolerance"
    )


def _off(value: float, target: float) -> float:
    return abs(value - target) / target


def _candidates(experiment: Experiment, by: By) -> list[str]:
    model = experiment.model
    if by != "state":
        return ["model.d_model", *(["model.mlp.ratio"] if _has(model.mlp, "ratio") else [])]
    sizes: list[tuple[bool, str]] = []
    for name in dict.fromkeys(model.layers_in_order):
        mixer = model.mixer(name)
        for field in dataclasses.fields(mixer):
            value = getattr(mixer, field.name)
            if (_is_size(value) and field.name not in SPEED_ONLY) or (
                value is None and field.name.endswith("_size")
            ):
                sizes.append((field.name not in MEMORY_SIZES, f"model.mixers.{name}.{field.name}"))
    return [*(path for _, path in sorted(sizes, key=lambda pair: pair[0])), "model.d_model"]


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _has(config: Any, name: str) -> bool:
    return config is not None and any(f.name == name for f in dataclasses.fields(config))


def _read(experiment: Experiment, field: str) -> Any:
    """The value of a field, defaults of mixers that the config does not name included."""
    here: Any = experiment
    parts = field.split(".")
    if parts[:2] == ["model", "mixers"] and len(parts) > 2:
        names = list(dict.fromkeys(experiment.model.layers_in_order))
        if parts[2] not in names:
            raise ConfigError(f"match: {field}: no such mixer; choose from {', '.join(names)}")
        here, parts = experiment.model.mixer(parts[2]), parts[3:]
    for part in parts:
        names = [f.name for f in dataclasses.fields(here)] if dataclasses.is_dataclass(here) else []
        if part not in names:
            raise ConfigError(f"match: {field}: there is no field {part!r}; {_hint(part, names)}")
        here = getattr(here, part)
    return here


def _hint(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(names)}" if names else "what is before it has no fields"


def _with(experiment: Experiment, field: str, value: float) -> Experiment | None:
    """The config with a field changed; None if it cannot be."""
    data = to_dict(experiment)
    override(data, field, repr(value))
    try:
        return build(Experiment, data)
    except ConfigError:
        return None


def _solve(
    experiment: Experiment,
    field: str,
    target: float,
    measure: Callable[[Experiment], float],
    tolerance: float,
) -> tuple[Experiment, float] | None:
    """The best value of one field; None if the quantity does not depend on it."""
    old = _read(experiment, field)
    old = UNSET if old is None else old
    if not _is_size(old):
        raise ConfigError(f"match: {field}={old}: only a number above 0 can be solved for")
    seen: dict[float, tuple[Experiment, float] | None] = {}

    def at(value: float) -> tuple[Experiment, float] | None:
        if value not in seen:
            changed = _with(experiment, field, value)
            try:
                seen[value] = None if changed is None else (changed, measure(changed))
            except ConfigError:  # rules that only the parts of the model know
                seen[value] = None
        return seen[value]

    values = _whole if isinstance(old, int) else _fractions
    for candidate in values(old, target, at):
        found = at(candidate)
        if found is not None and _off(found[1], target) <= tolerance:
            return found
    known = [found for found in seen.values() if found is not None]
    if len({value for _, value in known}) < 2:
        return None
    return min(known, key=lambda found: abs(found[1] - target))


At = Callable[[float], tuple[Experiment, float] | None]


def _valid(value: int, at: At, up: bool) -> int | None:
    """The nearest value that a config can have, from `value` on."""
    steps = range(value, value * 2 + 64) if up else range(value, 0, -1)
    return next((v for _, v in zip(range(300), steps) if at(v) is not None), None)


def _whole(old: int, target: float, at: At) -> Iterable[int]:
    """Integers near the solution, the roundest first."""
    bounds = _bracket(old, target, at)
    if bounds is None:
        return
    low, high = bounds
    rising = _measured(at, high) > _measured(at, low)
    while high - low > 1:
        middle = _valid((low + high) // 2, at, up=True)
        if middle is None or middle >= high:
            middle = _valid((low + high) // 2, at, up=False)
        if middle is None or middle <= low:
            break
        if (_measured(at, middle) < target) == rising:
            low = middle
        else:
            high = middle
    for step in STEPS:
        floor = low // step * step
        yield from (v for v in (floor, floor + step, high // step * step) if v > 0)


def _measured(at: At, value: float) -> float:
    found = at(value)
    assert found is not None
    return found[1]


def _bracket(old: int, target: float, at: At) -> tuple[int, int] | None:
    """Two values with the target between them, by doubling and halving; None if there are none."""
    if at(old) is None:
        return None
    doubled = _valid(2 * old, at, up=True)
    other = doubled if doubled is not None else _valid(max(old // 2, 1), at, up=False)
    if other is None or _measured(at, other) == _measured(at, old):
        return None
    rising = (_measured(at, other) > _measured(at, old)) == (other > old)
    grow = (_measured(at, old) < target) == rising
    near = old
    while 1 <= near <= LARGEST:
        far = _valid(2 * near, at, up=True) if grow else _valid(near // 2, at, up=False)
        if far is None or far == near:
            return None
        if (_measured(at, far) >= target) != (_measured(at, near) >= target):
            return min(near, far), max(near, far)
        near = far
    return None


def _fractions(old: float, target: float, at: At) -> Iterable[float]:
    """Numbers near the solution, those with the fewest digits first."""
    low, high = old / 64, old * 64
    ends = at(low), at(high)
    if ends[0] is None or ends[1] is None or ends[0][1] == ends[1][1]:
        return
    rising = ends[1][1] > ends[0][1]
    for _ in range(24):
        middle = (low * high) ** 0.5
        found = at(middle)
        if found is None:
            return
        if (found[1] < target) == rising:
            low = middle
        else:
            high = middle
    for digits in (2, 3, 4, 6):
        yield float(f"{low:.{digits}g}")


def run_match(
    experiment: Experiment,
    to: float | Experiment,
    *,
    by: By = "params",
    change: tuple[str, ...] = (),
    tolerance: float = 0.01,
    save: str | None = None,
) -> dict[str, Any]:
    """What `memjax match` does: solve, and save the config as JSON if a file is named.

    Raises ConfigError, one line, if no value of the fields meets the target.
    """
    settings = build(Match, {"by": by, "change": change, "tolerance": tolerance}, "match")
    vocab_size = load_tokenizer(experiment.data).vocab_size
    if isinstance(to, Experiment):
        target = quantity(to, load_tokenizer(to.data).vocab_size, by)
    else:
        target = build(Match, {"to": to}, "match").to
    found = match(experiment, vocab_size, target, settings)
    if save is not None:
        _save(found.experiment, save)
    return {
        "by": by,
        "target": found.target,
        "before": found.before,
        "after": found.value,
        "difference": found.value / found.target - 1,
        "changed": {f"config.{key}": list(pair) for key, pair in found.changed.items()},
        "arguments": [f"--config.{key}={new}" for key, (_, new) in found.changed.items()],
        "config": to_dict(found.experiment),
        "saved": save,
    }


def _save(experiment: Experiment, file: str) -> None:
    if not file.endswith(".json"):
        raise ConfigError(f"--save={file}: must end in .json")
    try:
        with open(file, "w") as out:
            out.write(to_json(experiment))
    except OSError as error:
        raise ConfigError(f"--save={file}: cannot be written ({error.strerror})") from None
