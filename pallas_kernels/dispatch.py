"""Which implementation of an operation runs.

A named implementation runs or raises. "auto" takes the fast one of the platform where it suits the
arguments, and plain JAX (`xla`) otherwise.
"""

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

logger = logging.getLogger(__name__)

NAMES = ("reference", "xla", "tpu", "gpu", "splash", "cudnn", "rdma")

AVAILABLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ("reference", "xla", "tpu", "gpu", "splash", "cudnn"),
        "delta_rule": ("reference", "xla", "tpu", "gpu"),
        "linear_attention": ("reference", "xla", "tpu", "gpu"),
        "mlstm": ("reference", "xla", "tpu", "gpu"),
        "diagonal_scan": ("reference", "xla", "tpu"),
        "ring_attention": ("xla", "rdma"),
        "neural_memory": ("reference", "xla", "tpu"),
        "selective_scan": ("reference", "xla", "tpu"),
        "taylor_attention": ("reference", "xla", "tpu"),
        "ttt_linear": ("reference", "xla", "tpu"),
        "ttt_mlp": ("reference", "xla", "tpu"),
    }
)

# Where an implementation runs; one that is not listed runs anywhere.
PLATFORM = MappingProxyType(
    {"tpu": "tpu", "splash": "tpu", "rdma": "tpu", "gpu": "gpu", "cudnn": "gpu"}
)

# What "auto" tries before "xla", in order: what was faster, or is expected to be. Attention by
# "gpu" has 0.92 to 1.01 of the speed of "cudnn" on an H200, which comes first.
PREFERRED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"tpu": ("tpu",), "gpu": ("cudnn", "gpu")}
)

Unfit = Mapping[str, Callable[[], str | None]]
"""For an implementation, why it cannot take the arguments of a call; None where it can."""


class Target(NamedTuple):
    """The platform that programs are traced for, and the interpreter that stands in for it."""

    platform: str
    interpreter: Any = None


_target = jax.make_user_context(None)
_logged: set[tuple[str, str]] = set()


def target(platform: str, *, interpreter: Any = None) -> Any:
    """A context in which programs are traced for `platform` ("cpu", "tpu", "gpu").

    For lowering or compiling on a machine without it. With `interpreter` (True, or parameters of
    Pallas's interpreters) kernels are simulated instead. Compiled programs are kept apart by it.
    """
    return _target(Target(platform, interpreter))


def current_target() -> Target:
    """The target of the enclosing context, or the default backend."""
    return _target.value or Target(jax.default_backend())


def resolve(op: str, impl: str = "auto", unfit: Unfit = MappingProxyType({})) -> str:
    """The implementation that `op` runs when called with `impl` here.

    `unfit` tells, by implementation, why it does not suit the arguments. "auto" skips those, and
    logs each choice once at INFO level. Raises ValueError for an unknown operation, and for a name
    that the operation does not have, that the platform does not run, or that does not suit.
    """
    if op not in AVAILABLE:
        raise ValueError(f"op={op!r} is not an operation; available: {', '.join(AVAILABLE)}")
    platform = current_target().platform
    here = [name for name in AVAILABLE[op] if PLATFORM.get(name, platform) == platform]
    if impl == "auto":
        return _choose(op, platform, here, unfit)
    rest = f"use 'auto' or one of: {', '.join(here)}"
    if impl in here:
        reason = unfit[impl]() if impl in unfit else None
        if reason is not None:
            raise ValueError(f"{op}: impl={impl!r} cannot run this call: {reason}; {rest}")
        return impl
    if impl in AVAILABLE[op]:
        raise ValueError(f"{op}: impl={impl!r} is not available on {platform}; {rest}")
    what = "is not available" if impl in NAMES else "is unknown"
    raise ValueError(f"{op}: impl={impl!r} {what}; {rest}")


def _choose(op: str, platform: str, here: list[str], unfit: Unfit) -> str:
    chosen, why = "xla", ""
    for name in PREFERRED.get(platform, ()):
        if name in here:
            reason = partitioned() or (unfit[name]() if name in unfit else None)
            if reason is None:
                chosen, why = name, ""
                break
            why = f" ({name}: {reason})"
    if (op, chosen + why) not in _logged:
        _logged.add((op, chosen + why))
        logger.info("%s: impl='auto' runs '%s'%s", op, chosen, why)
    return chosen


def partitioned() -> str | None:
    """Why a kernel cannot be in this program: the compiler would have to split it over devices.

    None where it can.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if kinds and all(kind == AxisType.Manual for kind in kinds):
        return None
    if current_target().platform != jax.default_backend() or jax.device_count() == 1:
        return None
    return "several devices, and the call is not inside jax.shard_map"
