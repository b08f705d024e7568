"""What a step is predicted to hold and to compute, against the compiler and the traced program."""

import dataclasses
import math

import jax
import pytest

from memjax.data import Data
from memjax.describe import describe
from memjax.experiment import Experiment
from memjax.footprint import batch_shapes, footprint
from memjax.mixers import GLA, LSTM, Attention, Mamba
from memjax.model import Model, merge
from memjax.sharding import Mesh
from memjax.training.config import Optimizer
from memjax.training.step import make_trainer, read_batch

VOCAB = 31
MIXERS = {
    "attention": Attention(heads=2),
    "gla": GLA(heads=2),
    "mamba": Mamba(),
    "lstm": LSTM(unroll=1),
}
SMALL = Experiment(
    model=Model(d_model=16, pattern=("lstm",), repeat=2, mixers={"lstm": LSTM(unroll=1)}),
    data=Data(sequence=16, batch=4, stream="documents"),
    optimizer=Optimizer(warmup=0),
    mesh=Mesh(data=1),
)


def part(experiment, section, /, **fields):
    changed = dataclasses.replace(getattr(experiment, section), **fields)
    return dataclasses.replace(experiment, **{section: changed})


CASES = {
    "adamw": SMALL,
    "muon, averaged": part(SMALL, "optimizer", name="muon", ema=0.9),
    "lion, carried": part(part(SMALL, "optimizer", name="lion"), "train", carry=True),
}


def compiled(experiment, vocab_size=VOCAB):
    trainer = make_trainer(experiment, vocab_size)
    batch = batch_shapes(experiment, trainer)
    return trainer.step.lower(trainer.abstract, batch).compile().memory_analysis()


@pytest.mark.parametrize("case", CASES)
def test_the_state_is_predicted_to_the_byte(case):
    """Arguments of the compiled step are the state and a batch: 13 bytes a token, and scalars."""
    experiment, predicted = CASES[case], footprint(CASES[case], VOCAB)
    kept = ("parameters", "optimizer", "average", "carried_state")
    tokens = experiment.data.batch * experiment.data.sequence
    key_and_counts = 8 + 3 * 4
    arguments = compiled(experiment).argument_size_in_bytes
    assert sum(predicted[name] for name in kept) == arguments - 13 * tokens - key_and_counts


@pytest.mark.parametrize("kind", MIXERS)
def test_saved_activations_are_linear_in_tokens_and_layers_and_less_with_remat(kind):
    def saved(**fields):
        model = Model(d_model=16, pattern=(kind,), mixers={kind: MIXERS[kind]}, repeat=2)
        data = {k: v for k, v in fields.items() if k in ("batch", "sequence")}
        rest = {k: v for k, v in fields.items() if k not in data}
        model = dataclasses.replace(model, **rest)
        experiment = dataclasses.replace(SMALL, model=model)
        experiment = part(experiment, "data", **{"sequence": 64, "batch": 4} | data)
        return footprint(experiment, VOCAB)["saved_activations"]

    once = saved()
    assert saved(batch=8) == pytest.approx(2 * once, rel=0.1)
    layers = [saved(repeat=n) for n in (2, 4, 6)]
    assert layers[2] - layers[1] == layers[1] - layers[0] > 0.3 * once
    assert saved(remat="full") < saved(remat="dots") <= once


def test_accumulation_holds_a_second_gradient_and_half_the_activations():
    whole, parts = footprint(SMALL, VOCAB), footprint(part(SMALL, "train", accumulate=2), VOCAB)
    assert parts["gradients"] == 2 * whole["gradients"] == 2 * whole["parameters"]
    assert parts["saved_activations"] == pytest.approx(whole["saved_activations"] / 2, rel=0.2)


def layers_of(kind, remat="none"):
    """Large enough that what layers hold is most of it."""
    model = Model(d_model=128, pattern=(kind,), repeat=4, remat=remat)
    return Experiment(model=model, data=Data(sequence=512, batch=4), mesh=Mesh(data=1))


WHOLE = [("linear_attention", "full"), ("attention", "full"), ("gated_deltanet", "dots")]
MORE = [
    *[(kind, "none") for kind in ("attention", "gla", "mamba2", "gated_deltanet")],
    *[(kind, "full") for kind in ("gated_deltanet", "mamba", "mamba2", "mlstm", "titans_mac")],
    ("attention", "dots"),
]


@pytest.mark.parametrize(
    ("kind", "remat"), [*WHOLE, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_the_total_is_within_15_percent_of_the_compiled_step(kind, remat):
    experiment = layers_of(kind, remat)
    held = compiled(experiment, 256)
    whole = held.argument_size_in_bytes + held.temp_size_in_bytes
    assert footprint(experiment, 256)["total"] == pytest.approx(whole, rel=0.15)


def products(program):
    """Floating-point operations of the matrix products of a traced program."""
    total = 0
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif eqn.primitive.name == "cond":  # without carried keys the smaller branch runs
            total += min(products(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            for name in ("jaxpr", "call_jaxpr", "body_jaxpr"):
                inner = eqn.params.get(name)
                if inner is not None:
                    total += turns * products(getattr(inner, "jaxpr", inner))
                    break
    return total


@pytest.mark.parametrize("kind", ["attention", "gated_deltanet", "lstm", "mlstm"])
def test_operations_a_token_are_within_15_percent_of_the_products_of_a_step(kind):
    """The chunks of linear memories take more than their recurrence, and masks cost products."""
    experiment = layers_of(kind)
    trainer = make_trainer(experiment, 256)

    def loss(params, batch):
        lm = merge(trainer.definition, params)
        return read_batch(experiment, lm, None, batch, jax.random.key(0))[0].total

    program = jax.make_jaxpr(jax.grad(loss))(
        trainer.abstract.params, batch_shapes(experiment, trainer)
    )
    tokens = experiment.data.batch * experiment.data.sequence
    counted = products(program.jaxpr) / tokens
    assert describe(experiment, 256)["flops_per_token"] == pytest.approx(counted, rel=0.15)
