"""The benchmark of the kernels runs on a CPU, and its check against float64 can fail."""

import json

import jax.numpy as jnp
import pytest

from pallas_kernels import bench

TINY = ["--ops=delta_rule", "--total=32", "--tokens=16", "--heads=1", "--sizes=4", "--repeats=1"]


def test_the_benchmark_checks_times_and_writes_its_results(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert bench.main([*TINY, "--impls=xla,tpu", f"--json={path}"]) == 0
    (row,) = json.loads(path.read_text())["results"]
    assert row["shape"]["batch"] == 2 and row["impl"] == "xla"
    assert 0 < row["error"] < 1e-5 and 0 < row["gradient_error"] < 1e-5
    assert row["both_ms"] > 0 and row["roof_share"] > 0
    assert (
        "tpu       T=16     not run: delta_rule: impl='tpu' is not availa"
        in capsys.readouterr().out
    )


def test_a_wrong_implementation_shows_as_an_error(monkeypatch):
    right = bench.OPS["linear_attention"]

    def wrong(q, impl, **rest):
        return right(q=q * jnp.float32(1.0 if impl == "reference" else 1.01), impl=impl, **rest)

    monkeypatch.setitem(bench.OPS, "linear_attention", wrong)
    shape = bench.Shape("linear_attention", 1, 16, 1, 4, "float32")
    assert min(bench.errors(shape, "xla", 16)) > 0.005


@pytest.mark.parametrize("setting", ["--ops=conv", "--impls=cuda"])
def test_an_unknown_name_is_refused(setting, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main([setting])
    assert "is not one of" in capsys.readouterr().err
