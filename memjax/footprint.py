"""What a training step holds in the memory of each device, before anything runs.

`footprint` predicts: parameters, optimizer, averages, gradients and carried state exactly, from the
shardings of the state; `saved_activations` are the arrays that the forward pass leaves for the
backward pass, found by tracing it and divided evenly over the devices that split the tokens. What
the program needs besides them for its work is the compiler's choice, so `total` is what fits at
best: `memjax describe --mesh=...` compiles the step, without running it, and reports what it takes.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from memjax.experiment import Experiment
from memjax.model import merge
from memjax.sharding import batch as batch_sharding
from memjax.training.step import Trainer, make_trainer, read_batch


def footprint(experiment: Experiment, vocab_size: int) -> dict[str, int]:
    """Bytes a device of a training step; see the module for what is exact."""
    trainer = make_trainer(experiment, vocab_size)
    state = trainer.abstract
    parameters = bytes_per_device(state.params)
    parts = {
        "parameters": parameters,
        "optimizer": bytes_per_device(state.opt_state),
        "average": bytes_per_device(state.ema),
        "carried_state": bytes_per_device(state.memory),
        "gradients": parameters * (2 if experiment.train.accumulate > 1 else 1),
        "saved_activations": _saved(experiment, trainer) // trainer.mesh.devices.size,
    }
    return {**parts, "total": sum(parts.values()), "devices": trainer.mesh.devices.size}


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


def size_of(aval: Any) -> int:
    """Bytes of an array; random keys as the two words that they hold."""
    key = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)
    return math.prod(aval.shape) * (8 if key else np.dtype(aval.dtype).itemsize)


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
            return read_batch(experiment, lm, lm.init_state(rows), batch, key)[0].total

        return jax.vjp(loss, params)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(forward)(trainer.abstract.params, batch, key).jaxpr
    given = set(map(id, program.invars))
    left = {id(v): v.aval for v in program.outvars if not isinstance(v, Literal)}
    return sum(size_of(aval) for v, aval in left.items() if v not in given)
