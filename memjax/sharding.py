"""The only file that names mesh axes: the mesh, and where arrays live on it.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters. Parameters carry
logical axes (`memjax.model.logical_axes`); `RULES` says which mesh axis each may be split over.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as JaxMesh
from jax.sharding import PartitionSpec as P

from memjax.config import ConfigError, check

BATCH_AXES = ("data", "fsdp")

RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": None,
    "embed": "fsdp",
    "hidden": None,
    "conv": None,
    "heads": None,
    "head": None,
    "value": None,
    "rank": None,
    "slots": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; "auto" takes what the others leave.

    `tensor` and `context` must be 1: tensor and context parallelism are not built yet.
    """

    data: int | Literal["auto"] = "auto"
    fsdp: int | Literal["auto"] = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        for name in ("data", "fsdp"):
            size = getattr(self, name)
            check(self, name, size == "auto" or size >= 1, 'must be at least 1, or "auto"')
        for name in ("tensor", "context"):
            rule = f"must be 1: {name} parallelism is not built yet"
            check(self, name, getattr(self, name) == 1, rule)
        both = self.data == "auto" and self.fsdp == "auto"
        check(self, "fsdp", not both, 'cannot be "auto" while data is "auto"; give one a number')

    def sizes(self, devices: int) -> tuple[int, int]:
        """Devices along (data, fsdp), or one line that says what would fit."""
        known = math.prod(s for s in (self.data, self.fsdp) if s != "auto")
        if known > devices or devices % known:
            fits = [n for n in range(1, devices + 1) if devices % n == 0]
            raise ConfigError(
                f"config.mesh: data={self.data} fsdp={self.fsdp} do not fit {devices} device(s); "
                f"sizes that divide them: {', '.join(map(str, fits))}"
            )
        rest = devices // known
        data, fsdp = (rest if s == "auto" else s for s in (self.data, self.fsdp))
        return int(data), int(fsdp)


def make_mesh(config: Mesh, batch: int) -> JaxMesh:
    """The mesh over the first data * fsdp devices; `batch` rows must divide over it."""
    data, fsdp = config.sizes(jax.device_count())
    if batch % (data * fsdp):
        raise ConfigError(
            f"config.data.batch={batch} must be a multiple of mesh.data * mesh.fsdp "
            f"= {data * fsdp} devices"
        )
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: JaxMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def lanes(mesh: JaxMesh, axis: int = 0) -> NamedSharding:
    """Lanes, on `axis` of an array, split over the batch axes."""
    return NamedSharding(mesh, P(*[None] * axis, BATCH_AXES))


def parameters(mesh: JaxMesh, axes: dict, shapes: Any) -> Any:
    """The sharding of each parameter, from its logical axes; same structure as `shapes`."""

    def one(names: tuple[str, ...], leaf: Any) -> NamedSharding:
        for name in names:
            if name not in RULES:
                raise ValueError(f"logical axis {name!r} has no rule; add it to RULES")
        spec = [RULES[name] for name in names]
        fits = [
            a if a is not None and size % mesh.shape[a] == 0 else None
            for a, size in zip(spec, leaf.shape)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))
