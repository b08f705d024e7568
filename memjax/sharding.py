"""The only file that names mesh axes: the mesh, and where arrays live on it.

    data      splits the batch
    fsdp      splits the batch, and the parameters, which every layer gathers when it runs
    tensor    splits heads, hidden channels, the vocabulary and tables
    context   splits the tokens of a segment

Arrays are described by logical axes: parameters by the names they are declared with, all else by
the letters that names of arrays end in (`memjax.shapes`). `RULES` says over which mesh axes each
logical axis is split; what a mesh axis does not divide is not split, which costs time or memory
and never changes a number.

Programs are traced under `over(mesh)`. `constrain` tells the compiler where arrays live, and
`memjax.gathering` where parameters do; `split` runs an operation on each device's part of its
arguments. Without a mesh, or on one device, they do nothing.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as JaxMesh
from jax.sharding import PartitionSpec as P

from memjax.config import ConfigError, check

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
CONTEXT = "context"

RULES: dict[str, tuple[str, ...]] = {
    "lanes": BATCH_AXES,
    "tokens": ("context",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "hidden": ("tensor",),
    "heads": ("tensor",),
    "head": ("tensor",),
    "rows": ("tensor",),
    "slots": ("tensor",),
    "layers": (),
    "pair": (),
    "conv": (),
    "value": (),
    "rank": (),
}
LETTERS = {"B": "lanes", "T": "tokens", "H": "heads", "G": "heads", "E": "hidden", "F": "hidden"}
# Parts of states that are trees of arrays without names of their own, by the name of the part.
PARTS = {"weights": "BH", "momenta": "BH", "carry": "BH", "tokens": "BJH"}

Size = int | Literal["auto"]
Spec = P
"""For each axis of an array the mesh axes that it is split over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; one of them may be "auto": what the others leave.

    data: rows. fsdp: rows and parameters. tensor: heads and hidden channels. context: tokens.
    """

    data: Size = "auto"
    fsdp: Size = 1
    tensor: Size = 1
    context: Size = 1

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            check(self, name, size == "auto" or size >= 1, 'must be at least 1, or "auto"')
        auto = [name for name in AXES if getattr(self, name) == "auto"]
        if len(auto) > 1:
            rule = f'cannot be "auto" while {auto[0]} is "auto"; give one a number'
            check(self, auto[1], False, rule)

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis, or one line that says what would fit."""
        given: dict[str, Size] = {name: getattr(self, name) for name in AXES}
        known = math.prod(size for size in given.values() if size != "auto")
        if known > devices or devices % known:
            asked = " ".join(f"{name}={size}" for name, size in given.items())
            raise ConfigError(
                f"config.mesh: {asked} do not fit {devices} device(s); the product of the sizes "
                f"must be one of {_list(_divisors(devices))}"
            )
        rest = devices // known
        return {name: rest if size == "auto" else int(size) for name, size in given.items()}


def make_mesh(config: Mesh, batch: int, devices: Sequence[jax.Device] | None = None) -> JaxMesh:
    """The mesh over the first devices; `batch` rows must divide over its lanes.

    devices: those there are, if not given; others are for programs that are only compiled.
    """
    here = jax.devices() if devices is None else devices
    sizes = config.sizes(len(here))
    count, lanes = math.prod(sizes.values()), sizes["data"] * sizes["fsdp"]
    if batch % lanes:
        raise ConfigError(
            f"config.data.batch={batch} must be a multiple of mesh.data * mesh.fsdp "
            f"= {lanes} devices"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=here[:count])


def virtual_devices(config: Mesh) -> None:
    """Make JAX, before its first use, simulate the devices of a mesh on this machine's CPU."""
    given = [getattr(config, name) for name in AXES]
    for name, size in zip(AXES, given):
        if size == "auto":
            raise ConfigError(
                f"--mesh={name}=auto: must be a number; there are no devices to count"
            )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(int(size) for size in given))


