"""The training step: a pure function of the state and a batch.

    state, metrics = step(state, batch)

    loss = sum(weight * nll) / sum(weight) + z_loss * sum(weight * log(Z)^2) / sum(weight)
           + mean of the auxiliary losses of the mixers

over the global batch, in float32, natural logarithms. A step reads `horizon` segments a row; the
memory is threaded through them and the gradient flows through all of them. What the step before
left is a constant: this is the one place that cuts the gradient.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from memjax import sharding
from memjax.config import ConfigError
from memjax.experiment import Experiment
from memjax.model import LANE_AXIS, LanguageModel, logical_axes, merge, split
from memjax.training.compiler import compiler_options
from memjax.training.optim import make_optimizer


class TrainState(NamedTuple):
    """All that a run needs to go on, besides its config and its data.

    memory: carried state of every layer; an empty tuple without train.carry.
    ema: moving average of params; an empty tuple without optimizer.ema.
    step: batches read. skipped: those whose update was left out; skipped_in_row: the latest ones.
    rng: the base key; step and micro-batch are folded in.
    """

    params: dict
    opt_state: Any
    memory: Any
    ema: Any
    step: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    rng: jax.Array


class Metrics(NamedTuple):
    """Scalars of one step.

    loss: nats a token. z: mean of log(Z)^2. auxiliary: losses of the mixers, weighted. tokens: sum
    of the weights. grad_norm: before clipping. learning_rate: of this update. finite: whether the
    update was made.
    """

    loss: jax.Array
    z: jax.Array
    auxiliary: jax.Array
    tokens: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


class Trainer(NamedTuple):
    """What is built once for a run.

    init: () -> TrainState, born sharded. step: donates its state. abstract: shapes, types and
    shardings of the state.
    """

    definition: nnx.GraphDef
    init: Callable[[], TrainState]
    step: jax.stages.Wrapped
    abstract: TrainState
    mesh: Mesh


def make_trainer(experiment: Experiment, vocab_size: int, mesh: Mesh | None = None) -> Trainer:
    """Build the state and the step of `experiment`, compiled once each.

    Raises ConfigError if the batch cannot be divided over devices and micro-batches.
    """
    mesh = mesh or sharding.make_mesh(experiment.mesh, experiment.data.batch)
    _check_rows(experiment, mesh)
    axes = logical_axes(experiment.model, vocab_size)
    optimizer, schedule = make_optimizer(experiment.optimizer, experiment.train.steps, axes)
    make = _initialiser(experiment, vocab_size, optimizer)
    shapes = jax.eval_shape(make)
    placed = _shardings(mesh, axes, shapes)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        placed,
    )
    definition = _definition(experiment, vocab_size)
    options = compiler_options()
    step = jax.jit(
        on_mesh(make_step(experiment, definition, optimizer, schedule, placed), mesh),
        donate_argnums=0,
        in_shardings=(placed, sharding.batch(mesh)),
        out_shardings=(placed, sharding.replicated(mesh)),
        compiler_options=options,
    )
    init = jax.jit(on_mesh(make, mesh), out_shardings=placed, compiler_options=options)
    return Trainer(definition, init, step, abstract, mesh)


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """The function, traced for `mesh`."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with sharding.over(mesh):
            return function(*args)

    return traced


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows as part of the global batch, on the devices."""
    place = sharding.batch(mesh)
    if jax.process_count() == 1:
        return {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}
    local, length = batch["tokens_BT"].shape
    index, count = sharding.process_rows(mesh, local * jax.process_count())
    rows, first = local * count, index * local

    def of_device(local_BT: Any, at: tuple[slice, ...]) -> Any:
        start, stop, _ = at[0].indices(rows)
        return local_BT[start - first : stop - first, at[1]]

    def whole(local_BT: Any) -> jax.Array:
        here = functools.partial(of_device, local_BT)
        return jax.make_array_from_callback((rows, length), place, here)

    return {k: whole(v) for k, v in batch.items()}


def make_step(
    experiment: Experiment,
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    placed: TrainState | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """The pure step, not compiled. placed: the shardings of the state; None for one device."""
    config = experiment.train
    gradient = _gradient(experiment, definition, placed)

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        tokens = jnp.sum(batch["weight_BT"])
        sums, grads, memory = gradient(state.params, state.memory, batch, key, tokens)
        grad_norm = optax.tree.norm(grads)
        count = jnp.maximum(tokens, 1.0)
        loss, z, auxiliary = sums.nll / count, sums.z / count, sums.auxiliary / config.pieces
        finite = jnp.isfinite(loss + config.z_loss * z + auxiliary) & jnp.isfinite(grad_norm)
        if config.carry:  # otherwise nothing reads the memory, and nothing need keep it
            finite &= ~_any_nan(memory)

        def update():
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = _average(experiment.optimizer.ema, state.ema, params)
            return params, opt_state, memory if config.carry else (), ema

        old = (state.params, state.opt_state, state.memory, state.ema)
        params, opt_state, memory, ema = jax.lax.cond(finite, update, lambda: old)
        skipped = state.skipped + ~finite
        in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
        rate = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)
        metrics = Metrics(loss, z, auxiliary, tokens, grad_norm, rate, finite, skipped, in_row)
        state = TrainState(
            params, opt_state, memory, ema, state.step + 1, skipped, in_row, state.rng
        )
        return state, metrics

    return step


class _Sums(NamedTuple):
    total: jax.Array
    nll: jax.Array
    z: jax.Array
    auxiliary: jax.Array


def _gradient(
    experiment: Experiment, definition: nnx.GraphDef, placed: TrainState | None = None
) -> Callable:
    """(params, memory, batch, key, tokens) -> sums, gradient of the loss, memory after."""
    config = experiment.train
    devices = 1 if placed is None else jax.tree.leaves(placed)[0].mesh.size

    def split_as_params(grads):
        """Accumulators are split over the devices as the parameters are."""
        if placed is None or devices == 1:
            return grads
        return jax.tree.map(jax.lax.with_sharding_constraint, grads, placed.params)

    def loss(params, memory, batch, key, tokens):
        lm = merge(definition, params)
        start = jax.lax.stop_gradient(memory) if config.carry else None
        sums, memory = read_batch(experiment, lm, start, batch, key, devices)
        total = sums.total / jnp.maximum(tokens, 1.0)
        return total + sums.auxiliary / config.pieces, (sums, memory)

    def part(params, memory, batch, key, tokens):
        grads, (sums, memory) = jax.grad(loss, has_aux=True)(params, memory, batch, key, tokens)
        return sums, grads, memory

    if config.accumulate == 1:
        return part

    def parts(params, memory, batch, key, tokens):
        def add(carry, xs):
            index, memory, batch = xs
            sums, grads, memory = part(
                params, memory, batch, jax.random.fold_in(key, index), tokens
            )
            sums, grads = jax.tree.map(jnp.add, carry, (sums, grads))
            return (sums, split_as_params(grads)), memory if config.carry else ()

        zero_grads = split_as_params(jax.tree.map(jnp.zeros_like, params))
        zero = (_Sums(*[jnp.zeros(())] * 4), zero_grads)
        count = config.accumulate
        xs = (
            jnp.arange(count),
            jax.tree.map(lambda x: _deal(x, count, LANE_AXIS), memory),
            jax.tree.map(lambda x: _deal(x, count, 0), batch),
        )
        (sums, grads), memory = jax.lax.scan(add, zero, xs)
        return sums, grads, jax.tree.map(lambda x: _collect(x, LANE_AXIS), memory)

    return parts


def read_batch(experiment: Experiment, lm: LanguageModel, state, batch, key, devices: int = 1):
    """Sums over the segments of a batch, and the memory after the last of them.

    state: the memory before it; None is that of new documents.
    """
    horizon, z_loss = experiment.train.horizon, experiment.train.z_loss
    dropout = experiment.model.dropout > 0

    def segment(state, xs):
        batch, key = xs
        state, hidden_BTD, auxiliary = lm.read(
            state, batch["tokens_BT"], batch["reset_BT"], dropout_key=key if dropout else None
        )
        targets_BT, weight_BT = batch["targets_BT"], batch["weight_BT"]
        score = lm.score(hidden_BTD, targets_BT, weight_BT, z_loss=z_loss, devices=devices)
        return state, _Sums(*score, auxiliary)

    if horizon == 1:
        state, sums = segment(state, (batch, key))
        return sums, state

    def cut(x_BT):
        x_NBT = jnp.swapaxes(x_BT.reshape(x_BT.shape[0], horizon, -1), 0, 1)
        return sharding.constrain(x_NBT, None, "lanes", "tokens")

    state = lm.init_state(batch["tokens_BT"].shape[0]) if state is None else state
    segments = (jax.tree.map(cut, batch), jax.random.split(key, horizon))
    state, sums = jax.lax.scan(jax.checkpoint(segment, prevent_cse=False), state, segments)
    return jax.tree.map(jnp.sum, sums), state


def _deal(x: jax.Array, count: int, axis: int) -> jax.Array:
    """Split `axis` into `count` hands, dealt in turn so that no row leaves its device."""
    shape = x.shape
    x = x.reshape(*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 0)


def _collect(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_deal`."""
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _average(decay: float | None, ema: Any, params: dict) -> Any:
    """ema = decay * ema + (1 - decay) * params."""
    if decay is None:
        return ()
    return jax.tree.map(lambda mean, leaf: decay * mean + (1 - decay) * leaf, ema, params)


