"""What a step is predicted to hold and to compute, against the compiler and the traced program."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from devices import run_on_virtual_devices

from memjax.config import build, load_file
from memjax.data import Data
from memjax.describe import describe
from memjax.experiment import Experiment
from memjax.footprint import batch_shapes, footprint
from memjax.mixers import GLA, LSTM, MIXERS, Attention, Mamba
from memjax.model import Model
from memjax.operations import products_of
from memjax.sharding import Mesh
from memjax.training.config import Optimizer
from memjax.training.step import make_trainer

VOCAB = 31
SLOW = pytest.mark.slow
FEW = {
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


def test_the_memory_of_devices_of_a_mesh_is_predicted():
    run_on_virtual_devices("footprints", "-m", "not slow")


@SLOW
def test_the_memory_of_devices_of_more_meshes_is_predicted():
    run_on_virtual_devices("footprints", "-m", "slow")


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


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("attention", "lstm") else pytest.param(kind, marks=SLOW) for kind in FEW],
)
def test_saved_activations_are_linear_in_tokens_and_layers_and_less_with_remat(kind):
    def saved(**fields):
        model = Model(d_model=16, pattern=(kind,), mixers={kind: FEW[kind]}, repeat=2)
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
    ("kind", "remat"), [*WHOLE, *(pytest.param(*case, marks=SLOW) for case in MORE)]
)
def test_the_total_is_within_15_percent_of_the_compiled_step(kind, remat):
    experiment = layers_of(kind, remat)
    held = compiled(experiment, 256)
    whole = held.argument_size_in_bytes + held.temp_size_in_bytes
    assert footprint(experiment, 256)["total"] == pytest.approx(whole, rel=0.15)


CONFIGS = Path(__file__).parent.parent / "configs"
QUICK = ("attention", "gated_deltanet")


def tiny(kind):
    """The smallest config of a kind, of two rows that begin documents."""
    found = build(Experiment, load_file(str(CONFIGS / f"{kind}_tiny.py")))
    found = part(part(found, "data", batch=2), "train", carry=False)
    return dataclasses.replace(found, mesh=Mesh(data=1))


def executed(experiment, vocab_size):
    """Operations a token in the products of a whole training step, of documents not yet ended."""
    trainer = make_trainer(experiment, vocab_size)
    batch = batch_shapes(experiment, trainer)
    step = trainer.step.trace(trainer.abstract, batch).jaxpr
    reset_BT = np.zeros(batch["reset_BT"].shape, bool)
    known = [reset_BT if name == "reset_BT" else None for name in sorted(batch)]
    others = len(step.jaxpr.invars) - len(known)
    return products_of(step, [*[None] * others, *known]) / reset_BT.size


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=SLOW) for kind in MIXERS],
)
def test_operations_a_token_are_those_of_a_training_step(kind):
    """Of more rows and with all that a step does besides, for every kind of mixer."""
    experiment = tiny(kind)
    told = describe(experiment, 256)["flops_per_token"]
    assert told == pytest.approx(executed(experiment, 256), rel=0.02)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_operations_that_remat_repeats_are_counted(remat):
    """ "full": all of a layer but its last product, whose result nobody reads, and no logits."""
    model = tiny("base_conv").model
    plain, repeated = (
        describe(part(tiny("base_conv"), "model", remat=name), 256) for name in ("none", remat)
    )
    width, hidden = model.d_model, model.mlp.width(model.d_model)
    layers = plain["forward_flops_per_token"] - 2 * width * 256 - model.repeat * 2 * width * hidden
    more = repeated["flops_per_token"] - plain["flops_per_token"]
    assert more == pytest.approx(layers if remat == "full" else 0, rel=0.02)


def test_operations_a_token_are_within_5_percent_of_what_the_compiler_counts():
    """Of a program without loops, which it counts once; it counts operations by element, too."""
    model = Model(d_model=256, pattern=("attention",), repeat=1, layers="unroll")
    experiment = Experiment(model=model, data=Data(sequence=128, batch=1), mesh=Mesh(data=1))
    trainer = make_trainer(experiment, 256)
    lowered = trainer.step.lower(trainer.abstract, batch_shapes(experiment, trainer))
    counted = lowered.compile().cost_analysis()["flops"] / 128
    assert describe(experiment, 256)["flops_per_token"] == pytest.approx(counted, rel=0.05)
