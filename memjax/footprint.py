"""What a training step holds in the memory of each device, before anything is compiled.

`footprint` predicts. What is kept between steps (parameters, optimizer, average, carried state) is
exact, from the shardings of the state. `temporary` is what the step holds besides at its worst
moment: the step is traced for its mesh, and `memjax.liveness` walks through it, counting of each
array the part that a device has (`memjax.spread`). Parts of it are `gradients` and
`saved_activations`, what the forward pass leaves for the backward pass, in equal parts; the rest is
the work of one layer, and of the logits of a piece of the tokens.

`memjax describe --mesh=...` compiles the step, without running it, and reports what it takes.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from memjax import liveness
from memjax.experiment import Experiment
from memjax.liveness import size_of
from memjax.model import merge
from memjax.sharding import batch as batch_sharding
from memjax.spread import split_of
from memjax.training.step import Trainer, make_trainer, read_batch


def footprint(experiment: Experiment, vocab_size: int) -> dict[str, int]:
    """Bytes a device of a training step; see the module for what is exact."""
    trainer = make_trainer(experiment, vocab_size)
    state = trainer.abstract
    parameters = bytes_per_device(state.params)
    kept = {
        "parameters": parameters,
        "optimizer": bytes_per_device(state.opt_state),
        "average": bytes_per_device(state.ema),
        "carried_state": bytes_per_device(state.memory),
    }
    temporary = _temporary(experiment, trainer)
    return {
        **kept,
        "temporary": temporary,
        "gradients": parameters * _copies(experiment),
        "saved_activations": _saved(experiment, trainer) // trainer.mesh.devices.size,
        "total": sum(kept.values()) + temporary,
        "devices": trainer.mesh.devices.size,
    }


def _copies(experiment: Experiment) -> int:
    """Of the gradients: those of a part of the batch beside their sum."""
    return 2 if experiment.train.accumulate > 1 else 1


def _temporary(experiment: Experiment, trainer: Trainer) -> int:
    """Bytes that the step holds at its worst moment, besides its state."""
    given = trainer.abstract, batch_shapes(experiment, trainer)
    program = trainer.step.trace(*given).jaxpr.jaxpr
    splits = [split_of(leaf) for leaf in jax.tree.leaves(given)]
    donated = len(jax.tree.leaves(trainer.abstract))
    return liveness.peak(program, over=(0, donated), splits=splits)


def batch_shapes(experiment: Experiment, trainer: Trainer) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch, with their places."""
    shape = (experiment.data.batch, experiment.data.sequence * experiment.train.horizon)
    types = {
        "tokens_BT": np.int32,
        "targets_BT": np.int32,
        "weight_BT": np.float32,
        "reset_BT": np.bool_,
    }
    place = batch_sharding(trainer.mesh)
    return {k: jax.ShapeDtypeStruct(shape, t, sharding=place) for k, t in types.items()}


def bytes_per_device(tree: Any) -> int:
    """Bytes of the part of each array that one device holds."""
    leaves = jax.tree.leaves(tree)
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    return sum(math.prod(s) * leaf.dtype.itemsize for s, leaf in zip(shards, leaves))


def _saved(experiment: Experiment, trainer: Trainer) -> int:
    """Bytes that the forward pass of one part of the batch leaves for its backward pass."""
    rows = experiment.data.batch // experiment.train.accumulate
    length = experiment.data.sequence * experiment.train.horizon
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), leaf.dtype)
        for name, leaf in batch_shapes(experiment, trainer).items()
    }

    def forward(params: dict, batch: dict, key: jax.Array):
        def loss(params: dict) -> jax.Array:
            lm = merge(trainer.definition, params)
            start = lm.init_state(rows) if experiment.train.carry else None
            return read_batch(experiment, lm, start, batch, key)[0].total

        return jax.vjp(loss, params)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(forward)(trainer.abstract.params, batch, key).jaxpr
    given = set(map(id, program.invars))
    left = {id(v): v.aval for v in program.outvars if not isinstance(v, Literal)}
    return sum(size_of(aval) for v, aval in left.items() if v not in given)
