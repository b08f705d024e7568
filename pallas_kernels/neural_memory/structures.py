"""What a memory computes from a key: its structure, written once for every way of using it.

A structure is called with a function `linear(i, x)` that applies its i-th weight matrix. The matrix
may be the one at the start of a block, or that plus the writes of the block so far, which is never
formed. Adding one is a frozen dataclass with the two methods below and a line in `STRUCTURES`.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

Linear = Callable[[int, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """Base of the structures."""

    kind: ClassVar[str]

    @property
    def bounded(self) -> bool:
        """Whether answers stay bounded however large the weights become."""
        return False

    def shapes(self, key_size: int, value_size: int) -> tuple[tuple[int, int], ...]:
        """(in, out) of each weight matrix. Raises ValueError for sizes it cannot have."""
        raise NotImplementedError

    def constants(self, value_size: int) -> dict[str, float]:
        """Vectors [H, V] that the memory does not rewrite, with their initial values."""
        del value_size
        return {}

    def __call__(self, linear: Linear, constants: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """[..., C, K] to [..., C, V]; constants are rows [..., 1, V]. Rows do not mix."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearMap(Structure):
    """x W."""

    kind: ClassVar[str] = "linear"

    def shapes(self, key_size: int, value_size: int) -> tuple[tuple[int, int], ...]:
        return ((key_size, value_size),)

    def __call__(self, linear: Linear, constants: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        del constants
        return linear(0, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP(Structure):
    """gelu(... gelu(x W_1) ...) W_n with hidden layers of expansion * V; n from 1 (linear) to 4.

    residual_norm: x + scale * LayerNorm(that) + shift instead, per head; needs K = V. What the
        memory answers then stays bounded, and so do its gradients where its weights grow; norm_eps
        (added to the variance) bounds them where its weights shrink.
    """

    kind: ClassVar[str] = "mlp"
    layers: int = 2
    expansion: int = 2
    residual_norm: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self):
        if not 1 <= self.layers <= 4:
            raise ValueError(f"layers={self.layers} must be from 1 to 4")
        if self.expansion < 1:
            raise ValueError(f"expansion={self.expansion} must be at least 1")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be greater than 0")

    @property
    def bounded(self) -> bool:
        return self.residual_norm

    def shapes(self, key_size: int, value_size: int) -> tuple[tuple[int, int], ...]:
        if self.residual_norm:
            _check_square(key_size, value_size)
        hidden = (self.expansion * value_size,) * (self.layers - 1)
        return tuple(zip((key_size, *hidden), (*hidden, value_size)))

    def constants(self, value_size: int) -> dict[str, float]:
        del value_size
        return {"scale": 1.0, "shift": 0.0} if self.residual_norm else {}

    def __call__(self, linear: Linear, constants: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = linear(0, x)
        for layer in range(1, self.layers):
            y = linear(layer, jax.nn.gelu(y))
        return residual_norm(constants, x, y, self.norm_eps) if self.residual_norm else y


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLP(Structure):
    """(gelu(x W_1) * x W_2) W_3 with hidden layers of expansion * V.

    residual_norm, norm_eps: as in `MLP`.
    """

    kind: ClassVar[str] = "gated_mlp"
    expansion: int = 2
    residual_norm: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.expansion < 1:
            raise ValueError(f"expansion={self.expansion} must be at least 1")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be greater than 0")

    @property
    def bounded(self) -> bool:
        return self.residual_norm

    def shapes(self, key_size: int, value_size: int) -> tuple[tuple[int, int], ...]:
        if self.residual_norm:
            _check_square(key_size, value_size)
        hidden = self.expansion * value_size
        return ((key_size, hidden), (key_size, hidden), (hidden, value_size))

    def constants(self, value_size: int) -> dict[str, float]:
        del value_size
        return {"scale": 1.0, "shift": 0.0} if self.residual_norm else {}

    def __call__(self, linear: Linear, constants: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = linear(2, jax.nn.gelu(linear(0, x)) * linear(1, x))
        return residual_norm(constants, x, y, self.norm_eps) if self.residual_norm else y


def residual_norm(
    constants: dict[str, jax.Array], x: jax.Array, y: jax.Array, eps: float
) -> jax.Array:
    """x + scale * LayerNorm(y) + shift."""
    return x + constants["scale"] * layer_norm(y, eps) + constants["shift"]


def _check_square(key_size: int, value_size: int) -> None:
    if key_size != value_size:
        raise ValueError(
            f"residual_norm=True needs values of the size of keys; K={key_size}, V={value_size}"
        )


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


STRUCTURES: dict[str, type[Structure]] = {
    "linear": LinearMap,
    "mlp": MLP,
    "gated_mlp": GatedMLP,
}
