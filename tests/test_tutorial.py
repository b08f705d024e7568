"""docs/tutorial.md, followed to the letter in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(?:^`(?P<file>[^`\n]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
COPIED = ("memjax", "pallas_kernels", "tests", "configs", "experiments", "pyproject.toml")


def blocks():
    return [
        match.groupdict() for match in BLOCK.finditer((ROOT / "docs" / "tutorial.md").read_text())
    ]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository, and shell commands in it that find this Python as `python` and `memjax`."""
    folder, programs = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("bin")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    for name, arguments in (("python", ""), ("memjax", "-m memjax")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    environment["MEMJAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return folder, environment


def shell(copy, text):
    folder, environment = copy
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def follow(copy, steps):
    outputs = []
    for block in steps:
        if block["file"]:
            path = copy[0] / block["file"]
            assert not path.exists(), f"{path} is there before the tutorial makes it"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"])
        elif block["kind"] == "sh":
            outputs.append(shell(copy, block["text"]))
    return outputs


def test_the_tutorial_adds_a_mixer_that_equals_its_oracle(copy):
    steps = blocks()
    until = next(i for i, block in enumerate(steps) if "pytest" in block["text"])
    follow(copy, steps[:until])
    law = "python -m pytest tests/test_mixer_laws.py -k 'token_loop and mingru'"
    assert "1 passed" in shell(copy, law)
    cost = shell(copy, "memjax describe --config=configs/mingru_tiny.py --json")
    assert '"kind": "mingru"' in cost


@pytest.mark.slow
def test_the_rest_of_the_tutorial_runs_as_written(copy):
    steps = blocks()
    if not (copy[0] / "configs" / "mingru_tiny.py").exists():
        follow(copy, [b for b in steps if b["file"] and "leaky" not in b["file"]])
        follow(copy, [b for b in steps if "sed -i" in b["text"]])
    at = next(i for i, block in enumerate(steps) if "pytest" in block["text"])
    laws, _, matched, planned = follow(copy, steps[at:])
    passed = int(re.search(r"(\d+) passed", laws)[1])
    assert passed >= 14 and "failed" not in laws
    assert "d_model" in matched
    assert "4 done of 4" in planned and (copy[0] / "runs/leaky/report/report.html").is_file()
