"""What a step is predicted to hold, against what the compiler says that it holds."""

import dataclasses

import pytest

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.footprint import batch_shapes, footprint
from memjax.mixers import GLA, LSTM, Attention, Mamba
from memjax.model import Model
from memjax.sharding import Mesh
from memjax.training.config import Optimizer
from memjax.training.step import make_trainer

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


def compiled(experiment):
    trainer = make_trainer(experiment, VOCAB)
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
