"""Measures of memories, against what is known of them; the command from the outside."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.cli import main
from memjax.evals.inspection import effective_rank, find_memories, inspect
from memjax.memory import ARMT, LM2, RecurrentTokens
from memjax.mixers import LSTM, MIXERS, Attention, GatedDeltaNet, MoM, RetNet
from memjax.model import LanguageModel, Model, split

WIDTH, VOCAB = 16, 31


def model(pattern, mixers=None, **fields):
    settings = {"repeat": 1, "mlp": None, "mixers": mixers or {}, **fields}
    return Model(d_model=WIDTH, pattern=pattern, **settings)


def lm_of(config, scale=6.0):
    """A model with weights large enough for what it remembers to matter."""
    definition, params = nnx.split(LanguageModel(config, VOCAB, rngs=nnx.Rngs(0)))
    return nnx.merge(definition, jax.tree.map(lambda p: p * scale if p.ndim > 1 else p, params))


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def test_effective_rank_of_matrices_that_tell_theirs():
    rng = np.random.default_rng(0)
    one = np.outer(rng.normal(size=5), rng.normal(size=7))
    a = rng.normal(size=(5, 7))
    p = np.linalg.svd(a, compute_uv=False)
    p /= p.sum()
    matrices = jnp.asarray([np.eye(5, 7), one, np.zeros((5, 7)), 1e-3 * a])
    want = [5, 1, 0, np.exp(-np.sum(p * np.log(p)))]
    np.testing.assert_allclose(effective_rank(matrices), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MIXERS)
def test_every_layer_of_every_mixer_has_a_memory_to_inspect(kind):
    config = Model(d_model=64, pattern=(kind,), repeat=2, tail=(kind,))
    state = nnx.eval_shape(lambda: LanguageModel(config, VOCAB, rngs=nnx.Rngs(0)).init_state(1))
    memories, owners = find_memories(config, state)
    if kind == "base_conv":  # holds its last inputs, and no more
        assert memories == ()
        return
    assert [(memory.layer, memory.kind) for memory in memories] == [(i, kind) for i in range(3)]
    assert {row for owner in owners if owner for row in owner.rows} == {0, 1, 2}


@pytest.mark.parametrize(
    ("memory", "layers"),
    [
        (RecurrentTokens(slots=2, segment=4), [None]),
        (ARMT(slots=2, segment=4), [0, 1, 2]),
        (LM2(slots=2, segment=4, at=(0,)), [0, 0, 1, 2, 2]),
    ],
)
def test_memory_modules_are_found_where_they_attach(memory, layers):
    config = model(("lstm", "lstm"), repeat=1, tail=("lstm",), memory=memory)
    state = nnx.eval_shape(lambda: LanguageModel(config, VOCAB, rngs=nnx.Rngs(0)).init_state(1))
    memories, _ = find_memories(config, state)
    assert [found.layer for found in memories] == layers
    assert sum(found.kind == memory.kind for found in memories) == len(layers) - 3 * (
        isinstance(memory, LM2)
    )


def test_a_fixed_decay_is_the_share_that_is_forgotten():
    """RetNet with one head keeps 31/32 of its memory a token, whatever it reads."""
    config = model(("retnet",), {"retnet": RetNet(heads=1)})
    found = inspect(split(lm_of(config)), config, ids(25), stride=8)
    forget = found.measures["forget"][0]
    assert math.isnan(forget[0])  # there was nothing to forget
    np.testing.assert_allclose(forget[1:], 1 - (31 / 32) ** 8, rtol=1e-4)
    assert found.nll.shape == (24,) and len(found.memories) == 1


def test_measures_equal_those_of_states_read_by_hand():
    """Two layers of two kinds, the second stretch of three, lane by lane."""
    mixers = {"attention": Attention(heads=2, window=9), "lstm": LSTM()}
    config = model(tuple(mixers), mixers)
    lm, tokens = lm_of(config), ids(16)
    found = inspect(split(lm), config, tokens, stride=5)
    read = jax.jit(lambda lm, s, t: lm(s, t, jnp.zeros(t.shape, bool)))
    init = lm.init_state(1)
    before, _ = read(lm, init, tokens[None, :5])
    after, logits = read(lm, before, tokens[None, 5:10])
    log_p = jax.nn.log_softmax(logits[0])
    targets = np.arange(5), tokens[6:11]
    np.testing.assert_allclose(found.nll[5:10], -log_p[targets], rtol=1e-4, atol=1e-5)

    def size(a, b, place, names):
        """|a - b|, or |a| without b."""
        total = 0.0
        for name in names:
            x = getattr(a.patterns[place].mixer, name)
            x = x if b is None else x - getattr(b.patterns[place].mixer, name)
            total += float((x**2).sum())
        return math.sqrt(total)

    for place, names in ((0, ("k_BMGK", "v_BMGK")), (1, ("cell_BD", "hidden_BD"))):
        blocks, start = list(before.patterns), init.patterns[place].mixer
        if place == 0:  # where the document stands is not part of what is remembered
            start = start._replace(position_B=before.patterns[0].mixer.position_B)
        blocks[place] = blocks[place]._replace(mixer=start)
        alone, other = read(lm, before._replace(patterns=tuple(blocks)), tokens[None, 5:10])
        log_e = jax.nn.log_softmax(other[0])
        want = {
            "norm": size(after, None, place, names),
            "written": size(alone, init, place, names),
            "forget": 1 - size(after, alone, place, names) / size(before, init, place, names),
            "read": float((jnp.exp(log_p) * (log_p - log_e)).sum(-1).mean()),
            "gain": float((log_p[targets] - log_e[targets]).mean()),
        }
        for measure, value in want.items():
            got = found.measures[measure][place, 1]
            np.testing.assert_allclose(got, value, rtol=2e-4, atol=1e-5, err_msg=measure)
        assert want["read"] > 1e-4
        assert np.isnan(found.measures["rank"][place]).all()


def test_a_memory_that_nothing_reads_is_neither_read_nor_gained_from():
    config = model(("gated_deltanet",), {"gated_deltanet": GatedDeltaNet(heads=2, chunk=8)})
    definition, params = split(lm_of(config))
    block = params["stack"]["patterns"]["blocks"]["0_gated_deltanet"]["mixer"]
    block["readout"]["out"]["weight"] *= 0
    found = inspect((definition, params), config, ids(17), stride=8)
    for measure in ("read", "gain"):
        np.testing.assert_allclose(found.measures[measure], 0, atol=1e-6)
    assert (found.measures["norm"] > 0).all() and (found.measures["rank"] >= 1).all()
    rates = [found.notes[0, name] for name in ("forget_rate", "write_rate")]
    assert all(((rate > 0) & (rate < 1)).all() for rate in rates)


def test_router_loads_add_up_to_the_memories_that_each_token_chooses():
    mom = MoM(memories=3, top_k=2, heads=2, chunk=8)
    config = model(("mom",), {"mom": mom}, repeat=2)
    found = inspect(split(lm_of(config)), config, ids(17), stride=8)
    for layer in (0, 1):
        loads = [found.notes[layer, f"router_load_{i}"] for i in range(3)]
        np.testing.assert_allclose(sum(loads), 2, rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, with an evaluation."""
    folder = tmp_path_factory.mktemp("inspect") / "run"
    text = folder.parent / "text.txt"
    text.write_text("It remembers what it has read.\n" * 40)
    settings = dict(
        model='{"d_model": 16, "pattern": ["lstm"], "repeat": 1}',
        data=f'{{"source": "text", "path": "{text}", "sequence": 32, "batch": 2}}',
        eval='{"every": 2, "tokens": 64, "memory_tokens": 48}',
        train='{"steps": 2}',
    )
    config = folder.parent / "config.json"
    config.write_text("{" + ", ".join(f'"{k}": {v}' for k, v in settings.items()) + "}")
    assert main(["train", f"--config={config}", f"--workdir={folder}", "--json"]) == 0
    return folder, text


