"""Parts that mixers and models share: linear maps, norms, the MLP, short convolution."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from memjax import sharding
from memjax.config import check, check_at_least
from memjax.gathering import sum_to_parts
from memjax.norms import unit_norm, unit_rms
from pallas_kernels import context_parallel
from pallas_kernels.once import once
from pallas_kernels.sums import scaled

PRODUCT = "product"


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float = 0.02) -> jax.Array:
    """Float32 draws from N(0, std)."""
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


class _Product(nnx.Module):
    """W x (+ b), W stored [*pair, out, in]. What `Linear` and `LinearPair` share."""

    pair: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        rngs: nnx.Rngs,
        axes: tuple[str, str] = ("hidden", "embed"),
        bias: bool = False,
        std: float = 0.02,
    ):
        names, shape = (*["pair"] * len(self.pair), *axes), (*self.pair, size_out)
        self.weight = nnx.Param(normal(rngs, (*shape, size_in), std), axes=names, summed=True)
        self.bias = nnx.Param(jnp.zeros(shape, jnp.float32), axes=names[:-1]) if bias else None

    def _times(self, x: jax.Array) -> jax.Array:
        y = dot_transposed(x, self.weight[...], axes=self.weight.get_metadata()["axes"])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Linear(_Product):
    """y = W x (+ b), with W stored [out, in], which is 1.3 times as fast to train on a CPU.

    Parameters are float32; products run in the type of x and accumulate in float32.
    `axes` names the logical axes of W, from which `memjax.sharding` derives its placement.
    """

    pair = ()

    def __call__(self, x: Float[Array, "*lead size_in"]) -> Float[Array, "*lead size_out"]:
        return self._times(x)


class LinearPair(_Product):
    """(y, z) = (W_0 x, W_1 x) (+ b), in one product; W is stored [2, out, in].

    Where hidden channels are split over devices, each has the same channels of both.
    `axes` names the logical axes of W_0 and of W_1.
    """

    pair = (2,)

    def __call__(self, x: Float[Array, "*lead size_in"]) -> list[jax.Array]:
        y = self._times(x)
        return [y[..., i, :] for i in range(2)]


def dot_transposed(
    x: jax.Array,
    weight: jax.Array,
    dtype: jax.typing.DTypeLike | None = None,
    axes: tuple[str, ...] | None = None,
) -> jax.Array:
    """x @ weight.T in the type of x, accumulated in float32, returned as `dtype` (that of x).

    A weight [2, out, in] makes [..., 2, out].

    axes: those of a parameter that is gathered as `summed` (`memjax.gathering`).
    Named PRODUCT for the policies of `jax.checkpoint`, which do not see into its own gradient.
    """
    y = _dot_transposed(x, weight, jnp.dtype(x.dtype if dtype is None else dtype), axes)
    return checkpoint_name(y, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot_transposed(x: jax.Array, weight: jax.Array, dtype: jnp.dtype, axes: Any) -> jax.Array:
    return _contract(x, weight.astype(x.dtype), [x.ndim - 1], [weight.ndim - 1]).astype(dtype)


def _forward(x: jax.Array, weight: jax.Array, dtype: jnp.dtype, axes: Any):
    return _dot_transposed(x, weight, dtype, axes), (x, weight)


def _backward(dtype: jnp.dtype, axes: Any, residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, weight = residuals
    return _input_gradient(x, weight, dy), _parameter_gradient(x, weight, dy, axes)


def _input_gradient(x: jax.Array, weight: jax.Array, dy: jax.Array) -> jax.Array:
    over = range(weight.ndim - 1)
    over_dy = [x.ndim - 1 + i for i in over]
    return _contract(dy.astype(x.dtype), weight.astype(x.dtype), over_dy, over).astype(x.dtype)


def _parameter_gradient(x: jax.Array, weight: jax.Array, dy: jax.Array, axes: Any) -> jax.Array:
    dy = dy.astype(x.dtype)
    if sharding.active() is None:
        dw = _local_weight_gradient(x, dy)
    elif axes is None:  # lanes and tokens that are split over devices cannot be made one axis
        dw = _weight_gradient(x, dy)
    else:
        dw = sum_to_parts(_local_weight_gradient, x, dy, axes)
    return dw.astype(weight.dtype)


_dot_transposed.defvjp(_forward, _backward)


def dot_parted(
    x: jax.Array, weight: jax.Array, axes: tuple[str, str] | None = None
) -> tuple[jax.Array, jax.Array]:
    """`dot_transposed`, twice: weight learns from the first result alone, x from the second.

    For what a map makes of inputs that it shall learn from, and they not, or from less of it.
    """
    of_weight, of_x = _dot_parted(x, weight, axes)
    return checkpoint_name(of_weight, PRODUCT), checkpoint_name(of_x, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot_parted(x: jax.Array, weight: jax.Array, axes: Any) -> tuple[jax.Array, jax.Array]:
    y = _dot_transposed(x, weight, jnp.dtype(x.dtype), axes)
    return y, y


def _forward_parted(x: jax.Array, weight: jax.Array, axes: Any):
    return _dot_parted(x, weight, axes), (x, weight)


def _backward_parted(axes: Any, residuals: tuple[jax.Array, jax.Array], cotangents: tuple):
    (x, weight), (of_weight, of_x) = residuals, cotangents
    return _input_gradient(x, weight, of_x), _parameter_gradient(x, weight, of_weight, axes)


_dot_parted.defvjp(_forward_parted, _backward_parted)


def _contract(x: jax.Array, y: jax.Array, over_x: Sequence[int], over_y: Sequence[int]):
    contract = ((tuple(over_x), tuple(over_y)), ((), ()))
    return jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


def _weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    lead = range(x.ndim - 1)
    return _contract(dy, x, lead, lead)


def _local_weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """On one device."""
    return jax.lax.platform_dependent(x, dy, cpu=_weight_gradient_cpu, default=_weight_gradient)


def _weight_gradient_cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
    """In one product of two matrices: 1.45 times as fast as in two halves of the tokens."""
    shape = *dy.shape[x.ndim - 1 :], x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    return _weight_gradient(x, dy.reshape(x.shape[0], -1)).reshape(shape)


class RMSNorm(nnx.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis; statistics in float32."""

    def __init__(self, size: int, *, axes: tuple[str, ...] = ("embed",), eps: float = 1e-6):
        self.weight = nnx.Param(jnp.ones((size,), jnp.float32), axes=axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead size"]) -> Float[Array, "*lead size"]:
        return scaled(unit_rms(x, self.eps), self.weight[...]).astype(x.dtype)


def top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest of the last axis, falling, and their places: `jax.lax.top_k`.

    Behind a barrier: XLA finds its fast selection by the slice of a sort, which it otherwise joins
    with slices that follow; on a CPU the largest 32 of 1,024 then take 14 times as long.
    """
    values, places = jax.lax.top_k(x, count)
    # One barrier each: where XLA divides programs over devices, it cannot have one for both.
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)


def l2_normalise(x: Float[Array, "*lead size"], eps: float = 1e-6) -> Float[Array, "*lead size"]:
    """x / sqrt(sum(x^2) + eps) over the last axis, in float32."""
    return unit_norm(x, eps).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """The MLP of a block: width = ratio * d_model, rounded up to a multiple of 8, of 16 from 1,024.

    Gradients of other widths the compiler for TPU sums whole on every chip, where each needs a
    part: twice the traffic (`experiments/scaling`).
    """

    kind: ClassVar[str]
    ratio: float = 8 / 3

    def __post_init__(self):
        check(self, "ratio", self.ratio > 0, "must be greater than 0")

    def width(self, d_model: int) -> int:
        wanted = self.ratio * d_model
        step = 16 if wanted >= 1024 else 8
        return step * math.ceil(wanted / step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLU(GatedMLP):
    """A gate of SiLU (arXiv:2002.05202)."""

    kind: ClassVar[str] = "swiglu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeGLU(GatedMLP):
    """A gate of GELU, in its tanh form (arXiv:2002.05202)."""

    kind: ClassVar[str] = "geglu"


MLPS: dict[str, type[GatedMLP]] = {"swiglu": SwiGLU, "geglu": GeGLU}
GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """y = W_out (gate(a) * b), with (a, b) = W_in x in one product."""

    def __init__(self, config: GatedMLP, d_model: int, *, rngs: nnx.Rngs):
        width = config.width(d_model)
        self.gate = config.kind
        self.into = LinearPair(d_model, width, rngs=rngs)
        self.out = Linear(width, d_model, rngs=rngs, axes=("embed", "hidden"))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_BTF, up_BTF = self.into(x_BTD)
        return self.out(GATES[self.gate](gate_BTF) * up_BTF)


def materialise(x: jax.Array) -> jax.Array:
    """x, through a product with the identity: XLA on CPU never computes a product twice.

    Anything cheaper than a product it may compute again for every head that reads it.
    """
    return jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST)


def document_ids(reset_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Which document a token belongs to: 0 is the one that the state carries on.

    A running sum made of two products, in blocks and of blocks: XLA on CPU would compute a plain
    one again for every block of attention that reads it.
    """
    return sharding.split(_document_ids, (reset_BT,), ("BT",), "BT")


def _document_ids(axis_name: str | None, reset_BT: jax.Array) -> jax.Array:
    if axis_name is not None:
        return context_parallel.document_numbers(reset_BT, axis_name=axis_name)
    batch, length = reset_BT.shape
    block = min(256, length)
    count = -(-length // block)
    padded_BT = jnp.pad(reset_BT, ((0, 0), (0, count * block - length)))
    starts_BNC = padded_BT.reshape(batch, count, block).astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST  # sums of ones: exact below 2^24
    inside_BNC = jnp.dot(starts_BNC, jnp.triu(jnp.ones((block, block))), precision=highest)
    before_NN = jnp.triu(jnp.ones((count, count)), 1)
    before_BN = jnp.dot(inside_BNC[:, :, -1], before_NN, precision=highest)
    ids_BNC = materialise(inside_BNC + before_BN[:, :, None])
    return ids_BNC.reshape(batch, -1)[:, :length].astype(jnp.int32)


class ShortConv(nnx.Module):
    """Causal depthwise convolution: y_t = sum_j weight_j * x_{t-j}, j < width (+ bias).

    The tail, the last width - 1 inputs of the document so far (zero before it), is state; taps
    that reach across a reset, or before the document, see zero. No activation: the caller applies
    its own.
    """

    def __init__(self, size: int, width: int, *, rngs: nnx.Rngs, bias: bool = False):
        bound = width**-0.5
        weight = jax.random.uniform(rngs.params(), (width, size), jnp.float32, -bound, bound)
        self.weight = nnx.Param(weight, axes=("conv", "hidden"))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), axes=("hidden",)) if bias else None
        self.width = width

    def __call__(
        self,
        tail_BMF: Float[Array, "B M F"],
        x_BTF: Float[Array, "B T F"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B M F"], Float[Array, "B T F"]]:
        bias_F = None if self.bias is None else self.bias[...]
        args = (self.weight[...], bias_F, tail_BMF, x_BTF, reset_BT)
        axes, out_axes = ("WF", "F", "BMF", "BTF", "BT"), ("BMF", "BTF")
        return sharding.split(self._local, args, axes, out_axes, least_tokens=self.width - 1)

    def _local(self, axis_name: str | None, weight_WF, bias_F, tail_BMF, x_BTF, reset_BT):
        if axis_name is not None:
            tail_BMF, last_BMF = context_parallel.exchange_tail(
                x_BTF, tail_BMF, reset_BT, axis_name=axis_name
            )
            return last_BMF, self._convolve(weight_WF, bias_F, tail_BMF, x_BTF, reset_BT)[1]
        return self._convolve(weight_WF, bias_F, tail_BMF, x_BTF, reset_BT)

    def _convolve(self, weight_WF, bias_F, tail_BMF, x_BTF, reset_BT):
        length, reach = x_BTF.shape[1], self.width - 1
        weight_WF = weight_WF.astype(x_BTF.dtype)
        padded_BJF = jnp.concatenate([tail_BMF.astype(x_BTF.dtype), x_BTF], 1)
        y_BTF = scaled(x_BTF, weight_WF[0])
        if reach > 0:
            same_BTM = self._reaches(reset_BT, x_BTF.dtype)
        for lag in range(1, self.width):
            taps_BTF = padded_BJF[:, reach - lag : reach - lag + length]
            y_BTF += scaled(same_BTM[:, :, lag - 1 : lag] * taps_BTF, weight_WF[lag])
        if bias_F is not None:
            y_BTF += bias_F.astype(y_BTF.dtype)
        id_BJ = jnp.pad(document_ids(reset_BT), ((0, 0), (reach, 0)))
        ours_BM1 = (id_BJ[:, length:] == id_BJ[:, -1:])[..., None]
        tail_BMF = jnp.where(ours_BM1, padded_BJF[:, length:], 0).astype(jnp.float32)
        return tail_BMF, once(y_BTF)

    def _reaches(self, reset_BT: Bool[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T M"]:
        """1 where no reset lies in the way from a token to the one 1, 2, ... before it, else 0."""
        open_BTM, clear_BT = [], ~reset_BT
        for lag in range(1, self.width):
            earlier_BT = jnp.pad(~reset_BT, ((0, 0), (lag, 0)), constant_values=True)
            open_BTM.append(clear_BT)
            clear_BT = clear_BT & earlier_BT[:, : reset_BT.shape[1]]
        return materialise(jnp.stack(open_BTM, -1).astype(dtype))


def check_heads(config: object, d_model: int, field: str = "heads") -> None:
    """Check that the heads divide the width."""
    check_at_least(config, 1, field)
    fits = [h for h in range(1, d_model + 1) if d_model % h == 0]
    heads = getattr(config, field)
    near = min(fits, key=lambda h: abs(h - heads))
    check(config, field, d_model % heads == 0, f"must divide d_model={d_model}; try {near}")
