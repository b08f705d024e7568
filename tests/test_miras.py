"""The four choices of Miras, as one operation and as layers.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import moved, segment
from flax import nnx
from oracles.miras import miras as oracle

from memjax.config import ConfigError, build
from memjax.mixers import MIXERS, Miras, TitansLMM
from memjax.mixers.deep_memory import DeepMemory
from pallas_kernels import delta_rule, linear_attention
from pallas_kernels.neural_memory import (
    KL,
    L2,
    MLP,
    DotProduct,
    ElasticNet,
    GatedMLP,
    GradientDescent,
    Huber,
    KeepAll,
    LinearMap,
    Lp,
    Lq,
    Mirror,
    Momentum,
    Nesterov,
    Robust,
    Rule,
    WeightDecay,
    neural_memory,
)

BATCH, TOKENS, SIZE, EVERY = 2, 11, 4, 4
RULES = {
    "moneta": Rule(MLP(expansion=3), Lp(power=3), Lq(power=4), GradientDescent()),
    "yaad": Rule(MLP(expansion=3), Huber(), WeightDecay(), GradientDescent()),
    "memora": Rule(MLP(expansion=3), L2(), KL(total=2.0), GradientDescent()),
    "gated-robust-mirror": Rule(GatedMLP(), Robust(), Mirror(power=3), GradientDescent()),
    "linear-elastic-nesterov": Rule(LinearMap(), Lp(power=1), ElasticNet(cut=0.1), Nesterov()),
    "gated-hebb-none": Rule(
        GatedMLP(residual_norm=False), DotProduct(), KeepAll(), GradientDescent()
    ),
    "momentum-lq3": Rule(MLP(layers=1), Huber(), Lq(power=3), Momentum()),
}


def draw(rule, seed=0):
    rng = np.random.default_rng(seed)
    shape = (BATCH, TOKENS, 1)
    args = {name: rng.standard_normal((*shape, SIZE)) for name in "qkv"}
    args["rate"] = 0.3 * rng.random(shape)
    if rule.retention.forgets:
        args["log_keep"] = -np.exp(2 * rng.standard_normal(shape) - 3)
    if rule.learner.momentum:
        args["log_momentum"] = -np.exp(rng.standard_normal(shape) - 1)
    if rule.bias.needs_threshold:
        args["threshold"] = 2 * rng.random(shape)
    shapes = rule.structure.shapes(SIZE, SIZE)
    args["weights"] = tuple(rng.standard_normal((1, *s)) / np.sqrt(s[0]) for s in shapes)
    names = rule.structure.constants(SIZE)
    args["constants"] = {n: x + 0.3 * rng.standard_normal((1, SIZE)) for n, x in names.items()}
    reset = np.zeros((BATCH, TOKENS), bool)
    reset[0, 2] = reset[0, 3] = reset[1, 9] = True
    return args, reset


def run(rule, args, reset, state=None, impl="xla", every=EVERY):
    args, reset = jax.tree.map(jnp.asarray, (args, reset))
    settings = dict(zip(Rule._fields, rule))
    return neural_memory(
        **args, state=state, reset=reset, update_every=every, impl=impl, **settings
    )


def assert_near(got, want, part=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=part * max(np.abs(b).max(initial=0), 1e-6))


def described(rule, constants):
    """The memory in the words of the oracle."""
    structure, bias, retention, learner = rule
    memory = {name: choice.kind for name, choice in rule._asdict().items()}
    memory["norm"] = None
    if constants:
        memory["norm"] = (constants["scale"][0], constants["shift"][0], structure.norm_eps)
    bias_fields = {f"bias_{k}": v for k, v in dataclasses.asdict(bias).items()}
    fields = dataclasses.asdict(retention)
    fields["retention_power"] = fields.pop("power", None)
    return memory | bias_fields | fields


@pytest.mark.parametrize("name", RULES)
def test_every_choice_equals_the_loop_of_the_paper(name):
    rule = RULES[name]
    args, reset = draw(rule)
    with jax.enable_x64(True):
        o, state = run(rule, args, reset)
    memory = described(rule, args["constants"])
    ones = np.ones((BATCH, TOKENS, 1))
    for b in range(BATCH):
        gates = [np.exp(args["log_keep"])] if rule.retention.forgets else [ones]
        gates += [np.exp(args["log_momentum"])] if rule.learner.momentum else [None]
        gates += [args.get("threshold")]
        want, A, S = oracle(
            memory,
            *(args[n][b, :, 0] for n in "qkv"),
            args["rate"][b, :, 0],
            *(gate if gate is None else gate[b, :, 0] for gate in gates),
            [w[0] for w in args["weights"]],
            EVERY,
            reset[b],
        )
        assert_near(o[b, :, 0], want)
        assert_near([w[b, 0] for w in state.weights], A)
        assert_near([s[b, 0] for s in state.momenta], S if rule.learner.momentum else [])


@pytest.mark.parametrize("name", ["gated-robust-mirror", "linear-elastic-nesterov"])
def test_every_gradient_equals_that_of_the_definition(name):
    rule = RULES[name]
    args, reset = draw(rule)
    before, no_reset = draw(rule, seed=1)[0], np.zeros_like(reset)

    def gradients(impl):
        def loss(args, state):
            o, after = run(rule, args, reset, state, impl)
            parts = [o, *jax.tree.leaves(after)[:-1]]
            weigh = lambda i, x: jnp.sum(x * jnp.cos(i + jnp.arange(x.size)).reshape(x.shape))  # noqa: E731
            return sum(weigh(i, x) for i, x in enumerate(parts)), after.count_B

        both = (jax.tree.map(jnp.asarray, args), state)
        found, count = jax.jit(jax.grad(loss, (0, 1), has_aux=True, allow_int=True))(*both)
        return (found[0], found[1]._replace(count_B=count))

    with jax.enable_x64(True):
        first = {n: x[:, :7] for n, x in before.items() if isinstance(x, np.ndarray)}
        first |= {n: before[n] for n in ("weights", "constants")}
        state = run(rule, first, no_reset[:, :7])[1]
        got, want = gradients("xla"), gradients("reference")
    assert_near(got, want)
    for leaf in jax.tree.leaves(want):
        assert np.abs(leaf).max() > 1e-7


def test_the_weights_of_mirror_pay_least_and_those_of_the_printed_map_do_not():
    rng = np.random.default_rng(0)
    A, power = rng.standard_normal((5, 3)), 4.0
    q = power / (power - 1)

    def cost(W):
        return W.size * np.mean(np.abs(W) ** q) ** (2 / q) / 2 - np.sum(W * A)

    with jax.enable_x64(True):
        best = np.asarray(Mirror(power=power).weights(jnp.asarray(A)))
        printed = np.asarray(Lq(power=power, floor=1e-9).weights(jnp.asarray(A)))
    nearby = min(cost(best + 1e-2 * rng.standard_normal(A.shape)) for _ in range(100))
    assert cost(best) < nearby
    assert cost(best) < min(cost(scale * printed) for scale in np.linspace(0, 3, 31))


def test_titans_is_a_point_of_the_space():
    deep = DeepMemory(heads=2, layers=2, expansion=2, update_every=5)
    twin = Miras(
        heads=2,
        structure=MLP(layers=2, expansion=2, norm_eps=1.0),
        learner=Momentum(),
        update_every=5,
    )
    titans, miras = (
        MIXERS[config.kind][1](config, 16, rngs=nnx.Rngs(0))
        for config in (TitansLMM(memory=deep), twin)
    )
    titans = moved(titans)
    params = nnx.to_pure_dict(nnx.state(titans, nnx.Param))
    memory = params.pop("memory")
    streams = {
        name: {"project": memory.pop(name), "conv": memory.pop(f"{name}_conv")}
        for name in ("query", "key", "value")
    }
    state = nnx.state(miras, nnx.Param)
    nnx.replace_by_pure_dict(state, {**memory, **streams, "readout": params})
    nnx.update(miras, state)
    x, reset = segment(13, resets=[(0, 5), (1, 0)])
    start, want = titans(titans.init_state(3), x, reset)
    now, got = miras(miras.init_state(3), x, reset)
    assert_near(got, want, 1e-5)
    assert_near(now.memory, start.memory, 1e-5)


def values_and_gradients(call, *args):
    """What `call` gives, and the gradients of a weighted sum of it."""

    def loss(*args):
        out = call(*args)
        weigh = lambda x: jnp.sum(x * jnp.sin(1.0 + jnp.arange(x.size)).reshape(x.shape))  # noqa: E731
        return sum(map(weigh, jax.tree.leaves(out))), out

    return jax.jit(jax.value_and_grad(loss, tuple(range(len(args))), has_aux=True))(*args)


def linear_memory(bias, retention, every, reset):
    def call(q, k, v, rate, log_keep=None):
        args = {"q": q, "k": k, "v": v, "rate": rate, "log_keep": log_keep}
        args["weights"] = (jnp.zeros((1, SIZE, SIZE)),)
        rule = Rule(LinearMap(), bias, retention, GradientDescent())
        o, state = run(rule, args, reset, every=every)
        return o, state.weights[0]

    return call


def test_the_delta_rule_is_a_point_of_the_space():
    args, reset = draw(Rule(LinearMap(), L2(), KeepAll(), GradientDescent()))
    with jax.enable_x64(True):
        tokens = [jnp.asarray(args[name]) for name in ("q", "k", "v", "rate")]
        memory = linear_memory(L2(), KeepAll(), 1, reset)
        delta = lambda *a: delta_rule(*a, reset=jnp.asarray(reset), scale=1.0)  # noqa: E731
        got, want = values_and_gradients(memory, *tokens), values_and_gradients(delta, *tokens)
    assert_near(got, want, 1e-9)


def test_the_gated_delta_rule_is_one_too_in_other_units():
    args, reset = draw(Rule(LinearMap(), L2(), WeightDecay(), GradientDescent()))
    memory = linear_memory(L2(), WeightDecay(), 1, reset)

    def rescaled(q, k, v, beta, log_decay):
        decay = jnp.exp(log_decay)
        return memory(q, k, v / decay[..., None], beta * decay, log_decay)

    def delta(*args):
        return delta_rule(*args, reset=jnp.asarray(reset), scale=1.0)

    with jax.enable_x64(True):
        tokens = [jnp.asarray(args[name]) for name in ("q", "k", "v", "rate", "log_keep")]
        got, want = values_and_gradients(rescaled, *tokens), values_and_gradients(delta, *tokens)
    assert_near(got, want, 1e-9)


def test_linear_attention_is_a_point_of_the_space_for_blocks_of_any_size():
    args, reset = draw(Rule(LinearMap(), DotProduct(), WeightDecay(), GradientDescent()))
    both = linear_memory(DotProduct(), WeightDecay(), EVERY, reset)

    def memory(*args):
        return both(*args)[0]

    def attention(q, k, v, rate, log_keep):
        wrote = rate[..., None] * k
        return linear_attention(q, wrote, v, log_keep, reset=jnp.asarray(reset), scale=1.0)[0]

    with jax.enable_x64(True):
        tokens = [jnp.asarray(args[name]) for name in ("q", "k", "v", "rate", "log_keep")]
        got, want = values_and_gradients(memory, *tokens), values_and_gradients(attention, *tokens)
    assert_near(got, want, 1e-9)


@pytest.mark.parametrize(
    "fields, parts",
    [
        (
            {"structure": {"kind": "linear"}, "bias": {"kind": "lp"}, "update_every": 1},
            ["bias=Lp(power=3.0)", "structure=linear", "power <= 2"],
        ),
        (
            {"structure": {"kind": "mlp", "residual_norm": False}, "bias": {"kind": "dot_product"}},
            ["bias=DotProduct()", "structure=mlp", "use l2"],
        ),
        (
            {"structure": {"kind": "linear"}, "retention": {"kind": "lq"}, "update_every": 1},
            ["retention=Lq(", "structure=linear", "use mirror"],
        ),
        (
            {"retention": {"kind": "mirror", "power": 4.0}},
            ["retention=Mirror(power=4.0)", "use power <= 3"],
        ),
        (
            {"retention": {"kind": "kl"}, "learner": {"kind": "momentum"}},
            ["learner=Momentum()", "retention=kl", "use gradient_descent"],
        ),
        (
            {"structure": {"kind": "linear"}, "update_every": 64},
            ["rate_cap=0.1", "update_every=64", "try 0.03125"],
        ),
        ({"bias": {"kind": "lp", "power": 0.5}}, ["config.bias", "power=0.5", "at least 1"]),
        ({"retention": {"kind": "mirrow"}}, ["kind='mirrow'", "did you mean mirror?"]),
    ],
)
def test_choices_that_are_unsound_are_refused_with_the_reason(fields, parts):
    with pytest.raises(ConfigError) as error:
        build(Miras, fields)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_repeated_key_diverges_beyond_the_bound_that_is_checked_and_not_below():
    ones = jnp.ones((1, 256, 1))
    k = jnp.ones((1, 256, 1, SIZE)) / SIZE**0.5
    args = {"q": k, "k": k, "v": 2 * k, "weights": (jnp.zeros((1, SIZE, SIZE)),)}
    rule = Rule(LinearMap(), L2(), KeepAll(), GradientDescent())
    reset = jnp.zeros((1, 256), bool)

    def error(rate):
        o, _ = run(rule, {**args, "rate": rate * ones}, reset, every=16)
        return float(jnp.abs(o - 2 * k)[:, -1].max())

    assert error(1.5 / 16) < 1e-3
    assert error(2.1 / 16) > 1.5
