"""The fields of a model that can be solved for: which they are, their values, and changes."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from memjax.config import ConfigError, build, override, to_dict
from memjax.experiment import Experiment
from memjax.match.settings import By
from memjax.memory.base import LayerMemory, MixerMemory

MEMORY_SIZES = (
    "slots", "memory", "compressed", "blocks", "keys", "memory_size", "window", "context",
    "memories", "states", "state_size", "key_size", "value_size", "head_size", "expansion",
    "expand", "width",
)  # fmt: skip
"""What makes a memory larger, the purest first; other sizes come after these, heads last."""
CHARACTER = (
    "chunk", "conv", "unroll", "update_every", "segment", "top_k", "layers", "kv_heads", "position",
    "rate", "block", "neighbours", "retrieve", "order",
)  # fmt: skip
"""Not sizes: what only changes speed, or what an architecture is."""
LEFT_OPEN = ("_size", "rank", "width")
"""How the sizes are called that a config may leave to the width of the model, as None."""


def candidates(experiment: Experiment, by: By) -> list[str]:
    """The fields to solve for if none were named, in the order in which they are tried."""
    model = experiment.model
    sizes = list(_sizes(model.memory, "model.memory")) if model.memory is not None else []
    for name in dict.fromkeys(model.layers_in_order):
        mixer, here = model.plain_mixer(name), f"model.mixers.{name}"
        own = list(_sizes(mixer, here))
        memory = model.memory
        if isinstance(memory, MixerMemory) and memory.replaces(name, mixer):
            kept = memory.honours  # of the others the model makes no use
            own = [path for path in own if kept is None or path.rpartition(".")[2] in kept]
        sizes += own
    sizes.sort(key=_rank)
    if by == "state":
        return [*sizes, "model.d_model"]
    ratio = ["model.mlp.ratio"] if model.mlp is not None else []
    plain = ["model.d_model", *ratio, *sizes]
    memory = model.memory
    if by != "flops" and isinstance(memory, LayerMemory) and memory.replaces_mlp:
        # Most parameters are in its table; d_model would be torn far to make up for them.
        table = [path for path in sizes if path.startswith("model.memory.")]
        first = [*(path for path in table if not path.endswith("heads")), *ratio]
        return [*first, *(path for path in plain if path not in first)]
    return plain


def _sizes(config: Any, path: str) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), f"{path}.{field.name}"
        if field.name in CHARACTER:
            continue
        if field.name == "context" and getattr(config, "window", None) is not None:
            continue  # the window is the shorter of the two
        if dataclasses.is_dataclass(value):
            yield from _sizes(value, here)
            continue
        left_open = value is None and field.name.endswith(LEFT_OPEN)
        if left_open or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            yield here


def _rank(path: str) -> int:
    name = path.rpartition(".")[2]
    if name in MEMORY_SIZES:
        return MEMORY_SIZES.index(name)
    return len(MEMORY_SIZES) + (name == "heads")


def read(experiment: Experiment, field: str) -> Any:
    """The value of a field, defaults of mixers that the config does not name included."""
    here: Any = experiment
    parts = field.split(".")
    if parts[:2] == ["model", "mixers"] and len(parts) > 2:
        names = list(dict.fromkeys(experiment.model.layers_in_order))
        if parts[2] not in names:
            raise ConfigError(f"match: {field}: no such mixer; choose from {', '.join(names)}")
        here, parts = experiment.model.plain_mixer(parts[2]), parts[3:]
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


def with_value(experiment: Experiment, field: str, value: float) -> Experiment | None:
    """The config with a field changed; None if it cannot be."""
    data = to_dict(experiment)
    override(data, field, repr(value))
    try:
        return build(Experiment, data)
    except ConfigError:
        return None