def test_metrics_of_a_run_tell_what_its_memories_do(run):
    last = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])
    for measure in ("norm", "written", "read", "gain"):
        assert math.isfinite(last[f"eval_memory/0_lstm/{measure}"])
    assert last["eval_memory/0_lstm/norm"] > 0


def test_inspect_draws_and_writes_what_it_measured(run, capsys):
    folder, text = run
    capsys.readouterr()
    assert main(["inspect", f"--workdir={folder}", f"--text={text}", "--stride=50", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 1200 and result["positions"][-1] == 1200
    (memory,) = result["memories"]
    assert (memory["name"], memory["kind"], memory["layer"]) == ("0 lstm", "lstm", 0)
    assert len(memory["norm"]) == 24 and memory["forget"][0] is None
    assert (folder / "inspect" / "text-step2.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((folder / "inspect" / "text-step2.json").read_text()) == result
    assert main(["inspect", f"--workdir={folder}", f"--text={text}", "--stride=50"]) == 0
    shown = capsys.readouterr().out
    for word in ("loss", "0 lstm", "norm", "written", "forget", "read", "gain", "█"):
        assert word in shown


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "cannot be read (No such file or directory)"),
        (b"", [], "holds no token; give a file with text"),
        (b"\xff\xfe", [], "not UTF-8 at byte 0"),
        (b"text", ["--stride=0"], "--stride=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, capsys, content, arguments, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    capsys.readouterr()
    assert main(["inspect", f"--workdir={run[0]}", f"--text={path}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
