"""Checks of arguments, made while tracing.

Each raises ValueError with one line: the operation, the argument, its value and the rule.
"""

import math

import jax
import jax.numpy as jnp


def check_axes(op: str, **arrays: tuple[jax.Array | None, str]) -> None:
    """Each array has its axes, and an axis has one size wherever it occurs. None is skipped."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, axes) in arrays.items():
        if array is None:
            continue
        want = "[" + ", ".join(axes) + "]"
        if array.ndim != len(axes):
            raise ValueError(f"{op}: {name} has shape {array.shape}; it must be {want}")
        for axis, size in zip(axes, array.shape, strict=True):
            known, source = sizes.setdefault(axis, (size, name))
            if known != size:
                raise ValueError(
                    f"{op}: {name} has shape {array.shape}; {want} must agree with {source}, "
                    f"where {axis} is {known}"
                )


def decay_axes(log_decay: jax.Array | None) -> str:
    """The axes that `log_decay` must have: one a head, or one a key channel."""
    return "BTH" if log_decay is not None and log_decay.ndim == 3 else "BTHK"


def check_floating(op: str, **arrays: jax.Array | None) -> None:
    """Arrays hold floating point numbers."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; it must be floating point")


def check_integer(op: str, **arrays: jax.Array | None) -> None:
    """Arrays hold integers."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; it must be integer")


def check_at_least_one(op: str, **values: int | None) -> None:
    """Settings are Python integers from 1."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{op}: {name}={value!r} must be an integer of at least 1")


def check_positive(op: str, **values: float | None) -> None:
    """Settings are Python numbers above 0, and finite."""
    for name, value in values.items():
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"{op}: {name}={value!r} must be a number above 0, or None")


def check_tokens(op: str, tokens: int) -> None:
    """A segment holds at least one token."""
    if tokens < 1:
        raise ValueError(f"{op}: the segment has T=0 tokens; it must have at least 1")


def check_groups(op: str, groups: int, heads: int) -> None:
    """Heads of queries and keys serve equal shares of the heads of values."""
    if heads % groups:
        raise ValueError(
            f"{op}: q has {groups} heads and v has {heads}; the heads of q must divide those of v"
        )


def check_reset(op: str, reset: jax.Array | None) -> None:
    """`reset` is boolean."""
    if reset is not None and reset.dtype != jnp.bool_:
        raise ValueError(f"{op}: reset has dtype {reset.dtype}; it must be bool")


def check_log_decay(op: str, log_decay: jax.Array | None, name: str = "log_decay") -> None:
    """A log decay is at most 0. Values of a traced array are not known and not checked."""
    if log_decay is None or isinstance(log_decay, jax.core.Tracer):
        return
    largest = float(jnp.max(log_decay))
    if not largest <= 0:
        raise ValueError(
            f"{op}: {name} has a value of {largest:g}; it must be at most 0, "
            "the logarithm of a decay in (0, 1]"
        )
