"""What devices say to each other in a step: counted in the compiled program.

Bytes are what each device sends, by the best algorithm for the kind on a group of n devices: an
all-gather or a reduce-scatter sends (n - 1) / n of the whole array, an all-reduce twice that, an
all-to-all (n - 1) / n of what the device holds, a permute all of it.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from memjax.experiment import Experiment
from memjax.sharding import make_mesh
from memjax.training.step import make_trainer

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s32": 32, "u32": 32, "s8": 8}

_OPERATION = re.compile(
    rf"= (?P<type>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)"
)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|branch_computations)=\{?(%[^,}\s]+(?:, %[^,}\s]+)*)"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_LOOP = re.compile(r" while\(.*condition=%([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]+)\}|\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)"
)
_AXES = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


class Collective(NamedTuple):
    """One operation. axes: of the mesh, that it goes over. times: it runs a step, where the
    compiler knows. result_bytes: of its result on a device. sent_bytes: by a device, each time."""

    kind: str
    axes: tuple[str, ...]
    times: int
    result_bytes: int
    sent_bytes: float


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program, from its text (`Compiled.as_text()`)."""
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    found: dict[Any, Collective] = {}
    for name, lines in bodies.items():
        # For TPU a reduce-scatter is an operation of its own, of an all-reduce and slices of it.
        scattered = name.startswith("all-reduce-scatter")
        for line in lines if times.get(name, 0) else ():
            one = _collective(line, mesh, times[name], scattered)
            if one is not None:
                channel = _CHANNEL.search(line)
                # For TPU a collective is written down in each operation that it runs beside.
                beside = channel is not None and "fus" in name
                found.setdefault((one.kind, channel[1]) if beside and channel else line, one)
    return list(found.values())


def summary(found: list[Collective]) -> list[dict[str, Any]]:
    """Kinds by mesh axes: how often a step, and the bytes that each device sends a step."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        axes = "+".join(one.axes)
        row = rows.setdefault(
            (axes, one.kind), {"axes": axes, "kind": one.kind, "count": 0, "bytes": 0.0}
        )
        row["count"] += one.times
        row["bytes"] += one.times * one.sent_bytes
    return [rows[key] for key in sorted(rows)]


def compile_step(
    experiment: Experiment, vocab_size: int, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.stages.Compiled, Mesh]:
    """The training step of an experiment, compiled for its mesh; nothing is allocated.

    devices: of a topology that is not here, with `pallas_kernels.dispatch.target` around the call.
    """
    mesh = make_mesh(experiment.mesh, experiment.data.batch, devices)
    trainer = make_trainer(experiment, vocab_size, mesh)
    rows, length = experiment.data.batch, experiment.data.sequence * experiment.train.horizon
    types: dict[str, Any] = {"tokens_BT": np.int32, "targets_BT": np.int32, "weight_BT": np.float32}
    types["reset_BT"] = np.bool_
    batch = {name: jax.ShapeDtypeStruct((rows, length), kind) for name, kind in types.items()}
    return trainer.step.lower(trainer.abstract, batch).compile(), mesh


def report(experiment: Experiment, vocab_size: int) -> dict[str, Any]:
    """Collectives and memory a device of the compiled training step."""
    compiled, mesh = compile_step(experiment, vocab_size)
    memory: Any = compiled.memory_analysis()
    return {
        "devices": dict(mesh.shape),
        "collectives": summary(collectives(compiled.as_text() or "", mesh)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation of a module, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            lines = bodies.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs; a loop of unknown length, or a branch, counts once."""
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for called, trips in calls.get(name, ()):
            visit(called, count * trips)

    visit(entry, 1)
    return times


def _calls(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    for line in lines:
        trips = _trips(line, bodies)
        for names in _CALLED.findall(line):
            for name in names.split(", "):
                yield name.lstrip("%"), trips


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Turns of a loop: as the compiler says, or else the one number that its condition names."""
    known, loop = _TRIPS.search(line), _LOOP.search(line)
    if known or not loop:
        return int(known[1]) if known else 1
    limits = {found[1] for text in bodies.get(loop[1], ()) if (found := _LIMIT.search(text))}
    return int(limits.pop()) if len(limits) == 1 else 1


def _collective(line: str, mesh: Mesh, times: int, scattered: bool) -> Collective | None:
    """scattered: whether an all-reduce is what is written down of a reduce-scatter."""
    found = _OPERATION.search(line)
    if found is None:
        return None
    group = _group(found["rest"], mesh)
    if len(group) == 1:  # a sum over an axis of one device: nothing is sent
        return None
    places = np.array([np.unravel_index(device, mesh.devices.shape) for device in group])
    axes = [name for i, name in enumerate(mesh.axis_names) if len(set(places[:, i])) > 1]
    n, kind = len(group), found["kind"]
    arrays = _ARRAY.findall(found["type"])
    if found["start"] and kind != "all-reduce":  # for GPU: what is sent, then what is made of it
        arrays = arrays[len(arrays) // 2 :]
    size = sum(
        math.prod(int(n) for n in shape.split(",") if n) * BITS.get(kind, 32) // 8
        for kind, shape in arrays
    )
    if scattered and kind == "all-reduce":
        kind, size = "reduce-scatter", size // n
    sent = {
        "all-gather": size * (n - 1) / n,
        "all-reduce": 2 * size * (n - 1) / n,
        "reduce-scatter": size * (n - 1),
        "all-to-all": size * (n - 1) / n,
        "collective-permute": size,
    }[kind]
    return Collective(kind, tuple(axes), times, size, sent)


def _group(text: str, mesh: Mesh) -> list[int]:
    """Places in the mesh of the devices of the first group, or of the first pair of a permute."""
    pairs = _PAIRS.search(text)
    if pairs:
        split = [_numbers(pair) for pair in pairs[1].strip("{}").split("},{")]
        return next((pair for pair in split if pair[0] != pair[1]), split[0])
    named = _AXES.search(text)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _ids(named[2], named[3], mesh.size).reshape(list(sizes.values()))
        for i, name in enumerate(sizes):
            if f"'{name}'" not in named[4]:
                ids = ids.take([0], axis=i)
        return [int(n) for n in ids.reshape(-1)]
    groups = _GROUPS.search(text)
    if groups is None:
        return list(range(mesh.size))
    if groups[1]:
        return _numbers(groups[1])
    ids = _ids(groups[3], groups[4], mesh.size).reshape(_numbers(groups[2]))
    return [int(n) for n in ids[0]]


def _ids(shape: str | None, order: str | None, count: int) -> np.ndarray:
    """Device numbers in the order of an iota tile."""
    ids = np.arange(count)
    if shape is None:
        return ids
    ids = ids.reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
