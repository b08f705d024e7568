"""Generation: a prompt of any length is read in segments, then tokens are drawn one by one.

Both are the same call of the model with its state carried, so memory does not grow with the prompt
or with what is generated (beyond the state of the architecture itself).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from memjax.config import ConfigError, check, check_at_least
from memjax.data import Tokenizer
from memjax.evals.perplexity import Parts
from memjax.model import LanguageModel, merge, split

BURST = 16  # tokens drawn in one call; speed only


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the logits.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely tokens. top_p: of these, only the fewest most likely ones that
        together have at least this probability. Ties go to the smaller id.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        finite = 0 <= self.temperature < float("inf")
        check(self, "temperature", finite, "must be 0 (greedy) or greater, and finite")
        check_at_least(self, 1, "top_k")
        inside = self.top_p is None or 0 < self.top_p <= 1
        check(self, "top_p", inside, "must be in (0, 1]; or leave it out")


def filter_logits(sampling: Sampling, logits_Y: Float[Array, "Y"]) -> Float[Array, "Y"]:
    """Logits of the distribution that is drawn from; -inf for the tokens that are left out."""
    if sampling.temperature == 0:
        best = jnp.argmax(logits_Y)
        return jnp.where(jnp.arange(logits_Y.size) == best, 0.0, -jnp.inf)
    # Shifted first: the largest logit stays 0 however small the temperature, never inf - inf.
    temperature = max(sampling.temperature, float(jnp.finfo(logits_Y.dtype).tiny))
    logits_Y = (logits_Y - jnp.max(logits_Y)) / temperature
    if sampling.top_k is None and sampling.top_p is None:
        return logits_Y
    order_Y = jnp.argsort(-logits_Y, stable=True)
    ranked_Y = logits_Y[order_Y]
    if sampling.top_k is not None:
        ranked_Y = jnp.where(jnp.arange(ranked_Y.size) < sampling.top_k, ranked_Y, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1:  # float32 sums reach 1 too early
        probability_Y = jax.nn.softmax(ranked_Y)
        before_Y = jnp.cumsum(probability_Y) - probability_Y
        keep_Y = (before_Y < sampling.top_p).at[0].set(True)
        ranked_Y = jnp.where(keep_Y, ranked_Y, -jnp.inf)
    return jnp.full_like(logits_Y, -jnp.inf).at[order_Y].set(ranked_Y)


def generate(
    lm: LanguageModel | Parts,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    segment: int = 512,
    stream: Callable[[str], None] | None = None,
) -> str:
    """Continue `prompt` by `tokens` tokens; returns the new text alone.

    The document start comes before the prompt and is never drawn, except where it is also a token
    of text (`<eos>` of the words tokenizer, a line end).

    seed: the same seed gives the same text.
    segment: tokens of the prompt read in one call; use the length the model was trained with.
    stream: called with each piece of text as it is made, never with part of a character; the
        pieces together are the text that is returned.
    Raises ConfigError (one line) for a setting that is out of range.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for name, value, least in (("tokens", tokens, 0), ("segment", segment, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")
    pieces = []
    ids = encode_prompt(tokenizer, prompt)
    drawn = generate_tokens(lm, tokenizer, ids, tokens, sampling, seed=seed, segment=segment)
    for piece in decode_stream(tokenizer, drawn, ids[1:][-4:].tolist()):
        pieces.append(piece)
        if stream is not None:
            stream(piece)
    return "".join(pieces)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Ids of the start of a document: bos, then the prompt."""
    try:
        text = prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt: character {error.start} is not valid text") from None
    ids = tokenizer.encode(text) if text else np.zeros(0, np.int32)
    if tokenizer.kind == "words" and prompt and not prompt.endswith("\n"):
        ids = ids[:-1]  # the tokenizer ends every line, the prompt's last one included
    return np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])


def generate_tokens(
    lm: LanguageModel | Parts,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    tokens: int,
    sampling: Sampling,
    *,
    seed: int,
    segment: int,
) -> Iterator[int]:
    """The tokens that `generate` draws after a document that begins with `ids`, in order."""
    definition, params = split(lm) if isinstance(lm, LanguageModel) else lm
    state, logits_BY = read_prompt(definition, params, ids, segment)
    banned = None if tokenizer.kind == "words" else tokenizer.bos_id
    key = jax.random.key(seed)
    for start in range(0, tokens, BURST):
        state, logits_BY, drawn = _draw(
            definition, sampling, banned, params, state, logits_BY, key, start
        )
        yield from map(int, np.asarray(drawn)[: tokens - start])


def read_prompt(
    definition: nnx.GraphDef, params: dict, ids: np.ndarray, segment: int
) -> tuple[Any, Float[Array, "B Y"]]:
    """State and next-token logits after a document that begins with `ids`, in one lane.

    Segments are cut from the document's start, as in training and evaluation.
    """
    state = None
    for start in range(0, len(ids), segment):
        tokens_BT = ids[None, start : start + segment]
        state, logits_BY = _read(definition, params, state, tokens_BT)
    return state, logits_BY


@functools.partial(jax.jit, static_argnums=0)
def _read(definition, params, state, tokens_BT):
    """Read a segment; state None is the start of a document."""
    lm = merge(definition, params)
    reset_BT = jnp.zeros(tokens_BT.shape, bool)
    if state is None:
        state, reset_BT = lm.init_state(tokens_BT.shape[0]), reset_BT.at[:, 0].set(True)
    state, hidden_BTD, _ = lm.read(state, tokens_BT, reset_BT)
    return state, lm.logits(hidden_BTD[:, -1:])[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(definition, sampling, banned, params, state, logits_BY, key, start):
    """Draw BURST tokens; the key of a token depends on its index alone."""
    lm = merge(definition, params)

    def token(carry, index):
        state, logits_BY = carry
        if banned is not None:
            logits_BY = logits_BY.at[:, banned].set(-jnp.inf)
        drawn = jax.random.categorical(
            jax.random.fold_in(key, index), filter_logits(sampling, logits_BY[0])
        )
        tokens_BT = drawn[None, None].astype(jnp.int32)
        state, logits_BTY = lm(state, tokens_BT, jnp.zeros((1, 1), bool))
        return (state, logits_BTY[:, 0]), drawn

    (state, logits_BY), ids = jax.lax.scan(token, (state, logits_BY), start + jnp.arange(BURST))
    return state, logits_BY, ids


def decode_stream(
    tokenizer: Tokenizer, ids: Iterator[int], before: Sequence[int] = ()
) -> Iterator[str]:
    """Text of `ids`, which follow `before`, piece by piece; the document start shows nothing.

    A piece waits until it ends at a character: a token may hold part of one. The text of a token
    may depend on the one before it (spaces between words), so each piece is a difference of two
    decodings that begin at the piece before it.
    """
    held = list(before)
    clean, known = len(held), tokenizer.decode(held)  # what of `held` is given already
    text = known
    for i in ids:
        held.append(i)
        text = tokenizer.decode(held)
        if len(text) > len(known) and not text.endswith("\ufffd"):
            yield text[len(known) :]
            held = held[clean:]
            clean, known = len(held), tokenizer.decode(held)
            text = known
    if len(text) > len(known):
        yield text[len(known) :]
