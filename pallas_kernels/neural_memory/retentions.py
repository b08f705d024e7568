"""What a memory keeps: from what it accumulates to the weights that are read.

What is carried from block to block, A, always moves by A_t = keep_t A_{t-1} + step_t. The weights
at the start of a block are `weights(A)`; inside it they move as A does, from there. A is therefore
never made from weights, and nothing is normalised between two blocks' starts. Adding one is a
frozen dataclass with `weights` and a line in `RETENTIONS`.

`weights` is the gradient of the conjugate of what a memory must pay for its weights: with the cost
R, the weights that follow the leader are argmin R(W) - <W, A> (arXiv:2504.13173, Sec. 3.2 and 5.2).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

SMALL = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Base of the retentions.

    forgets: whether a keep gate makes sense. own_scale: whether weights are of the scale of what is
    accumulated, so that a step of one is about a step of the other.
    """

    kind: ClassVar[str]
    forgets: ClassVar[bool] = True
    own_scale: ClassVar[bool] = True

    def weights(self, accumulated: jax.Array) -> jax.Array:
        """One weight matrix [..., in, out], from its accumulator of the same shape."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightDecay(Retention):
    """W = A: the keep gate shrinks the weights themselves (the forgetting of Titans)."""

    kind: ClassVar[str] = "weight_decay"

    def weights(self, accumulated: jax.Array) -> jax.Array:
        return accumulated


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepAll(Retention):
    """W = A, and no keep gate: nothing is forgotten but what is written over."""

    kind: ClassVar[str] = "none"
    forgets: ClassVar[bool] = False

    def weights(self, accumulated: jax.Array) -> jax.Array:
        return accumulated


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElasticNet(Retention):
    """W = sign(A) max(|A| - cut, 0): small weights are dropped, the keep gate shrinks the others.

    Cost: |W|^2 / 2 + cut sum |W|. Source: arXiv:2504.13173, Sec. 5.2 (the form that accumulates).
    """

    kind: ClassVar[str] = "elastic_net"
    cut: float = 0.01

    def __post_init__(self):
        if self.cut < 0:
            raise ValueError(f"cut={self.cut} must be at least 0")

    def weights(self, accumulated: jax.Array) -> jax.Array:
        return accumulated - jnp.clip(accumulated, -self.cut, self.cut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lq(Retention):
    """W = A / (|A|_power sqrt(in))^(power - 2), one norm a matrix.

    |A|_power = (mean |A|^power + (floor / sqrt(in))^power)^(1 / power), which is near 1 / sqrt(in)
    where A is of the size that weights are drawn with. Above power 3 the weights shrink as A grows:
    only their direction is to be relied on.
    Source: arXiv:2504.13173, Sec. 5.2 and Eq. 24 (the retention of Moneta, power 4).
    Differs from paper: a mean for a sum, and sqrt(in), which are factors of the cost (and so of the
    rate), with which a step of A is about a step of W; the floor, because at power 4 the map of
    Eq. 24 has no limit at A = 0. It is the gradient of no cost above power 2: see `Mirror`.
    """

    kind: ClassVar[str] = "lq"
    own_scale: ClassVar[bool] = False
    power: float = 4.0
    floor: float = 0.5

    def __post_init__(self):
        _check_power(self.power)
        if self.floor <= 0:
            raise ValueError(f"floor={self.floor} must be greater than 0")

    def weights(self, accumulated: jax.Array) -> jax.Array:
        scale = accumulated.shape[-2] ** 0.5
        size = power_mean(accumulated, self.power, self.floor / scale)
        return accumulated * (size * scale) ** (2 - self.power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mirror(Retention):
    """W = sign(A) |A|^(power - 1) / |A|_power^(power - 2): large entries stand out more.

    |A|_power = (mean |A|^power)^(1 / power), one a matrix.
    Cost: |W|_q^2 / 2 with 1 / q + 1 / power = 1, times the number of entries. W is of the scale of
    A, and 0 where A is 0.
    Source: arXiv:2504.13173, Sec. 5.2, whose cost this is, but for the factor.
    Differs from paper: it prints the map of `Lq` for the weights of least cost, which they are not.
    """

    kind: ClassVar[str] = "mirror"
    own_scale: ClassVar[bool] = False
    power: float = 2.5

    def __post_init__(self):
        _check_power(self.power)

    def weights(self, accumulated: jax.Array) -> jax.Array:
        part = accumulated / power_mean(accumulated, self.power, SMALL)
        return accumulated * (part * part + SMALL * SMALL) ** ((self.power - 2) / 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KL(Retention):
    """W = c softmax(A in / c), c = total sqrt(in): what an output takes of its inputs sums to c.

    The softmax is over inputs. A is a logarithm of W, but for a factor: that of the cost, with
    which a step of A is a step of W where W is uniform. The keep gate draws towards that.
    Cost: c / in sum W log W, on that simplex.
    Source: arXiv:2504.13173, Sec. 5.2 and Eq. 27 (the retention of Memora).
    Differs from paper: logarithms are carried instead of weights, which is the same for a keep gate
    of a matrix; inside a block weights move along a line from where it began, as in Eqs. 30-32, but
    the next block begins at the softmax and not at a logarithm of a weight that may be negative.
    """

    kind: ClassVar[str] = "kl"
    own_scale: ClassVar[bool] = False
    total: float = 1.0

    def __post_init__(self):
        if self.total <= 0:
            raise ValueError(f"total={self.total} must be greater than 0")

    def weights(self, accumulated: jax.Array) -> jax.Array:
        inputs = accumulated.shape[-2]
        sum_of_inputs = self.total * inputs**0.5
        return sum_of_inputs * jax.nn.softmax(accumulated * (inputs / sum_of_inputs), -2)


def power_mean(matrix: jax.Array, power: float, floor: float) -> jax.Array:
    """(mean |x|^power + floor^power)^(1 / power) of matrices [..., in, out], as [..., 1, 1].

    Entries are divided by the largest first: their powers overflow long before they do.
    """
    peak = jnp.max(jnp.abs(matrix), (-2, -1), keepdims=True)
    peak = lax.stop_gradient(jnp.maximum(peak, floor))
    part = matrix / peak
    mean = jnp.mean((part * part) ** (power / 2), (-2, -1), keepdims=True)
    return peak * (mean + (floor / peak) ** power) ** (1 / power)


def _check_power(power: float) -> None:
    if power < 2:
        raise ValueError(
            f"power={power} must be at least 2: costs with a smooth solution have such a conjugate"
        )


RETENTIONS: dict[str, type[Retention]] = {
    "weight_decay": WeightDecay,
    "none": KeepAll,
    "elastic_net": ElasticNet,
    "lq": Lq,
    "mirror": Mirror,
    "kl": KL,
}
