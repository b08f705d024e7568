"""Evaluation scores every token once, with the context its protocol gives, and divides once.

Tolerance: nats of a token are float32 from logits of order one, so sums agree to about 1e-6.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config import ConfigError
from memjax.data import Data, DataError, open_corpus
from memjax.evals import perplexity
from memjax.evals import run as runs
from memjax.evals.config import Eval
from memjax.evals.perplexity import evaluate, quick_eval
from memjax.evals.protocols import Protocol, Span, assemble, chains, resolve, rounds, take
from memjax.evals.result import OFFICIAL_WORDS, Result
from memjax.experiment import Experiment
from memjax.mixers import LSTM, Attention
from memjax.model import LanguageModel, Model, split
from memjax.sharding import Mesh, make_mesh

CLOSE = {"rtol": 1e-6}
CONTEXT = 16
WORDS = ["the", "memory", "of", "a", "book", "élan", "naïve", "—", "x\r\n", "and\n\n"]


MIXERS = {"attention": Attention(heads=2, context=24), "lstm": LSTM(unroll=1)}


def make_corpus(folder, tokenizer="bytes", sizes=(40, 7, 1, 90, 16), seed=0, **settings):
    """Documents of so many words; the third is one character."""
    rng = np.random.default_rng(seed)
    (folder / "text" / "test").mkdir(parents=True)
    (folder / "text" / "train").mkdir()
    for i, size in enumerate(sizes):
        text = " ".join(rng.choice(WORDS, size)) if size > 1 else "é"
        for part in ("test", "train"):
            (folder / "text" / part / f"{i}.txt").write_bytes(text.encode())
    data = Data(
        source="text",
        path=str(folder / "text"),
        tokenizer=tokenizer,
        cache=str(folder / "cache"),
        **settings,
    )
    return open_corpus(data, "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("bytes"))


def make_lm(vocab_size=257, pattern=("attention", "lstm"), scale=6.0):
    """A model whose predictions depend strongly on what it has read."""
    config = Model(
        d_model=16,
        pattern=pattern,
        repeat=1,
        mlp=None,
        mixers={name: MIXERS[name] for name in pattern},
    )
    lm = LanguageModel(config, vocab_size, rngs=nnx.Rngs(3))
    definition, params = nnx.split(lm)
    return nnx.merge(definition, jax.tree.map(lambda p: p * scale if p.ndim > 1 else p, params))


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@jax.jit
def forward(lm, tokens_BT):
    return lm(lm.init_state(1), tokens_BT, jnp.zeros(tokens_BT.shape, bool))[1]


def document(corpus, d):
    return np.asarray(corpus.tokens[corpus.starts[d] : corpus.starts[d + 1]], np.int32)


def window_nats(lm, ids, start, stop):
    """Nats of targets start + 1 .. stop, from a pass over ids[start:stop] alone, in float64.

    Inputs are padded at their end, so that two compilations serve all.
    """
    length = CONTEXT if stop - start <= CONTEXT else 640
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : stop - start] = ids[start:stop]
    logits = np.asarray(forward(lm, tokens), np.float64)[0, : stop - start]
    logits -= logits.max(-1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_probability[np.arange(stop - start), ids[start + 1 : stop + 1]]


def windows_nats(lm, corpus, context):
    total = 0.0
    for d in range(len(corpus.names)):
        ids = document(corpus, d)
        for start in range(0, len(ids) - 1, context):
            total += window_nats(lm, ids, start, min(start + context, len(ids) - 1)).sum()
    return total


def sliding_nats(lm, corpus, context, stride):
    total = 0.0
    for d in range(len(corpus.names)):
        ids = document(corpus, d)
        last = len(ids) - 1
        total += window_nats(lm, ids, 0, min(context, last)).sum()
        for end in range(context, last, stride):  # targets end + 1 .. end + stride
            start, stop = end + stride - context, min(end + stride, last)
            total += window_nats(lm, ids, start, stop)[end - start :].sum()
    return total


def whole_nats(lm, corpus):
    ids = [document(corpus, d) for d in range(len(corpus.names))]
    return [window_nats(lm, i, 0, len(i) - 1).sum() for i in ids]


def run(lm, corpus, context=CONTEXT, **settings):
    return evaluate(lm, corpus, Eval(context=context, **settings), sequence=7)


PROTOCOLS = [
    Protocol(name="stream", context=8, stride=None, carry=True),
    Protocol(name="stream", context=8, stride=None, carry=False),
    Protocol(name="windows", context=8, stride=None, carry=False),
    *(Protocol(name="sliding", context=8, stride=s, carry=False) for s in (1, 3, 7, 8)),
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: f"{p.name}-{p.stride}-{p.carry}")
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_every_target_is_scored_once_in_its_own_document(protocol, lanes):
    rng = np.random.default_rng(lanes)
    lengths = [0, 1, 7, 8, 9, 16, *rng.integers(0, 60, 12)]
    spans = [Span(d, int(n), True) for d, n in enumerate(lengths)]
    scored = np.zeros((len(lengths), 64), int)
    reached = [None] * lanes
    for row in rounds(chains(protocol, spans), lanes):
        # A token is (document, position), so what was read can be told from what was scored.
        batch = assemble(row, 8, lambda d, start, stop: d * 1000 + np.arange(start, stop))
        for lane, window in enumerate(batch.windows):
            if window is None:
                assert not batch.reset_BT[lane].any()
                continue
            inputs = batch.tokens_BT[lane, : window.length]
            targets = batch.targets_BT[lane, : window.length]
            np.testing.assert_array_equal(targets, inputs + 1)
            assert (targets // 1000 == window.document).all()
            assert targets[-1] % 1000 <= lengths[window.document]
            assert not batch.reset_BT[lane, 1:].any()
            if not batch.reset_BT[lane, 0]:
                assert inputs[0] == reached[lane], "carried state must be that of the token before"
            else:
                assert not protocol.carry or inputs[0] % 1000 == 0
            reached[lane] = targets[-1]
            np.add.at(scored[window.document], targets[window.skip :] % 1000, 1)
    for d, length in enumerate(lengths):
        assert (scored[d, 1 : length + 1] == 1).all()
        assert scored[d].sum() == length


@pytest.mark.parametrize("batch", [2, 8])
def test_stream_with_carry_equals_each_document_in_one_pass(lm, corpus, batch):
    result = run(lm, corpus, batch=batch)
    want = whole_nats(lm, corpus)
    np.testing.assert_allclose(result.nll_nats, sum(want), **CLOSE)
    np.testing.assert_allclose([n for _, _, n in result.per_document], want, rtol=3e-6)
    assert result.tokens == corpus.number_of_targets == corpus.bytes.sum()


def test_lanes_on_a_mesh_give_the_same_sum(lm, corpus):
    mesh = make_mesh(Mesh(), 8 * jax.device_count())
    got = evaluate(lm, corpus, Eval(), sequence=CONTEXT, mesh=mesh).nll_nats
    np.testing.assert_allclose(got, run(lm, corpus).nll_nats, **CLOSE)


def test_windows_equal_separate_passes(lm, corpus):
    want = windows_nats(lm, corpus, CONTEXT)
    np.testing.assert_allclose(run(lm, corpus, protocol="windows").nll_nats, want, **CLOSE)
    np.testing.assert_allclose(run(lm, corpus, carry=False).nll_nats, want, **CLOSE)
    carried = run(lm, corpus).nll_nats
    assert abs(carried - want) > 1e-3 * want, "the carried state must matter to this test"


@pytest.mark.parametrize("stride", [3, 11])
def test_sliding_equals_separate_passes(lm, corpus, stride):
    result = run(lm, corpus, protocol="sliding", stride=stride)
    want = sliding_nats(lm, corpus, CONTEXT, stride)
    np.testing.assert_allclose(result.nll_nats, want, **CLOSE)
    assert result.tokens == corpus.number_of_targets


def test_sliding_by_the_context_equals_windows(lm, corpus):
    sliding = run(lm, corpus, protocol="sliding", stride=CONTEXT)
    assert sliding.nll_nats == run(lm, corpus, protocol="windows").nll_nats


def test_slices_of_logits_do_not_change_the_sum(lm, corpus, monkeypatch):
    want = run(lm, corpus).nll_nats
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 257 * 5 * 3)  # 3 tokens of 5 lanes
    perplexity._compiled.cache_clear()
    np.testing.assert_allclose(run(lm, corpus).nll_nats, want, **CLOSE)
    perplexity._compiled.cache_clear()


def test_uniform_model_has_the_perplexity_of_its_vocabulary(corpus):
    definition, params = split(make_lm(pattern=("lstm",)))
    parts = (definition, jax.tree.map(jnp.zeros_like, params))
    result = run(parts, corpus)
    words = sum(len(n.split()) for n in texts(corpus))
    nats = corpus.number_of_targets * math.log(257)
    np.testing.assert_allclose(result.token_perplexity, 257, **CLOSE)
    np.testing.assert_allclose(result.bits_per_byte, math.log2(257), **CLOSE)
    np.testing.assert_allclose(result.word_perplexity, math.exp(nats / words), rtol=1e-5)


def texts(corpus):
    return [corpus.tokenizer.decode(document(corpus, d)) for d in range(len(corpus.names))]


def test_positions_count_from_the_start_of_each_document(lm, corpus):
    result = run(lm, corpus)
    position = np.concatenate([np.arange(1, n) for n in np.diff(corpus.starts)])
    nats = np.concatenate(
        [window_nats(lm, i, 0, len(i) - 1) for i in (document(corpus, d) for d in range(5))]
    )
    for first, last, tokens, sums in result.positions:
        inside = (first <= position) & (position <= last)
        assert tokens == inside.sum()
        np.testing.assert_allclose(sums, nats[inside].sum(), rtol=1e-5)
    assert sum(tokens for _, _, tokens, _ in result.positions) == result.tokens


def test_an_early_stop_scores_whole_segments_from_the_start(lm, corpus):
    result = evaluate(lm, corpus, Eval(), sequence=CONTEXT, max_tokens=100)
    first = document(corpus, 0)
    cut = 100 // CONTEXT * CONTEXT
    while first[cut + 1] & 0xC0 == 0x80:  # never inside a character
        cut -= 1
    assert (result.tokens, result.documents, result.whole) == (cut, 1, False)
    np.testing.assert_allclose(
        result.nll_nats, window_nats(lm, first, 0, len(first) - 1)[:cut].sum(), **CLOSE
    )
    assert (result.words, result.bytes) == (None, cut)
    assert take(corpus, CONTEXT, 1)[0].targets in range(CONTEXT - 3, CONTEXT + 1)
    assert all(span.whole for span in take(corpus, CONTEXT, corpus.number_of_targets))


def test_evaluation_during_training_reports_only_what_is_exact(lm, corpus):
    cut = quick_eval(lm, corpus, Eval(tokens=100), sequence=CONTEXT)
    whole = quick_eval(lm, corpus, Eval(tokens=None), sequence=CONTEXT)
    assert set(cut) == {"eval_loss", "eval_tokens", "eval_bits_per_byte"}
    assert set(whole) == {*cut, "eval_word_perplexity"}
    np.testing.assert_allclose(cut["eval_bits_per_byte"], cut["eval_loss"] / math.log(2))
    nats = sum(whole_nats(lm, corpus))
    np.testing.assert_allclose(whole["eval_loss"], nats / corpus.number_of_targets, **CLOSE)


def test_bpe_counts_bytes_and_words_of_the_text(tmp_path):
    corpus = make_corpus(tmp_path, "bpe", sizes=(300, 50), vocab_size=300)
    lm = make_lm(300, ("lstm",), 1.0)
    result = run(lm, corpus)
    raw = [path.read_bytes() for path in sorted((tmp_path / "text" / "test").iterdir())]
    assert result.bytes == sum(map(len, raw)) > result.tokens
    assert result.words == sum(len(text.decode().split()) for text in raw)
    cut = evaluate(lm, corpus, Eval(), sequence=8, max_tokens=100)
    span = take(corpus, 8, 100)[0]
    assert raw[0].decode().startswith(texts(corpus)[0])
    prefix = corpus.tokenizer.decode(document(corpus, 0)[1 : span.targets + 1])
    assert cut.bytes == len(prefix.encode()) and raw[0].startswith(prefix.encode())


def test_words_of_wikitext_are_its_tokens(tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for part in ("train", "valid", "test"):
        (folder / f"wiki.{part}.tokens").write_text(" \n = A title = \n \n the cat <unk> sat \n")
    data = Data(
        source="wikitext", path=str(folder), tokenizer="words", cache=str(tmp_path / "cache")
    )
    corpus = open_corpus(data, "test")
    lm = make_lm(corpus.tokenizer.vocab_size, ("lstm",), 1.0)
    values = run(lm, corpus).to_dict()
    assert values["words"] == values["tokens"] == 8 + 4  # 8 words, 4 line ends
    assert values["word_perplexity"] == values["token_perplexity"]
    assert values["official"] is None
    assert any("not comparable" in note for note in values["notes"])
    assert any("<unk>" in note for note in values["notes"])
    quick = quick_eval(lm, corpus, Eval(tokens=5), sequence=4)
    assert "eval_word_perplexity" in quick and "eval_bits_per_byte" not in quick


def make_result(**changes):
    values = {
        "task": "pg19",
        "split": "test",
        "protocol": "stream",
        "context": 8,
        "stride": None,
        "carry": True,
        "documents": 100,
        "tokens": 1000,
        "words": 250,
        "bytes": 1200,
        "nll_nats": 900.0,
        "whole": True,
        "lossless": True,
        "step": 3,
        "seconds": 2.0,
        "per_document": (),
        "positions": ((1, 1, 2, 4.0),),
    }
    return Result(**{**values, **changes})


def test_published_divisors_are_used_for_the_full_benchmark_only():
    words = OFFICIAL_WORDS["pg19", "test"][1]
    full = make_result(nll_nats=3.0 * words).to_dict()
    np.testing.assert_allclose(full["official"]["word_perplexity"], math.exp(3.0))
    assert full["official"]["words"] == 6_966_499
    assert make_result(documents=8).official is None
    assert make_result(whole=False).official is None
    assert make_result(task="text").official is None
    assert make_result(task="wikitext", words=245_569).official["words"] == 245_569
    assert make_result(task="wikitext", words=245_568).official is None


@pytest.mark.parametrize("nats", [1e9, math.inf, math.nan])
def test_numbers_that_json_cannot_hold_are_null_with_a_note(nats):
    values = json.loads(json.dumps(make_result(nll_nats=nats).to_dict(), allow_nan=False))
    assert values["word_perplexity"] is None
    assert any("null" in note for note in values["notes"])


def test_mistakes_are_one_line(tmp_path, lm, corpus):
    with pytest.raises(ConfigError, match="stride=9 must be at most context=8"):
        resolve(Eval(protocol="sliding", stride=9), 8)
    assert resolve(Eval(protocol="sliding"), 8).stride == 4
    (tmp_path / "a.txt").write_text("hello\n")
    words = Data(source="text", path=str(tmp_path), cache=str(tmp_path / "c"))
    nothing = open_corpus(words, "all")
    with pytest.raises(DataError, match="no tokens to score"):
        evaluate(lm, nothing, Eval(), sequence=8, max_documents=0)


@pytest.fixture
def trained(lm, corpus, monkeypatch):
    """Stands for a checkpoint on disk: loading one is tested with the checkpoints."""
    folder = corpus.folder.parents[2]
    data = Data(source="text", path=str(folder / "text"), cache=str(folder / "cache"), sequence=8)
    experiment = Experiment(data=data, eval=Eval(protocol="sliding", stride=3, batch=4))
    loaded = runs.Run(experiment, split(lm), corpus.tokenizer, 12)
    monkeypatch.setattr(runs, "load_run", lambda workdir, step: loaded)


@pytest.mark.usefixtures("trained")
def test_an_evaluation_is_written_beside_its_run(tmp_path, lm, corpus):
    values = runs.run_eval(tmp_path, protocol="windows", context=CONTEXT)
    np.testing.assert_allclose(values["nll_nats"], windows_nats(lm, corpus, CONTEXT), **CLOSE)
    wanted = (12, "text", "test", "windows", CONTEXT, None, False)
    names = ("step", "task", "split", "protocol", "context", "stride", "carry")
    assert tuple(values[name] for name in names) == wanted
    (path,) = (tmp_path / "eval").iterdir()
    digest = json.loads(path.read_text())["data_digest"][:8]
    assert path.name == f"text-test-windows-context16-step12-{digest}.json"
    assert json.loads(path.read_text()) == values
    sliding = runs.run_eval(tmp_path, max_documents=2)  # the run's own protocol
    assert (sliding["context"], sliding["stride"], sliding["documents"]) == (8, 3, 2)
    assert not sliding["whole_split"] and len(list((tmp_path / "eval").iterdir())) == 2


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "wikitext"}, "--task=wikitext needs --data=PATH"),
        ({"task": "wiki"}, "--task=wiki must be one of"),
        ({"data": "/nowhere"}, "/nowhere does not exist"),
        ({"split": "valid"}, "has no split 'valid'"),
        ({"protocol": "windows", "stride": 2}, 'eval.stride=2 needs protocol="sliding"'),
        ({"stride": 9}, "stride=9 must be at most context=8"),
        ({"carry": True}, "--carry=true needs --protocol=stream"),
        ({"context": 0}, "eval.context=0 must be at least 1"),
        ({"max_documents": 0}, "--max_documents=0 must be at least 1"),
    ],
)
def test_mistakes_in_the_command_are_one_line(tmp_path, settings, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        runs.run_eval(tmp_path, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "eval").exists()


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        runs.run_eval(tmp_path / "none")
