"""What a memory calls an error: the attentional bias, a loss of its answer to a key.

Adding one is a frozen dataclass with `gradient` and a line in `BIASES`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

SIGN_SLOPE, SMALL = 10.0, 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bias:
    """Base of the biases. `needs_threshold`: whether it reads the `threshold` of every token."""

    kind: ClassVar[str]
    needs_threshold: ClassVar[bool] = False

    def gradient(
        self, answer: jax.Array, value: jax.Array, threshold: jax.Array | None
    ) -> jax.Array:
        """d loss / d answer; answer, value [..., V], threshold [..., 1]. Differentiable."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2(Bias):
    """loss = |answer - value|^2 / 2.

    Differs from paper: arXiv:2501.00663, Eq. 12 has no 1/2, its Appendix C has; the factor is one
    of the rate.
    """

    kind: ClassVar[str] = "l2"

    def gradient(
        self, answer: jax.Array, value: jax.Array, threshold: jax.Array | None
    ) -> jax.Array:
        del threshold
        return answer - value


@dataclasses.dataclass(frozen=True, kw_only=True)
class DotProduct(Bias):
    """loss = -answer . value: every value is added, whatever the memory answers (Hebb's rule).

    Source: arXiv:2504.13173, Sec. 3.
    """

    kind: ClassVar[str] = "dot_product"

    def gradient(
        self, answer: jax.Array, value: jax.Array, threshold: jax.Array | None
    ) -> jax.Array:
        del threshold
        return jnp.broadcast_to(-value, answer.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lp(Bias):
    """loss = sum |e|^power / power over channels, e = answer - value, with a smooth gradient:

        tanh(10 e) (e^2 + 1e-6)^((power - 1) / 2)

    power: 1 heeds only signs; above 2, large errors count for more.
    Source: arXiv:2504.13173, Sec. 5.1 (the bias of Moneta, power 3).
    Differs from paper: the factor 1 / power; it is one of the rate.
    """

    kind: ClassVar[str] = "lp"
    power: float = 3.0

    def __post_init__(self):
        if self.power < 1:
            raise ValueError(f"power={self.power} must be at least 1 for a convex loss")

    def gradient(
        self, answer: jax.Array, value: jax.Array, threshold: jax.Array | None
    ) -> jax.Array:
        del threshold
        error = answer - value
        size = (error * error + SMALL) ** ((self.power - 1) / 2)
        return jnp.tanh(SIGN_SLOPE * error) * size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Huber(Bias):
    """|e|^2 / 2 for errors shorter than the threshold, threshold (|e| - threshold / 2) for others.

    e = answer - value, |e| its Euclidean length; the threshold is one of each token, at least 0.
    Source: arXiv:2504.13173, Sec. 5.1 and Eq. 26 (the bias of Yaad).
    Differs from paper: Eq. 26 takes threshold times the gradient of an l1 loss beyond the
    threshold, which jumps there; this is the gradient of Huber's function of the length, which
    does not.
    """

    kind: ClassVar[str] = "huber"
    needs_threshold: ClassVar[bool] = True

    def gradient(
        self, answer: jax.Array, value: jax.Array, threshold: jax.Array | None
    ) -> jax.Array:
        assert threshold is not None
        error = answer - value
        square = jnp.sum(error * error, -1, keepdims=True)
        longest = jnp.maximum(jnp.maximum(square, threshold * threshold), SMALL * SMALL)
        return error * threshold / jnp.sqrt(longest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robust(Bias):
    """The largest |answer - value - shift|^2 / 2 over shifts of the value up to the threshold.

    loss = (|e| + threshold)^2 / 2, so the gradient is e (1 + threshold / sqrt(|e|^2 + 1e-6)).
    Source: arXiv:2504.13173, Sec. 5.1 (memorisation that is robust to shifts of values).
    """

    kind: ClassVar[str] = "robust"
    needs_threshold: ClassVar[bool] = True

    def gradient(
        self, answer: jax.Array, value: jax.Array, threshold: jax.Array | None
    ) -> jax.Array:
        assert threshold is not None
        error = answer - value
        length = jnp.sqrt(jnp.sum(error * error, -1, keepdims=True) + SMALL)
        return error * (1 + threshold / length)


BIASES: dict[str, type[Bias]] = {
    "l2": L2,
    "dot_product": DotProduct,
    "lp": Lp,
    "huber": Huber,
    "robust": Robust,
}
