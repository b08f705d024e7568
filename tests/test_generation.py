"""Generation draws from the distribution of a full pass, and shows the text it drew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config import ConfigError
from memjax.data.tokenizers import Bpe, Bytes, Words
from memjax.evals.generation import (
    BURST,
    Sampling,
    decode_stream,
    encode_prompt,
    filter_logits,
    generate,
    generate_tokens,
    read_prompt,
)
from memjax.mixers import LSTM, Attention
from memjax.model import LanguageModel, Model, split

PROMPT = "a prompt longer than its segments: é"


@pytest.fixture(scope="module")
def lm():
    mixers = {"attention": Attention(heads=2, context=64), "lstm": LSTM(unroll=1)}
    config = Model(d_model=16, pattern=tuple(mixers), repeat=1, mlp=None, mixers=mixers)
    lm = LanguageModel(config, 257, rngs=nnx.Rngs(5))
    definition, params = nnx.split(lm)
    return nnx.merge(definition, jax.tree.map(lambda p: p * 6 if p.ndim > 1 else p, params))


@jax.jit
def forward(lm, tokens_BT):
    return lm(lm.init_state(1), tokens_BT, jnp.zeros(tokens_BT.shape, bool))[1]


def full_pass(lm, ids):
    """Logits after each of `ids`, in one pass of a fixed length."""
    tokens = np.zeros((1, 96), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(forward(lm, tokens))[0, : len(ids)]


@pytest.mark.parametrize("segment", [16, 512])
def test_prompt_read_in_segments_equals_the_full_pass(lm, segment):
    ids = encode_prompt(Bytes(), PROMPT)
    assert ids[0] == 256 and len(ids) == len(PROMPT.encode()) + 1
    _, logits_BY = read_prompt(*split(lm), ids, segment)
    np.testing.assert_allclose(logits_BY[0], full_pass(lm, ids)[-1], rtol=1e-4, atol=1e-4)


def drawn(lm, tokens, sampling, prompt=PROMPT, seed=0, segment=16):
    ids = encode_prompt(Bytes(), prompt)
    return ids, list(
        generate_tokens(lm, Bytes(), ids, tokens, sampling, seed=seed, segment=segment)
    )


def test_greedy_takes_the_argmax_of_the_full_pass(lm):
    ids, got = drawn(lm, 2 * BURST + 3, Sampling(temperature=0))
    logits = full_pass(lm, [*ids, *got])[len(ids) - 1 : -1, :256]
    assert len(got) == 2 * BURST + 3
    best = np.sort(logits, -1)
    clear = best[:, -1] - best[:, -2] > 1e-3  # a tie in float32 may fall either way
    assert clear.sum() > BURST
    np.testing.assert_array_equal(np.array(got)[clear], logits.argmax(-1)[clear])


def test_draws_follow_the_distribution_of_the_full_pass(lm):
    """Each draw is the Gumbel maximum of the full pass's logits with the draw's own key."""
    temperature = 0.7
    ids, got = drawn(lm, BURST + 4, Sampling(temperature=temperature), seed=11)
    logits = full_pass(lm, [*ids, *got])[len(ids) - 1 : -1] / temperature
    logits[:, 256] = -np.inf
    hits = 0
    for index, token in enumerate(got):
        key = jax.random.fold_in(jax.random.key(11), index)
        noisy = logits[index] + np.asarray(jax.random.gumbel(key, (257,)))
        hits += int(noisy.argmax() == token)
    assert hits >= len(got) - 1  # one near tie may fall either way


def numpy_filter(logits, temperature, top_k, top_p):
    """Probabilities by definition, in float64."""
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    p = {i: p[i] / sum(p[j] for j in kept) for i in kept}
    if top_p:
        nucleus, total = {}, 0.0
        for i in kept:
            nucleus[i] = p[i]
            total += p[i]
            if total >= top_p:
                break
        p = {i: value / total for i, value in nucleus.items()}
    return np.array([p.get(i, 0.0) for i in range(len(logits))])


@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.33, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_top_k_and_top_p_by_definition(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32) * 3
    logits[7] = logits[3]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    got = jax.nn.softmax(filter_logits(sampling, jnp.asarray(logits)))
    np.testing.assert_allclose(got, numpy_filter(logits, temperature, top_k, top_p), atol=1e-6)


def test_same_seed_gives_the_same_text_and_another_seed_another(lm):
    texts = [generate(lm, Bytes(), "x", tokens=40, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    short = drawn(lm, 5, Sampling(), "x", 1)[1]
    assert drawn(lm, 40, Sampling(), "x", 1)[1][:5] == short


def test_streamed_pieces_are_the_text_and_end_at_characters(lm):
    pieces = []
    text = generate(
        lm, Bytes(), PROMPT, tokens=60, temperature=1.5, segment=16, stream=pieces.append
    )
    assert "".join(pieces) == text and len(pieces) > 5


def test_no_tokens_and_no_prompt(lm):
    assert generate(lm, Bytes(), "", tokens=0) == ""
    assert len(drawn(lm, 3, Sampling(), prompt="")[1]) == 3


def test_document_start_is_never_drawn(lm):
    definition, params = split(lm)
    params = jax.tree.map(lambda p: p, params)
    params["embedding"] = jnp.full_like(params["embedding"], -1.0).at[256].set(1.0)
    likely = np.asarray(forward(nnx.merge(definition, nnx.State(params)), np.array([[256]])))
    params["embedding"] *= -np.sign(likely[0, 0, 0] - likely[0, 0, 256])
    got = drawn((definition, params), 32, Sampling(temperature=0))[1]
    assert 256 not in got and got


@pytest.mark.parametrize("text", ["naïve — “élan” 🙂🙂 \r\n\n x", "ab"])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "words"])
def test_pieces_make_the_decoded_text(kind, text):
    raw = text.encode()
    tokenizer = {
        "bytes": Bytes,
        "bpe": lambda: Bpe.train([raw * 3], 270),
        "words": lambda: Words.train([raw]),
    }[kind]()
    ids = tokenizer.encode(raw).tolist()
    pieces = list(decode_stream(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert all(pieces)
    for cut in range(1, len(ids)):
        rest = "".join(decode_stream(tokenizer, iter(ids[cut:]), ids[max(0, cut - 4) : cut]))
        if kind == "words":
            assert tokenizer.decode(ids[:cut]) + rest == tokenizer.decode(ids)


def test_broken_utf8_is_shown_and_loses_no_text():
    ids = [0xFF, 0xFF, 0xFF, 0xF0, 0x9F, 0x99, 0x82, 0x41, 0xC3]
    assert "".join(decode_stream(Bytes(), iter(ids))) == "\ufffd\ufffd\ufffd🙂A\ufffd"


def test_a_prompt_of_words_goes_on_in_its_line():
    words = Words.train([b"the cat sat\n"])
    line_end = words.bos_id
    assert encode_prompt(words, "the cat").tolist() == [line_end, *words.encode(b"the cat")[:2]]
    assert encode_prompt(words, "the cat\n")[-1] == line_end
    follows = decode_stream(words, iter(words.encode(b"sat\n")), words.encode(b"cat")[:1].tolist())
    assert "".join(follows) == " sat\n"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1 must be"),
        ({"tokens": -1}, "tokens=-1 must be at least 0"),
        ({"segment": 0}, "segment=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"prompt": "\ud800"}, "prompt: character 0"),
    ],
)
def test_mistakes_are_one_line(lm, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        generate(lm, Bytes(), **{"prompt": "x", "tokens": 1, **settings})
    assert "\n" not in str(caught.value)
