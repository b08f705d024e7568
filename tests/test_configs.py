"""Every config file builds, survives JSON, and says in its header how to run it."""

import ast
import json
import re
from pathlib import Path

import pytest

from memjax.config import build, parse, to_json
from memjax.describe import describe
from memjax.experiment import Experiment
from memjax.mixers import MIXERS

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def header(path):
    return ast.get_docstring(ast.parse(path.read_text()))


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
    assert describe(experiment, 257)["params"] > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_header_says_command_and_hardware(path):
    text = header(path)
    assert f"memjax train --config=configs/{path.name}" in text or "memjax bench" in text
    assert "Hardware:" in text


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_has_a_tiny_config(kind):
    assert any(path.name == f"{kind}_tiny.py" for path in CONFIGS)
