"""Matching before launch: what is solved for agrees, and is what `describe` counts."""

import dataclasses
import json
from pathlib import Path

import pytest

from memjax.cli import main
from memjax.config import ConfigError, build, load_file, to_dict
from memjax.data import Data
from memjax.describe import describe
from memjax.experiment import Experiment
from memjax.match import Match, match, quantity
from memjax.match.fields import candidates, read, with_value
from memjax.memory import MEMORIES, MemoryPlus, ProductKeys, RecurrentTokens
from memjax.mixers import Attention, GatedDeltaNet, LinearAttention
from memjax.model import Model

CONFIGS = Path(__file__).parent.parent / "configs"
VOCABULARY = 257
KEYS = {
    "params": "params",
    "non_embedding": "non_embedding_params",
    "state": "state_bytes_per_sequence",
    "flops": "flops_per_token",
}


def experiment(mixer, d_model=64, **fields):
    model = Model(d_model=d_model, pattern=(mixer.kind,), repeat=2, mixers={mixer.kind: mixer})
    return Experiment(model=model, data=Data(sequence=64), **fields)


ATTENTION = experiment(Attention(heads=2, window=32), d_model=96)
DELTA = experiment(GatedDeltaNet(heads=2))
LINEAR = experiment(LinearAttention(heads=2))


@pytest.mark.parametrize("config", [ATTENTION, DELTA], ids=["attention", "delta"])
def test_a_quantity_is_what_describe_counts(config):
    told = describe(config, VOCABULARY)
    for by, key in KEYS.items():
        assert quantity(config, VOCABULARY, by) == told[key]


@pytest.mark.parametrize("by", KEYS)
@pytest.mark.parametrize(
    ("config", "to"),
    [(DELTA, ATTENTION), (LINEAR, ATTENTION)],
    ids=["delta-attention", "linear-attention"],
)
def test_matched_configs_agree_within_one_per_cent(config, to, by):
    target = quantity(to, VOCABULARY, by)
    found = match(config, VOCABULARY, target, Match(by=by))
    told = quantity(found.experiment, VOCABULARY, by)
    assert told == found.value and abs(told - target) <= 0.01 * target
    assert found.before == quantity(config, VOCABULARY, by)


def tiny(kind):
    found = build(Experiment, load_file(str(CONFIGS / f"{kind}_tiny.py")))
    return dataclasses.replace(found, data=dataclasses.replace(found.data, sequence=64))


PAIRS = {
    "params": {"attention": "based", "lstm": "mamba", "hgrn2": "miras", "mamba2": "titans_lmm"},
    "state": {"gated_deltanet": "mom", "mamba": "titans_lmm", "rg_lru": "mamba2", "retnet": "gla"},
    "flops": {"gla": "rg_lru", "titans_mal": "mlstm", "base_conv": "attention", "ttt_mlp": "gla"},
}


HEAVY = ("titans_mal", "ttt_mlp")  # their operations take seconds to count


@pytest.mark.parametrize(
    ("by", "kind", "other"),
    [
        pytest.param(by, *pair, marks=pytest.mark.slow if pair[0] in HEAVY else ())
        for by, pairs in PAIRS.items()
        for pair in pairs.items()
    ],
)
def test_pairs_of_kinds_are_matched_within_one_per_cent(by, kind, other):
    target = quantity(tiny(other), VOCABULARY, by)
    found = match(tiny(kind), VOCABULARY, target, Match(by=by))
    told = quantity(found.experiment, VOCABULARY, by)
    assert told == found.value and abs(told - target) <= 0.01 * target


ATTACHED = sorted(kind for kind in MEMORIES if (CONFIGS / f"{kind}_tiny.py").is_file())


@pytest.mark.parametrize("kind", ATTACHED)
def test_what_is_solved_for_in_a_model_with_a_memory_are_fields_that_it_uses(kind):
    config = tiny(kind)
    for by in ("params", "state"):
        fields = candidates(config, by)
        assert any(field.startswith("model.memory.") for field in fields) or kind == "infini"
        for field in fields:
            value = read(config, field)
            assert value is None or with_value(config, field, value) == config
    unused = {"transformer_xl": "context", "infini": "window"}.get(kind)
    assert f"model.mixers.attention.{unused}" not in fields


@pytest.mark.parametrize(
    ("kind", "by", "other", "changed"),
    [
        ("recurrent", "state", "gated_deltanet", "model.memory.slots"),
        ("transformer_xl", "state", "gated_deltanet", "model.memory.memory"),
        ("armt", "state", "gated_deltanet", "model.memory.memory_size"),
        ("lm2", "params", "mamba", "model.d_model"),
        pytest.param(
            "compressive", "flops", "gla", "model.d_model", marks=pytest.mark.slow
        ),  # its operations take seconds to count
        ("product_keys", "params", "mamba", "model.memory.keys"),
    ],
)
def test_models_with_a_memory_are_matched_within_one_per_cent(kind, by, other, changed):
    if kind == "recurrent":
        model = dataclasses.replace(tiny("armt").model, memory=RecurrentTokens(slots=8, segment=64))
        config = dataclasses.replace(tiny("armt"), model=model)
    else:
        config = tiny(kind)
    target = quantity(tiny(other), VOCABULARY, by)
    found = match(config, VOCABULARY, target, Match(by=by))
    told = quantity(found.experiment, VOCABULARY, by)
    assert told == found.value and abs(told - target) <= 0.01 * target
    assert changed in found.changed


