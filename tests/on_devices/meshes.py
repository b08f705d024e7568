"""Training on a mesh is training on one device: losses, gradients and carried states.

Batches are packed documents with resets anywhere, and memory is carried from step to step, so that
gradients reach initial states and nothing may cross a document. The optimizer's first moments
after one step are 1 - beta1 times the gradients. Float32: sums in another order differ by 1e-7 of
their terms; losses are compared to 1e-5 of their value, arrays to 2e-5 of their largest element.
The terms of a gradient may cancel, so one that is a hundredth of the model's largest, or less, is
compared to that hundredth.
"""

import dataclasses

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from memjax.collectives import collectives, compile_step
from memjax.config import ConfigError
from memjax.data import Data
from memjax.describe import parameter_count
from memjax.experiment import Experiment
from memjax.gathering import look_up
from memjax.layers import top_k
from memjax.memory import (
    ARMT,
    LM2,
    LandmarkMemory,
    MemoryPlus,
    Persistent,
    ProductKeys,
    RecurrentTokens,
)
from memjax.memory import MEMORIES as REGISTERED
from memjax.mixers import LSTM, MIXERS, Attention, GatedDeltaNet, Mamba, TTTLinear
from memjax.model import Model
from memjax.sharding import Mesh, constrain, make_mesh, over
from memjax.sharding import batch as batch_place
from memjax.training.config import Optimizer, Train
from memjax.training.step import make_trainer, put_batch

VOCAB, ROWS, LENGTH, WIDTH, STEPS = 32, 8, 32, 32, 5
EPS = 1e-3  # of Adam: gradients that are rounding alone must not move a parameter by its full step

MESHES = {
    "data8": Mesh(data=8),
    "fsdp8": Mesh(data=1, fsdp=8),
    "tensor4": Mesh(data=1, tensor=4),
    "context8": Mesh(data=1, context=8),
    "data2-context4": Mesh(data=2, context=4),
    "data2-fsdp2-tensor2": Mesh(data=2, fsdp=2, tensor=2),
    "fsdp2-tensor2-context2": Mesh(data=1, fsdp=2, tensor=2, context=2),
}
# Every axis, and every two of them; the shapes of one axis alone that these leave out are those of
# a model of many mixers.
FIVE = ("fsdp8", "tensor4", "data2-context4", "data2-fsdp2-tensor2", "fsdp2-tensor2-context2")
# A mixer of every way to split tokens: a ring, summaries, turns of an operation and of a mixer.
HYBRID = Model(
    d_model=WIDTH,
    pattern=("attention", "gated_deltanet", "mamba", "ttt_linear", "lstm"),
    repeat=1,
    mixers={
        "attention": Attention(heads=4, kv_heads=2, window=11),
        "gated_deltanet": GatedDeltaNet(chunk=8),
        "mamba": Mamba(states=4, chunk=8),
        "ttt_linear": TTTLinear(update_every=4),
        "lstm": LSTM(unroll=1),
    },
)
LINEAR = Model(d_model=WIDTH, pattern=("linear_attention",), repeat=1)


def experiment(model, mesh=Mesh(data=1), sequence=LENGTH, **train):
    return Experiment(
        model=model,
        data=Data(sequence=sequence, batch=ROWS, stream="documents"),
        optimizer=Optimizer(learning_rate=1e-3, schedule="constant", warmup=0, eps=EPS),
        train=Train(**{"carry": True, "steps": 100, **train}),
        mesh=mesh,
    )


def batch(seed, tokens):
    generator = np.random.default_rng(seed)
    shape = (ROWS, tokens)
    return {
        "tokens_BT": generator.integers(0, VOCAB, shape).astype(np.int32),
        "targets_BT": generator.integers(0, VOCAB, shape).astype(np.int32),
        "weight_BT": (generator.random(shape) < 0.9).astype(np.float32),
        "reset_BT": generator.random(shape) < 0.05,
    }


def on_host(state):
    return jax.device_get(state._replace(rng=()))


COMPILATIONS = []


