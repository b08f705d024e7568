"""Memory modules beside a layer, against loops from their papers, and what is special to each.

Tolerance of oracles: float32 against float64, values of order one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import WIDTH, moved, segment
from flax import nnx
from oracles.memories import ORACLES

from memjax.architecture import Model
from memjax.memory import LM2, MEMORIES, MemoryPlus, ProductKeys, layer_class
from memjax.memory.base import LayerMemory
from memjax.memory.product_keys import pairs
from memjax.memory.tables import sum_rows
from memjax.training.optim import is_decayed, is_matrix

CONFIGS = {
    "product_keys": ProductKeys(keys=5, heads=2, top_k=3, query_size=6),
    "memory_plus": MemoryPlus(keys=6, heads=3, top_k=4, query_size=8, value_size=7),
    "lm2": LM2(slots=3, segment=5, heads=2),
    "memory_plus-wide": MemoryPlus(keys=40, heads=1, top_k=4, query_size=4),
}


def module_of(name):
    """The module and what all layers share, with every parameter moved."""
    config = CONFIGS[name]
    make = layer_class(config)
    shared = make.shared(config, Model(d_model=WIDTH), rngs=nnx.Rngs(1))
    module = make(config, WIDTH, rngs=nnx.Rngs(0))
    return moved(module), None if shared is None else moved(shared)


def pure(module):
    params = {} if module is None else nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


@jax.jit
def run(module, state, x, reset, shared):
    return module(state, x, reset, shared)


def test_every_memory_beside_a_layer_has_an_oracle():
    beside = {kind for kind, (config, _) in MEMORIES.items() if issubclass(config, LayerMemory)}
    assert beside == set(ORACLES) == {config.kind for config in CONFIGS.values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_module_equals_the_loop_of_its_paper(name):
    module, shared = module_of(name)
    x, reset = segment(19, resets=[(0, 5), (0, 6), (1, 0), (2, 18)])
    _, y = run(module, module.init_state(3), x, reset, shared)
    params = pure(module), pure(shared)
    want = ORACLES[CONFIGS[name].kind](
        *params, CONFIGS[name], np.asarray(x, np.float64), np.asarray(reset)
    )
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


REACHES = {  # from token 13, with a reset before token 2: the tokens that its output depends on
    "product_keys": {13},
    "memory_plus": {13},
    "lm2": {*range(2, 12), 13},  # two whole segments of five; nothing of its own but itself
}


@pytest.mark.parametrize("name", REACHES)
def test_gradient_reaches_as_far_back_as_the_memory_does_and_no_further(name):
    module, shared = module_of(name)
    x, reset = segment(16, batch=1, resets=[(0, 2)])
    state = module.init_state(1)

    @jax.jit
    @jax.grad
    def gradient(x):
        return (module(state, x, reset, shared)[1][:, 13] ** 2).sum()

    reached = np.abs(gradient(x)[0]).max(-1)
    assert set(np.flatnonzero(reached > 0)) == REACHES[name]
    assert np.isfinite(reached).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_report_counts_the_bytes_of_the_state(name):
    module, _ = module_of(name)
    state = module.init_state(2)
    report = module.memory_report(64, state)
    assert report.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // 2
    assert report.flops_per_token > 0


def test_the_largest_sums_are_among_the_pairs_that_are_looked_at():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 32):
        one, two = np.sort(rng.normal(size=(2, 40)), -1)[:, ::-1]
        sums = one[:, None] + two[None]
        i, j = pairs(count)
        np.testing.assert_allclose(
            np.sort(sums[i, j])[-count:], np.sort(sums.ravel())[-count:], rtol=1e-12
        )
    assert len(pairs(32)[0]) == 119


@pytest.mark.parametrize("tokens", [1, 29])
def test_sum_rows_and_its_gradients_equal_a_dense_product(tokens, monkeypatch):
    """Rows read often, once and never; a row read twice by one token; several pieces."""
    monkeypatch.setattr("memjax.memory.tables.AT_ONCE", 4 * 6 * 5)
    keys = jax.random.split(jax.random.key(0), 4)
    table = jax.random.normal(keys[0], (11, 5))
    index = jax.random.randint(keys[1], (tokens, 6), 0, 9).at[0, :2].set(3)
    weight, dy = jax.random.normal(keys[2], (tokens, 6)), jax.random.normal(keys[3], (tokens, 5))

    def dense(table, weight):
        return jnp.einsum("tj,tjn,nv->tv", weight, jax.nn.one_hot(index, 11), table)

    y, pull = jax.vjp(lambda table, weight: sum_rows(table, index, weight), table, weight)
    want, want_pull = jax.vjp(dense, table, weight)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(pull(dy), want_pull(dy), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert jnp.abs(pull(dy)[0][9:]).max() == 0


def test_gradients_of_a_search_equal_those_over_all_pairs():
    """With every sum of half keys written out, and those that are not chosen masked."""
    name = "memory_plus"
    module, shared = module_of(name)
    x, reset = segment(9)
    config = CONFIGS[name]

    def dense(module, shared, x):
        search = module.search
        q = search.query_norm(search.query(x).reshape(3, 9, config.heads, 2, -1))
        half = jnp.einsum("bthpk,hpnk->bthpn", q, search.key_norm(search.keys[...]))
        sums = half[..., 0, :, None] + half[..., 1, None, :]
        sums = search.scale * sums.reshape(*sums.shape[:3], -1)
        least = jnp.sort(sums, -1)[..., -config.top_k, None]
        weight = jax.nn.softmax(jnp.where(sums >= least, sums, -jnp.inf), -1)
        memory = jnp.einsum("bthn,nv->btv", weight, shared.values[...])
        return module.out(memory * jax.nn.silu(module.gate(x)))

    def gradient(fn):
        loss = lambda module, shared, x: (fn(module, shared, x) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2)))(module, shared, x)

    got = gradient(lambda module, shared, x: module((), x, reset, shared)[1])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradient(dense)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
        assert jnp.abs(b).max() > 0


def test_tables_are_neither_decayed_nor_orthogonalised():
    for axes in (("layers", "rows", "embed"), ("rows", "value")):
        assert not is_decayed(axes)
        assert not is_matrix(axes)
