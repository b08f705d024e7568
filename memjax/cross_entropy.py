"""Cross-entropy without the logits of a whole batch.

    log Z  = log sum_y exp(logit_y)
    total  = sum(weight * (log Z - logit[target])) + z_loss * sum(weight * log(Z)^2)

in float32 and natural logarithms. With a large vocabulary the logits are larger than all else, so
the tokens are taken in pieces, and each piece's gradients are made beside its loss and then its
logits are forgotten: memory for one piece, and three products as without pieces (with
`jax.checkpoint` there would be four).

Pieces are of tokens and not of the vocabulary: a softmax needs its whole row, so pieces of rows
would make all logits a second time for the gradient. Tokens are dealt out in turn, so no token
leaves its device where the sequence is split over several.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.sharding import constrain
from pallas_kernels.dispatch import current_target

LOGITS = {"cpu": 1 << 22, "other": 1 << 25}
"""Logits held at a time on a device. On a CPU 16 MiB of them are quicker than all (measured with
8,192 words: 1.4 s against 2.3 s); an accelerator wants larger products."""

Logits = Callable[[jax.Array, jax.Array], jax.Array]
"""(hidden_BTD, table) -> logits_BTY, float32; it must not close over what is differentiated.

The table is [Y, D], or on a mesh [L, S, Y, D], a copy for the lanes and the tokens of each device
(`memjax.gathering.copies`): gradients of pieces are added to on each device, and summed once.
"""


class Score(NamedTuple):
    """Sums over the tokens: total is what is differentiated; nll and z are constants."""

    total: jax.Array
    nll: jax.Array
    z: jax.Array


def cross_entropy(
    logits: Logits,
    hidden_BTD: Float[Array, "B T D"],
    table_YD: Float[Array, "*copies Y D"],
    targets_BT: Int[Array, "B T"],
    weight_BT: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    pieces: int = 1,
) -> Score:
    """The sums of the module's head, the tokens taken in `pieces`.

    Gradients of total reach hidden, table and weight.
    """
    if pieces == 1:
        logits_BTY = logits(hidden_BTD, table_YD)
        z_BT, nll_BT = _token(logits_BTY, targets_BT)
        nll, z = jnp.sum(weight_BT * nll_BT), jnp.sum(weight_BT * jnp.square(z_BT))
        total = nll + z_loss * z
    else:
        total, nll, z = _in_pieces(
            logits, z_loss, pieces, hidden_BTD, table_YD, targets_BT, weight_BT
        )
    return Score(total, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(z))


def count_pieces(rows: int, length: int, vocab_size: int, devices: int = 1) -> int:
    """Pieces into which segments of so many tokens are cut; 1 where the logits are few.

    devices: those over which the logits are split.
    """
    held = LOGITS["cpu" if current_target().platform == "cpu" else "other"] * devices
    needed = min(length, -(-rows * length * vocab_size // held))
    even = (n for n in range(needed, 2 * needed) if length % n == 0)
    return next(even, needed)


def _token(logits_BTY: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log Z and nll of each token."""
    z_BT = jax.nn.logsumexp(logits_BTY, -1)
    chosen_BT1 = jnp.take_along_axis(logits_BTY, targets_BT[..., None], -1)
    return z_BT, z_BT - chosen_BT1[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_pieces(
    logits: Logits, z_loss: float, pieces: int, hidden_BTD, table_YD, targets_BT, weight_BT
) -> Score:
    def add(sums, xs):
        hidden_BCD, targets_BC, weight_BC = xs
        z_BC, nll_BC = _token(logits(hidden_BCD, table_YD), targets_BC)
        return jax.tree.map(jnp.add, sums, _sums(z_loss, weight_BC, z_BC, nll_BC)), None

    xs = tuple(_deal(x, pieces) for x in (hidden_BTD, targets_BT, weight_BT))
    return jax.lax.scan(add, _zero(), xs)[0]


def _forward(logits, z_loss, pieces, hidden_BTD, table_YD, targets_BT, weight_BT):
    def add(carry, xs):
        sums, dtable_YD = carry
        hidden_BCD, targets_BC, weight_BC = xs
        logits_BCY, pull = jax.vjp(logits, hidden_BCD, table_YD)
        z_BC, nll_BC = _token(logits_BCY, targets_BC)
        # d total / d logit = weight * (softmax * (1 + 2 z_loss log Z) - [target])
        scale_BC = weight_BC * (1 + 2 * z_loss * z_BC)
        dlogits_BCY = scale_BC[..., None] * jnp.exp(logits_BCY - z_BC[..., None])
        at_target_BCY = jnp.arange(logits_BCY.shape[-1]) == targets_BC[..., None]
        dlogits_BCY -= jnp.where(at_target_BCY, weight_BC[..., None], 0)
        dhidden_BCD, add_YD = pull(dlogits_BCY)
        sums = jax.tree.map(jnp.add, sums, _sums(z_loss, weight_BC, z_BC, nll_BC))
        dweight_BC = nll_BC + z_loss * jnp.square(z_BC)
        return (sums, dtable_YD + add_YD), (dhidden_BCD, dweight_BC)

    xs = tuple(_deal(x, pieces) for x in (hidden_BTD, targets_BT, weight_BT))
    nothing_YD = jnp.zeros(table_YD.shape, jnp.float32)
    if nothing_YD.ndim == 4:
        nothing_YD = constrain(nothing_YD, "lanes", "tokens", "vocab")
    zero = (_zero(), nothing_YD)
    (sums, dtable_YD), gradients = jax.lax.scan(add, zero, xs)
    dhidden_BTD, dweight_BT = (_collect(x, hidden_BTD.shape[1]) for x in gradients)
    return sums, (dhidden_BTD, dtable_YD.astype(table_YD.dtype), dweight_BT)


def _backward(logits, z_loss, pieces, gradients, out: Score):
    dhidden_BTD, dtable_YD, dweight_BT = (g * out.total.astype(g.dtype) for g in gradients)
    return dhidden_BTD, dtable_YD, None, dweight_BT


_in_pieces.defvjp(_forward, _backward)


def _sums(z_loss: float, weight_BC, z_BC, nll_BC) -> Score:
    nll, z = jnp.sum(weight_BC * nll_BC), jnp.sum(weight_BC * jnp.square(z_BC))
    return Score(nll + z_loss * z, nll, z)


def _zero() -> Score:
    return Score(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def _deal(x_BT: jax.Array, pieces: int) -> jax.Array:
    """[pieces, B, C, ...]: token t goes to piece t mod pieces; zeros fill up the last round."""
    rows, length = x_BT.shape[:2]
    extra = -length % pieces
    if extra:
        x_BT = jnp.pad(x_BT, ((0, 0), (0, extra), *((0, 0),) * (x_BT.ndim - 2)))
    return jnp.moveaxis(x_BT.reshape(rows, -1, pieces, *x_BT.shape[2:]), 2, 0)


def _collect(x_NBC: jax.Array, length: int) -> jax.Array:
    """The inverse of `_deal`."""
    x_BCN = jnp.moveaxis(x_NBC, 0, 2)
    return x_BCN.reshape(x_BCN.shape[0], -1, *x_BCN.shape[3:])[:, :length]