def _listen(event, *_, **__):
    if "backend_compile" in event:
        COMPILATIONS.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def run(config, start=None):
    """Losses of the steps, the state after the first and the last, and the one at the start."""
    trainer = make_trainer(config, VOCAB)
    if start is None:
        state = trainer.init()
        start = on_host(state)
    else:
        placed = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract)
        rng = jax.device_put(jax.random.key(config.train.seed), placed.rng)
        state = jax.device_put(start, placed._replace(rng=()))._replace(rng=rng)
    losses, first = [], None
    for step in range(STEPS):
        one = batch(step, LENGTH * config.train.horizon)
        state, metrics = trainer.step(state, put_batch(one, trainer.mesh))
        losses.append(float(metrics.loss))
        if step == 0:
            first, count = on_host(state), len(COMPILATIONS)
    assert len(COMPILATIONS) == count, "the step was compiled again"
    for want, leaf in zip(jax.tree.leaves(trainer.abstract), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    return losses, first, on_host(state), start


def assert_same(got, want, least=1e-6):
    paths = jax.tree_util.tree_leaves_with_path(want)
    for leaf, (path, whole) in zip(jax.tree.leaves(got), paths, strict=True):
        scale = max(np.abs(whole).max(initial=0), least)
        error = np.abs(np.asarray(leaf, np.float64) - whole).max(initial=0)
        assert error <= 2e-5 * scale, (jax.tree_util.keystr(path), error, scale)


def compare(model, meshes, **train):
    losses, first, last, start = run(experiment(model, **train))
    for name in meshes:
        got = run(experiment(model, MESHES[name], **train), start)
        np.testing.assert_allclose(got[0], losses, rtol=1e-5, err_msg=name)
        gradients = first.opt_state[1][0].mu
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
        assert_same(got[1].opt_state[1][0].mu, gradients, largest / 100)
        assert_same(got[1].memory, first.memory)
        assert_same(got[2].memory, last.memory)


def test_every_way_to_split_a_step_gives_the_same_numbers():
    compare(HYBRID, ("data2-fsdp2-tensor2", "fsdp2-tensor2-context2"))


def test_accumulation_and_a_horizon_compose_with_a_split_sequence():
    compare(LINEAR, ("data2-context4",), accumulate=2, horizon=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXERS)
def test_every_kind_on_every_mesh_gives_the_same_numbers(kind):
    compare(Model(d_model=WIDTH, pattern=(kind,), repeat=1), FIVE)


@pytest.mark.slow
def test_every_shape_gives_the_same_numbers():
    compare(HYBRID, [name for name in MESHES if name not in FIVE])


def test_the_largest_scores_are_found_on_a_mesh():
    """XLA ends the process where the barriers behind a selection do not suit it."""
    x = jax.random.normal(jax.random.key(0), (8, 4, 16))
    place = NamedSharding(make_mesh(Mesh(data=8), 8), PartitionSpec(None, None, "data"))
    got = jax.jit(lambda x: top_k(x, 3))(jax.device_put(x, place))
    for a, b in zip(got, jax.lax.top_k(x, 3), strict=True):
        np.testing.assert_array_equal(a, b)


# Memories beside mixers; those that take the place of mixers are among the kinds above.
MEMORIES = {
    "recurrent_tokens": RecurrentTokens(slots=2, segment=8),
    "armt": ARMT(slots=2, segment=8, memory_size=4),
    "lm2": LM2(slots=4, segment=8, heads=2),
    "landmark": LandmarkMemory(block=3, blocks=4, segment=6),
    "product_keys": ProductKeys(keys=8, heads=2, top_k=2, query_size=8),
    "memory_plus": MemoryPlus(keys=8, heads=2, top_k=2, query_size=8),
    "persistent": Persistent(slots=4),
}


def test_every_memory_has_a_case():
    assert set(MEMORIES) | set(MIXERS) >= set(REGISTERED)
    assert set(MEMORIES) >= {kind for kind, (_, module) in REGISTERED.items() if module is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORIES)
def test_every_memory_on_every_mesh_gives_the_same_numbers(name):
    backbone = {"landmark": "attention", "persistent": "attention"}.get(name, "linear_attention")
    model = Model(d_model=WIDTH, pattern=(backbone,), repeat=1, memory=MEMORIES[name])
    compare(model, FIVE)


def test_parameters_and_states_are_born_where_they_live():
    config = experiment(HYBRID, MESHES["fsdp2-tensor2-context2"])
    trainer = make_trainer(config, VOCAB)
    state = trainer.init()
    block = state.params["stack"]["patterns"]["blocks"]["1_gated_deltanet"]

    def part(leaf):
        return leaf.addressable_shards[0].data.shape

    query = block["mixer"]["query"]["project"]["weight"]
    heads, width = query.shape[1:]
    assert part(query) == (1, heads // 2, width // 2)
    assert part(state.params["embedding"]) == (VOCAB // 2, WIDTH // 2)
    memory = state.memory.patterns[1].mixer.memory_BHKV
    assert part(memory) == (1, ROWS // 2, memory.shape[2] // 2, *memory.shape[3:])
    cache = state.memory.patterns[0].mixer.k_BMGK
    assert part(cache) == (1, ROWS // 2, cache.shape[2], 1, cache.shape[4])
    weight = state.memory.patterns[3].mixer.memory.carry.weight_HKK
    assert part(weight) == (1, ROWS // 2, 2, *weight.shape[3:])
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "['1_gated_deltanet']['mixer']['query']['project']" in jax.tree_util.keystr(path)
    ]
    assert [part(leaf) for leaf in moments] == [(1, heads // 2, width // 2)] * 2
    one = make_trainer(experiment(HYBRID), VOCAB).init()
    assert_same(on_host(state).params, on_host(one).params)


def test_parameters_are_gathered_in_their_layer_and_again_behind_it():
    repeat, width = 4, 2 * WIDTH
    model = dataclasses.replace(LINEAR, d_model=width, repeat=repeat)
    compiled, mesh = compile_step(experiment(model, MESHES["fsdp8"]), VOCAB)
    found = collectives(compiled.as_text(), mesh)
    gathers = [one for one in found if one.kind == "all-gather" and "fsdp" in one.axes]
    hidden = model.mlp.width(width)  # of the largest matrices of a layer, the pair into the MLP
    largest = 4 * width * 2 * hidden
    assert max(one.result_bytes for one in gathers) == largest
    into = [one for one in gathers if one.result_bytes == largest]
    assert [one.times for one in into] == [repeat, repeat]  # forward and backward, in the loops
    # Parts of all layers side by side there are, but none of the matrices as they are gathered.
    assert f"f32[{repeat},2,{hidden},{width // 8}]" in compiled.as_text()
    assert f"f32[{repeat},2,{hidden},{width}]" not in compiled.as_text()


def test_gradients_are_summed_to_the_parts_that_devices_keep():
    """A reduce-scatter over fsdp in every layer, and over data the sum of a part of it alone."""
    repeat, width = 4, 2 * WIDTH
    model = dataclasses.replace(LINEAR, d_model=width, repeat=repeat)
    config = experiment(model, Mesh(data=2, fsdp=4))
    compiled, mesh = compile_step(config, VOCAB)
    found = collectives(compiled.as_text(), mesh)
    scattered = [one for one in found if one.kind == "reduce-scatter"]
    assert {one.axes for one in scattered} == {("fsdp",)}
    hidden = 2 * model.mlp.width(width)
    largest = max(scattered, key=lambda one: one.result_bytes)
    assert (largest.result_bytes, largest.times) == (4 * width * hidden // 4, repeat)
    sums = [one for one in found if one.kind == "all-reduce"]
    sent = sum(one.times * one.sent_bytes for one in sums)
    # A quarter of all parameters by two devices, and of the table, read twice, once more.
    parameters, table = 4 * parameter_count(model, VOCAB), 4 * VOCAB * width
    assert sent < 1.05 * 2 * (parameters + table) / 4 / 2


def test_no_device_gathers_a_parameter_that_tensor_splits():
    """Each holds the same channels of both halves of the MLP."""
    compiled, mesh = compile_step(experiment(LINEAR, MESHES["tensor4"]), VOCAB)
    found = collectives(compiled.as_text(), mesh)
    assert found and not [one for one in found if one.kind in ("all-gather", "all-to-all")]


@pytest.mark.parametrize("length", [7, 8])
def test_the_gradient_of_a_table_whose_tokens_are_split_evenly_or_not(length):
    """Table and tokens are split over two devices each; 7 tokens lie whole on both."""
    mesh, generator = make_mesh(MESHES["fsdp2-tensor2-context2"], ROWS), np.random.default_rng(0)
    tokens = generator.integers(0, VOCAB, (ROWS, length))
    table, dx = (generator.standard_normal((*n, WIDTH)) for n in ((VOCAB,), tokens.shape))
    axes, place = ("vocab", "embed"), NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))

    def both(table, dx):
        def read(table):
            param = nnx.Param(table, axes=axes)
            return constrain(look_up(param, jnp.asarray(tokens)), "lanes", "tokens")

        with over(mesh):
            rows, pull = jax.vjp(read, table)
            return rows, pull(dx)[0]

    run = jax.jit(both, in_shardings=(place, None), out_shardings=(None, place))
    rows, gradient = run(table.astype(np.float32), dx.astype(np.float32))
    want = np.zeros((VOCAB, WIDTH))
    np.add.at(want, tokens, dx)
    np.testing.assert_allclose(rows, table[tokens], rtol=1e-6)
    np.testing.assert_allclose(gradient, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["linear_attention", "attention"])
def test_no_device_gathers_the_sequence(kind):
    mixers = {"attention": Attention(window=9)} if kind == "attention" else {}
    model = Model(d_model=WIDTH, pattern=(kind,), repeat=1, mixers=mixers)

    def gathered(sequence):
        compiled, mesh = compile_step(experiment(model, MESHES["context8"], sequence), VOCAB)
        return sorted(
            (one.kind, one.times, one.result_bytes)
            for one in collectives(compiled.as_text(), mesh)
            if one.kind in ("all-gather", "all-to-all")
        )

    assert gathered(8 * LENGTH) == gathered(4 * LENGTH)


def test_collectives_are_counted_as_often_as_they_run():
    """A program of which every collective is known: three in a loop of three, two behind it."""
    mesh = make_mesh(Mesh(data=2, fsdp=2, context=2), ROWS)
    right = [(0, 1), (1, 0)]

    def local(x_BT):
        def again(x_BT, _):
            whole = jax.lax.all_gather(x_BT, "fsdp", axis=0, tiled=True)
            x_BT = jax.lax.psum_scatter(jnp.sin(whole), "fsdp", scatter_dimension=0, tiled=True)
            return jax.lax.ppermute(x_BT, "context", right), None

        x_BT, _ = jax.lax.scan(again, x_BT, None, length=3)
        return jax.lax.psum(jnp.cos(x_BT), ("data", "context")), jax.lax.pmax(x_BT, "data")

    place = batch_place(mesh)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=place.spec, out_specs=place.spec, check_vma=False
    )
    x = jax.ShapeDtypeStruct((8, 64), np.float32, sharding=place)
    text = jax.jit(run).lower(x).compile().as_text()
    part = 4 * 2 * 32  # bytes of a device's part
    assert sorted(collectives(text, mesh)) == sorted(
        [
            ("all-gather", ("fsdp",), 3, 2 * part, part),
            ("reduce-scatter", ("fsdp",), 3, part, part),
            ("collective-permute", ("context",), 3, part, part),
            ("all-reduce", ("data", "context"), 1, part, 1.5 * part),
            ("all-reduce", ("data",), 1, part, part),
        ]
    )


MISTAKES = {
    "more devices than there are": (dict(data=4, fsdp=4), {}, "data=4 fsdp=4.*one of 1, 2, 4, 8"),
    "tokens that do not divide": (
        dict(data=1, context=8),
        {"sequence": 36},
        "context=8 must divide data.sequence=36; sizes that fit: 1, 2, 3, 4, 6",
    ),
    "rows that do not divide": (dict(data=3), {}, "must be one of|batch=8 must be a multiple"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mesh_that_cannot_be_is_refused_before_anything_is_compiled(name):
    mesh, fields, message = MISTAKES[name]
    count = len(COMPILATIONS)
    with pytest.raises(ConfigError, match=message):
        make_trainer(experiment(LINEAR, Mesh(**mesh), **fields), VOCAB)
    assert len(COMPILATIONS) == count
