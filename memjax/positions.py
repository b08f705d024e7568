"""Position schemes: how order reaches the queries and keys of attention.

A scheme does one or both of two things: it turns queries and keys by angles that grow with their
position (`frequencies`), or it lowers the logits of distant keys (`slopes`). To add one that does
either, write a dataclass here and name it in `POSITIONS`; every mixer with a `position` then takes
it, from config files and from the command line.
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memjax.config import OneOf, check
from memjax.layers import check_heads, materialise
from memjax.sharding import split
from pallas_kernels import context_parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Base of the position schemes; alone it does nothing."""

    kind: ClassVar[str]

    @property
    def amplitude(self) -> float:
        """Factor on turned queries and keys."""
        return 1.0

    def frequencies(self, size: int) -> np.ndarray | None:
        """Radians a token of each of the size / 2 pairs of channels; None to turn nothing."""
        return None

    def slopes(self, heads: int) -> np.ndarray | None:
        """By how much the logit of each head falls for each token of distance; None for not."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPE(Position):
    """No positions: order reaches attention through causality alone (arXiv:2305.19466)."""

    kind: ClassVar[str] = "nope"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary(Position):
    """Rotary positions (arXiv:2104.09864): pairs (i, i + K/2) turn by position * base^(-2i/K).

    scaling stretches them from `trained` tokens of context to factor * trained:
      "linear"  position interpolation: all frequencies / factor (arXiv:2306.15595).
      "ntk"     base * factor^(K/(K-2)): the lowest frequency / factor, the highest unchanged.
      "yarn"    by parts (arXiv:2309.00071, Sec. 3.2 and Eq. 15): a pair that turns r times in
                `trained` tokens keeps its frequency if r >= 32, has it divided by factor if r <= 1,
                and a blend of both, linear in r, between; queries and keys grow by
                0.1 log(factor) + 1 each.
    """

    kind: ClassVar[str] = "rotary"
    base: float = 10_000.0
    scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    factor: float = 1.0
    trained: int = 2048

    def __post_init__(self):
        check(self, "base", self.base > 1, "must be greater than 1")
        check(self, "factor", self.factor >= 1, "must be at least 1")
        check(self, "trained", self.trained >= 1, "must be at least 1")
        idle = self.scaling == "none" and self.factor != 1
        check(self, "factor", not idle, 'has no effect with scaling="none"; choose a scaling')

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" else 1.0

    def frequencies(self, size: int) -> np.ndarray:
        exponent_K = np.arange(size // 2) * 2.0 / size
        if self.scaling == "ntk":
            stretch = self.factor ** (size / (size - 2)) if size > 2 else 1.0
            return (self.base * stretch) ** -exponent_K
        plain_K = self.base**-exponent_K
        if self.scaling == "linear":
            return plain_K / self.factor
        if self.scaling == "none":
            return plain_K
        turns_K = self.trained * plain_K / (2 * math.pi)
        keep_K = np.clip((turns_K - YARN_SLOW) / (YARN_FAST - YARN_SLOW), 0.0, 1.0)
        return keep_K * plain_K + (1 - keep_K) * plain_K / self.factor


YARN_SLOW, YARN_FAST = 1.0, 32.0  # turns within the trained context (arXiv:2309.00071, Sec. 3.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALiBi(Position):
    """Linear biases (arXiv:2108.12409): logit -= slope_h * distance, slope_h = 2^(-8 h / H).

    h = 1 .. H if H is a power of two. Otherwise, as in the paper's released code: the slopes of
    the largest power of two below H, then every second one of twice as many heads.
    """

    kind: ClassVar[str] = "alibi"

    def slopes(self, heads: int) -> np.ndarray:
        def geometric(count: int) -> np.ndarray:
            return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

        even = 1 << (heads.bit_length() - 1)
        return np.concatenate([geometric(even), geometric(2 * even)[::2][: heads - even]])


POSITIONS: dict[str, type[Position]] = {"rotary": Rotary, "nope": NoPE, "alibi": ALiBi}

PositionField = Annotated[Position, OneOf(lambda: POSITIONS)]

LAP = 4096  # tokens


def apply_position(
    config: Position, x_BTHK: Float[Array, "B T H K"], position_BT: Int[Array, "#B T"]
) -> Float[Array, "B T H K"]:
    """Queries or keys with their positions worked in; angles in float32."""
    frequency_K = config.frequencies(x_BTHK.shape[-1])
    if frequency_K is None:
        return x_BTHK
    half = x_BTHK.shape[-1] // 2
    # In two parts, so that at the millionth token an angle is still good to 1e-4.
    lap_K = np.fmod(LAP * frequency_K, 2 * math.pi)
    angle_BTK = (position_BT % LAP)[:, :, None] * frequency_K.astype(np.float32)
    angle_BTK += (position_BT // LAP)[:, :, None] * lap_K.astype(np.float32)
    turn_BT2K = jnp.concatenate([jnp.cos(angle_BTK), jnp.sin(angle_BTK)], -1)
    turn_BT12K = materialise(config.amplitude * turn_BT2K)[:, :, None]
    cos, sin = jnp.split(turn_BT12K, 2, -1)
    halves = x_BTHK.astype(jnp.float32).reshape(*x_BTHK.shape[:-1], 2, half)
    first, second = halves[..., 0, :], halves[..., 1, :]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], -2)
    return turned.reshape(x_BTHK.shape).astype(x_BTHK.dtype)


def positions(start_B: Int[Array, "B"], reset_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position in its document of every token, `start_B` being that of a token at t = 0."""
    return split(_positions, (start_B, reset_BT), ("B", "BT"), "BT")


def _positions(axis_name: str | None, start_B: jax.Array, reset_BT: jax.Array) -> jax.Array:
    if axis_name is not None:
        return context_parallel.positions(start_B, reset_BT, axis_name=axis_name)
    steps_T = jnp.arange(reset_BT.shape[1], dtype=jnp.int32)
    last_BT = jax.lax.cummax(jnp.where(reset_BT, steps_T, -1), axis=1)
    return jnp.where(last_BT >= 0, steps_T - last_BT, start_B[:, None] + steps_T)


def check_head_size(config: Any, d_model: int) -> None:
    """Check that heads fit the width, unless a head_size is given, and positions fit the heads."""
    if config.head_size is None:
        check_heads(config, d_model)
    size = config.head_size or d_model // config.heads
    rule = f"gives head size {size}, but rotary positions need an even one"
    even = size % 2 == 0 or not isinstance(config.position, Rotary)
    check(config, "head_size" if config.head_size else "heads", even, rule)