@pytest.mark.parametrize("memory", [ProductKeys(at=(1,)), MemoryPlus(at=(1,)), MemoryPlus()])
def test_a_table_is_solved_for_and_widths_are_left_alone(memory):
    dense = Experiment(model=Model(pattern=("attention",) * 2, repeat=2))
    with_table = dataclasses.replace(dense.model, memory=memory)
    target = quantity(dense, VOCABULARY, "params")
    found = match(dataclasses.replace(dense, model=with_table), VOCABULARY, target, Match())
    assert "model.memory.keys" in found.changed and "model.d_model" not in found.changed
    assert abs(found.value - target) <= 0.01 * target


def test_steps_too_coarse_for_one_field_are_met_by_two_and_both_are_told():
    config = experiment(Attention(heads=2, window=4), d_model=64)  # a slot more is a third more
    target = quantity(experiment(Attention(heads=2, window=5, head_size=34)), VOCABULARY, "state")
    found = match(config, VOCABULARY, target, Match(by="state"))
    assert set(found.changed) == {
        "model.mixers.attention.window",
        "model.mixers.attention.head_size",
    }
    assert abs(quantity(found.experiment, VOCABULARY, "state") - target) <= 0.01 * target
    with pytest.raises(ConfigError, match="the closest is"):
        match(
            config, VOCABULARY, target, Match(by="state", change=("model.mixers.attention.window",))
        )


def test_only_what_was_said_to_change_has_changed():
    target = quantity(ATTENTION, VOCABULARY, "params")
    found = match(DELTA, VOCABULARY, target, Match(change=("model.d_model", "model.mlp.ratio")))
    data = to_dict(DELTA)
    for path, (old, new) in found.changed.items():
        *sections, last = path.split(".")
        here = data
        for section in sections:
            here = here[section]
        assert here[last] == old != new
        here[last] = new
    assert build(Experiment, data) == found.experiment


def test_a_size_left_to_its_default_can_be_solved_for():
    assert DELTA.model.mixers["gated_deltanet"].key_size is None
    target = 4 * quantity(DELTA, VOCABULARY, "state")
    field = "model.mixers.gated_deltanet.key_size"
    found = match(DELTA, VOCABULARY, target, Match(by="state", change=(field,)))
    assert list(found.changed) == [field] and found.changed[field][0] is None
    assert found.experiment.model.d_model == DELTA.model.d_model


def test_a_window_is_solved_for_exactly():
    target = quantity(experiment(Attention(heads=2, window=77), 96), VOCABULARY, "state")
    found = match(ATTENTION, VOCABULARY, target, Match(by="state", tolerance=1e-9))
    assert found.value == target
    assert found.changed == {"model.mixers.attention.window": (32, 77)}


def test_equal_configs_stay_as_they_are():
    target = quantity(DELTA, VOCABULARY, "params")
    found = match(DELTA, VOCABULARY, target, Match())
    assert found.experiment == DELTA and found.changed == {}


@pytest.mark.parametrize(
    ("settings", "target", "parts"),
    [
        (Match(change=("model.d_modle",)), 1e5, ["d_modle", "did you mean d_model?"]),
        (Match(change=("model.mixers.lstm.x",)), 1e5, ["lstm", "gated_deltanet"]),
        (Match(change=("model.dtype",)), 1e5, ["model.dtype", "number"]),
        (Match(change=("model.mixers.gated_deltanet.chunk",)), 1e5, ["chunk", "changes nothing"]),
        (Match(change=("model.repeat",)), 1.4e5, ["closest", "model.repeat"]),
    ],
)
def test_what_cannot_be_matched_is_one_line(settings, target, parts):
    with pytest.raises(ConfigError) as caught:
        match(DELTA, VOCABULARY, target, settings)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_the_command_prints_arguments_that_make_the_matched_config(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MEMJAX_CACHE", str(tmp_path / "cache"))
    small = ["--config.model.d_model=64", "--config.model.repeat=2"]
    saved = tmp_path / "matched.json"
    assert main(["match", *small, "--to=200e3", f"--save={saved}", "--json"]) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert abs(told["after"] - 200e3) <= 2000 and told["difference"] == told["after"] / 200e3 - 1
    assert main(["describe", *small, *told["arguments"], "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["params"] == told["after"]
    assert main(["describe", f"--config={saved}", "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["params"] == told["after"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--to"]),
        (["--to=nowhere.py"], ["nowhere.py"]),
        (["--to=-3"], ["to=-3"]),
        (["--to=1e6", "--by=parms"], ["parms", "params"]),
        (["--to=1e6", "--tolerance=0"], ["tolerance=0"]),
    ],
)
def test_a_wrong_argument_is_one_line(argv, parts, capfd):
    assert main(["match", *argv]) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1 and all(part in err for part in parts), err