def check_tokens(mesh: JaxMesh, sequence: int) -> None:
    """Raise a ConfigError unless the context axis divides segments of `sequence` tokens."""
    size = axis_size(mesh, "tokens")
    if sequence % size:
        fits = [n for n in _divisors(sequence) if n <= mesh.size]
        raise ConfigError(
            f"config.mesh.context={size} must divide data.sequence={sequence}; sizes that fit: "
            f"{_list(fits)}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def axis_size(mesh: JaxMesh, name: str) -> int:
    """Parts into which a logical axis is split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in _rule(name))


def _rule(name: str) -> tuple[str, ...]:
    if name not in RULES:
        raise ValueError(f"logical axis {name!r} has no rule; add it to RULES")
    return RULES[name]


def spec_of(mesh: JaxMesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> P:
    """The split of an array; of two axes that one mesh axis would split, the first gets it."""
    parts: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, size in zip(names, shape):
        axes = () if name is None else _rule(name)
        axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
        fits = axes and not used & set(axes) and size % axis_size(mesh, name or "") == 0
        parts.append(axes if fits else None)
        used |= set(axes) if fits else set()
    return P(*parts)


# Where arrays live between steps.


def replicated(mesh: JaxMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def lanes(mesh: JaxMesh, axis: int = 0) -> NamedSharding:
    """Lanes, on `axis` of an array, split over the batch axes."""
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    return NamedSharding(mesh, P(*[None] * axis, axes))


def batch(mesh: JaxMesh) -> NamedSharding:
    """Arrays [B, T] of a batch."""
    return NamedSharding(mesh, P(BATCH_AXES, CONTEXT))


def process_rows(mesh: JaxMesh, rows: int) -> tuple[int, int]:
    """(i, n): the devices of this process read the i-th of n equal runs of the rows of a batch.

    Processes that only split a sequence, or parameters, among them read the same rows.
    """
    where = lanes(mesh).addressable_devices_indices_map((rows,)).values()
    parts = {(at[0].start or 0, rows if at[0].stop is None else at[0].stop) for at in where if at}
    first, size = min(parts)[0], sum(stop - start for start, stop in parts)
    if first % size or rows % size or max(parts)[1] != first + size:
        raise ConfigError(
            "config.mesh: the rows that a process reads are not side by side; give data and fsdp "
            "sizes that are multiples of the number of processes"
        )
    return first // size, rows // size


def parameters(mesh: JaxMesh, axes: dict, shapes: Any) -> Any:
    """The sharding of each parameter, from its logical axes; same structure as `shapes`."""

    def one(names: tuple[str, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_of(mesh, names, leaf.shape))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def states(mesh: JaxMesh, shapes: Any) -> Any:
    """The sharding of the carried state of a model: lanes and, where there are some, heads.

    Axes are told from the names of the arrays; layers are stacked in front of them.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        letters = _letters(path)
        names = (None, *(LETTERS.get(letter) for letter in letters))
        names = (None, "lanes") if len(names) > leaf.ndim else names
        return NamedSharding(mesh, spec_of(mesh, names, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, shapes)


def _letters(path: tuple) -> str:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    for name in reversed(names):
        found = re.search(r"_1?([A-Z][A-Z0-9]*)$", name)
        letters = found[1] if found else PARTS.get(name, "")
        if letters:
            return letters if letters.startswith("B") else "B" + letters
    return "B"


# Within a program.

_active = jax.make_user_context(None)


def over(mesh: JaxMesh | None) -> Any:
    """A context in which programs are traced for `mesh`; one device needs no mesh."""
    return _active(mesh if mesh is not None and mesh.size > 1 else None)


def active() -> JaxMesh | None:
    """The mesh that the program runs on; None for one device, and within `split`."""
    mesh = _active.value
    # Asked of JAX, because a backward pass is traced after the function that it belongs to.
    inside = mesh is not None and jax.sharding.get_abstract_mesh().manual_axes
    return None if inside else mesh


def splits(name: str) -> bool:
    """Whether the mesh that the program runs on splits a logical axis."""
    mesh = active()
    return mesh is not None and axis_size(mesh, name) > 1


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, split over the mesh by its logical axes; those behind the names are not split.

    Where the mesh does not divide an axis that has a name, the compiler may choose.
    """
    mesh = active()
    if mesh is None:
        return x
    spec = spec_of(mesh, names, x.shape)
    free = (
        P.UNCONSTRAINED if name is not None and part is None and axis_size(mesh, name) > 1 else part
        for name, part in zip(names, spec)
    )
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*free)))


def split(
    local: Callable, args: tuple, axes: tuple, out_axes: Any, *, least_tokens: int = 1
) -> Any:
    """local(axis_name, *args), each device on its part of the arguments.

    axes: for each argument, the letters of the leading axes of its arrays ("BTHK"), or a tree of
    such; out_axes likewise. `LETTERS` says which of them are split: lanes, tokens, and heads or
    channels where the mesh divides them. An array without a letter that is split is whole on every
    device.
    axis_name: the mesh axis that tokens are split over, for `pallas_kernels.context_parallel`;
    None if the tokens are whole, because there is no mesh, or it does not divide them, or would
    leave fewer than `least_tokens` on a device.
    """
    mesh = active()
    if mesh is None:
        return local(None, *args)
    pairs: list[tuple[str, tuple[int, ...]]] = []
    jax.tree.map(
        lambda letters, arg: pairs.extend((letters, x.shape) for x in jax.tree.leaves(arg)),
        axes,
        args,
    )
    places = _places(mesh, pairs, least_tokens)

    def spec(letters: str) -> P:
        return P(*(places.get(letter) for letter in letters))

    def body(*args: Any) -> Any:
        return local(CONTEXT if places.get("T") else None, *args)

    in_specs = jax.tree.map(
        lambda letters, arg: jax.tree.map(lambda _: spec(letters), arg), axes, args
    )
    out_specs = jax.tree.map(spec, out_axes)
    # The check of what differs between devices would forbid, in operations and in mixers, loops
    # that start from plain zeros.
    run = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(*args)


def _places(mesh: JaxMesh, pairs: list, least_tokens: int) -> dict[str, tuple[str, ...]]:
    """The mesh axes of each letter that is split."""
    sizes: dict[str, set[int]] = {}
    for letters, shape in pairs:
        for letter, size in zip(letters, shape):
            sizes.setdefault(letter, set()).add(size)
    places = {}
    for letter, found in sizes.items():
        axes = RULES[LETTERS[letter]] if letter in LETTERS else ()
        axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
        count = math.prod(mesh.shape[axis] for axis in axes)
        least = least_tokens * count if letter == "T" else 1
        if axes and all(size % count == 0 and size >= least for size in found):
            places[letter] = axes
    # Heads in groups: one group goes with any heads, several must be split as the heads are.
    if "G" in sizes and ("G" in places) != ("H" in places) and sizes["G"] != {1}:
        places = {letter: axes for letter, axes in places.items() if letter not in "GH"}
    return places
