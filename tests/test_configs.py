"""Every config file builds, survives JSON, and says in its header how to run it."""

import ast
import json
import re
from pathlib import Path

import pytest

from memjax.config import build, parse, to_json
from memjax.data.config import DEFAULT_BPE_SIZE
from memjax.describe import count_parameters
from memjax.experiment import Experiment
from memjax.mixers import MIXERS

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
SIZE = r"Size: +([\d.]+) (\w+) parameters, ([\d.]+) (\w+) of them outside the embedding"
UNITS = {"thousand": (1e3, 0), "million": (1e6, 1), "billion": (1e9, 2)}
VOCABULARIES = {"bytes": 257, "bpe": DEFAULT_BPE_SIZE, "words": 1000}  # where data has to say


def header(path):
    return ast.get_docstring(ast.parse(Path(path).read_text()))


def variants(path):
    """The config itself, and the variants that its header names in backquotes."""
    return [str(path), *(f"{path}:{name}" for name in re.findall(r"`(\w+)`", header(path)))]


@pytest.mark.parametrize(
    "spec", [s for p in CONFIGS for s in variants(p)], ids=lambda s: Path(s).name
)
def test_config_builds_and_survives_json(spec):
    experiment, rest = parse(Experiment, [f"--config={spec}"])
    assert not rest
    assert build(Experiment, json.loads(to_json(experiment))) == experiment
    data = experiment.data
    cost = count_parameters(experiment.model, data.vocab_size or VOCABULARIES[data.tokenizer])
    assert cost["total"] > 0
    size = re.search(SIZE, header(spec.partition(":")[0]))
    for name, at in (("total", 1), ("non_embedding", 3)) if size else ():
        scale, places = UNITS[size[at + 1]]
        assert f"{cost[name] / scale:.{places}f}" == size[at]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_header_says_command_and_hardware(path):
    text = header(path)
    assert f"memjax train --config=configs/{path.name}" in text or "memjax bench" in text
    assert "Hardware:" in text


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_has_a_tiny_config(kind):
    assert any(path.name == f"{kind}_tiny.py" for path in CONFIGS)