def _any_nan(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.any(jnp.array([False, *(jnp.any(jnp.isnan(x)) for x in leaves)]))


def _definition(experiment: Experiment, vocab_size: int) -> nnx.GraphDef:
    model = experiment.model
    lm = nnx.eval_shape(lambda: LanguageModel(model, vocab_size, rngs=nnx.Rngs(0)))
    return nnx.split(lm)[0]


def _initialiser(
    experiment: Experiment, vocab_size: int, optimizer: optax.GradientTransformation
) -> Callable[[], TrainState]:
    def make() -> TrainState:
        seed = experiment.train.seed
        lm = LanguageModel(experiment.model, vocab_size, rngs=nnx.Rngs(seed))
        params = split(lm)[1]
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            params=params,
            opt_state=optimizer.init(params),
            memory=lm.init_state(experiment.data.batch) if experiment.train.carry else (),
            ema=() if experiment.optimizer.ema is None else jax.tree.map(jnp.copy, params),
            step=zero,
            skipped=jnp.copy(zero),
            skipped_in_row=jnp.copy(zero),
            rng=jax.random.key(seed),
        )

    return make


def _shardings(mesh: Mesh, axes: dict, shapes: TrainState) -> Any:
    """Where each array of the state lives; moments live with their parameters."""
    params = sharding.parameters(mesh, axes, shapes.params)
    everywhere: Any = sharding.replicated(mesh)
    by_path = {
        path: (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(shapes.params), jax.tree.leaves(params)
        )
    }

    def of_moment(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, place = by_path.get(path[start:], (None, everywhere))
            if shape == leaf.shape:
                return place
        return everywhere

    return TrainState(
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(of_moment, shapes.opt_state),
        memory=sharding.states(mesh, shapes.memory),
        ema=() if shapes.ema == () else params,
        step=everywhere,
        skipped=everywhere,
        skipped_in_row=everywhere,
        rng=everywhere,
    )


def _check_rows(experiment: Experiment, mesh: Mesh) -> None:
    sharding.check_tokens(mesh, experiment.data.sequence)
    devices = sharding.axis_size(mesh, "lanes")
    rows, parts = experiment.data.batch, experiment.train.accumulate * devices
    if rows % parts:
        raise ConfigError(
            f"config.data.batch={rows} must be a multiple of train.accumulate="
            f"{experiment.train.accumulate} times {devices} devices; try "
            f"{-(-rows // parts) * parts}"
        )
