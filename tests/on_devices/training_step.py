"""The training step on eight devices: a NaN on one of them, and sharded accumulators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_training_step as steps

from memjax.sharding import Mesh
from memjax.training.step import make_trainer, put_batch


@pytest.fixture(scope="module")
def trainer():
    patch = pytest.MonkeyPatch()
    patch.setattr(steps, "ROWS", 8)
    config = steps.experiment(optimizer=steps.MOVING, mesh=Mesh(data=2, fsdp=4))
    yield make_trainer(config, steps.VOCAB)
    patch.undo()


def shards(state):
    """Every array of every device, as bytes; keys and counts left out."""
    leaves = jax.tree.leaves((state.params, state.opt_state, state.memory))
    return [
        np.asarray(shard.data).tobytes() for leaf in leaves for shard in leaf.addressable_shards
    ]


def of_a_batch(state, batch):
    """One row, of the last device, has a NaN among its weights."""
    batch["weight_BT"][7, 2] = np.nan
    return state, batch


def of_a_parameter(state, batch):
    """The shard of the embedding that the last two of the eight columns are in."""
    table = state.params["embedding"].at[:, 7].set(jnp.nan)
    return state._replace(params=state.params | {"embedding": table}), batch


@pytest.mark.parametrize("poison", [of_a_batch, of_a_parameter])
def test_a_nan_in_one_shard_leaves_the_step_out_on_all(trainer, poison):
    state, _ = trainer.step(trainer.init(), put_batch(steps.batch(0), trainer.mesh))
    state, batch = poison(state, steps.batch(1))
    before = shards(state)
    state, metrics = trainer.step(state, put_batch(batch, trainer.mesh))
    assert not metrics.finite and metrics.skipped == 1
    assert shards(state) == before
    if poison is of_a_batch:
        state, metrics = trainer.step(state, put_batch(steps.batch(2), trainer.mesh))
        assert metrics.finite and metrics.skipped == 1 and metrics.skipped_in_row == 0
        assert shards(state) != before


def test_accumulators_are_split_as_the_parameters_and_change_nothing(monkeypatch):
    monkeypatch.setattr(steps, "ROWS", 16)
    shape, moments = f"f32[{steps.VOCAB},{steps.MODEL.d_model // 4}]", []
    for parts in (1, 2):
        mesh = Mesh(data=2, fsdp=4)
        config = steps.experiment(optimizer=steps.MOVING, mesh=mesh, accumulate=parts)
        trainer = make_trainer(config, steps.VOCAB)
        batch = put_batch(steps.batch(0), trainer.mesh)
        program = trainer.step.lower(trainer.abstract, batch).compile()
        state, _ = program(trainer.init(), batch)
        moments.append(jax.device_get(state.opt_state[1][0].mu))  # the gradient, but for a factor
        loops = [line for line in program.as_text().splitlines() if " while(" in line]
        if parts == 2:  # two tables, the input and the output, are accumulated
            assert any(line.split(" while(")[0].count(shape) >= 2 for line in loops)
    steps.assert_close(moments[1], moments[0], rtol=1e-4, atol=1e-7)
