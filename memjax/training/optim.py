"""Optimizers and learning-rate schedules.

What is decayed, and what Muon orthogonalises, follows from the logical axes of a parameter
(`memjax.model.logical_axes`) without the leading axes of stacked layers and of pairs: a norm's
weight stacked over 12 layers is a vector, not a matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from memjax.config import ConfigError
from memjax.training.config import Optimizer

MUON_RMS = 0.2  # size of an orthogonalised update, so that Muon shares AdamW's learning rates


def make_optimizer(
    config: Optimizer, steps: int, axes: dict
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation, and its learning rate as a function of the update's number.

    steps: steps of the run, the length of the schedule unless config.schedule_steps is set.
    axes: logical axes of every parameter.
    Raises ConfigError if table_rate is set and there is no table.
    """
    schedule = make_schedule(config, steps)
    decayed = _over_axes(is_decayed, axes)
    update = {"adamw": _adamw, "muon": _muon, "lion": _lion}[config.name]
    clip = [] if config.clip is None else [clip_by_norm(config.clip)]
    tables = [] if config.table_rate == 1 else [_scale_tables(config.table_rate, axes)]
    return optax.chain(*clip, update(config, schedule, decayed, axes), *tables), schedule


def _scale_tables(rate: float, axes: dict) -> optax.GradientTransformation:
    """Updates of tables times `rate`; tables are not decayed, so this is their learning rate."""
    table = _over_axes(is_table, axes)
    if not any(jax.tree.leaves(table)):
        rule = (
            "no parameter of the model is a large table (product_keys, memory_plus); leave it out"
        )
        raise ConfigError(f"config.optimizer.table_rate={rate}: {rule}")

    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda u, scaled: rate * u if scaled else u, updates, table)

    return optax.stateless(scale)


def clip_by_norm(limit: float) -> optax.GradientTransformation:
    """Scale the gradients so that the norm of all of them is at most `limit`.

    By one factor, which compilers fold into what reads the gradients; `optax.clip_by_global_norm`
    divides each of them, for which XLA holds a second copy of all gradients.
    """

    def scale(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, limit / jnp.maximum(optax.tree.norm(updates), 1e-37))
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(scale)


def make_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then config.schedule; from the last step on, its end value.

    A run no longer than its warm-up is warm-up alone.
    """
    steps, peak, warmup = config.schedule_steps or steps, config.learning_rate, config.warmup
    if config.schedule == "constant" or warmup >= steps:
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup, config.final)
    else:
        falling = max(1, min(round(config.decay * steps), steps - warmup))
        fall = optax.linear_schedule(peak, config.final * peak, falling)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), fall], [steps - warmup - falling]
        )
    if warmup == 0:
        return after
    # The first update is number 0: it takes 1 / warmup of the rate, not none.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def is_decayed(axes: tuple[str, ...]) -> bool:
    """Whether weight decay applies: to matrices; not to norms, biases, gates, convolutions.

    Nor to large tables ("rows"): it would wear down the rows that no token reads.
    """
    axes = _of_one(axes)
    return len(axes) >= 2 and not {"conv", "rows"} & set(axes)


def is_table(axes: tuple[str, ...]) -> bool:
    """Whether the parameter is a large table, of which a token reads a few rows."""
    return "rows" in axes


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether Muon updates the parameter: a matrix [out, in] between two hidden spaces."""
    axes = _of_one(axes)
    return len(axes) == 2 and not {"conv", "vocab", "rows"} & set(axes)


def _of_one(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of one of several parameters that are kept in one array."""
    return tuple(name for name in axes if name not in ("layers", "pair"))


def _over_axes(fn: Any, axes: dict) -> dict:
    return jax.tree.map(fn, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _adamw(config: Optimizer, schedule: optax.Schedule, decayed: dict, axes: dict):
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def _lion(config: Optimizer, schedule: optax.Schedule, decayed: dict, axes: dict):
    return optax.lion(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def _muon(config: Optimizer, schedule: optax.Schedule, decayed: dict, axes: dict):
    """Muon on the matrices, each layer's by itself, and AdamW on every other parameter."""

    def label(names: tuple[str, ...]) -> str:
        return "matrix" if is_matrix(names) else "other"

    labels = _over_axes(label, axes)

    def dimensions(params: Any) -> Any:
        # optax.partition hides the other parameters behind MaskedNode, an empty tree.
        return jax.tree.map(lambda leaf: MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2), params)

    matrix = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum, eps=config.eps, weight_dimension_numbers=dimensions
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_consistent, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    other = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: _visible(decayed, params),
    )
    return optax.partition({"matrix": matrix, "other": other}, labels)


def _consistent(update: jax.Array) -> jax.Array:
    """An orthogonal matrix scaled so that its entries have a mean square of MUON_RMS^2."""
    return update * (MUON_RMS * max(update.shape[-2:]) ** 0.5)


def _visible(mask: dict, params: Any) -> Any:
    """`mask` with the holes of `params`."""
    hole = optax.MaskedNode()
    return jax.tree.map(
        lambda leaf, keep: hole if isinstance(leaf, optax.MaskedNode) else keep,
        params,
        mask,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
