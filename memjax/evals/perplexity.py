"""Perplexity of a language model on a corpus: every token of every document scored once.

The negative log likelihood of each token is float32 on the device; sums are float64 on the host,
and perplexities are one division of a sum by a count (`memjax.evals.result`).
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from memjax import sharding
from memjax.data import Corpus, DataError
from memjax.errors import Stopped
from memjax.evals.config import Eval
from memjax.evals.partial import Partial, Scored
from memjax.evals.protocols import (
    Batch,
    Protocol,
    Span,
    assemble,
    chains,
    resolve,
    rounds,
    take,
)
from memjax.evals.result import Result
from memjax.evals.totals import Totals
from memjax.model import LANE_AXIS, LanguageModel, merge, split

Parts = tuple[nnx.GraphDef, dict]
"""The definition of a model and its parameters, as `memjax.model.split` returns them."""

LOGITS_AT_ONCE = 1 << 26  # elements; a large vocabulary makes logits larger than all else
AHEAD = 2  # batches on the device while the host prepares the next


def evaluate(
    lm: LanguageModel | Parts,
    corpus: Corpus,
    config: Eval,
    *,
    sequence: int,
    max_tokens: int | None = None,
    max_documents: int | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
    partial: Partial | None = None,
) -> Result:
    """Score a corpus by the protocol of `config`.

    sequence: the context if config.context is None.
    max_tokens: score only the start of the split (`memjax.evals.protocols.take`).
    step: passed on to the result.
    mesh: lanes are split over its batch axes, as in training; every process must call this.
    progress: called with the number of tokens scored since its last call.
    partial: where to go on if an earlier call was stopped, and to save if this one is.

    Raises DataError if there is no token to score, FieldError for a stride above the context,
    Stopped after a signal (with `partial` alone), when what was scored is saved.
    """
    definition, params = split(lm) if isinstance(lm, LanguageModel) else lm
    protocol = resolve(config, sequence)
    spans = take(corpus, protocol.context, max_tokens, max_documents)
    if not any(span.targets for span in spans):
        raise DataError(f"{corpus.source} split {corpus.split} has no tokens to score")
    lanes = _lanes(protocol, spans, config.batch, mesh)
    init, score = _compiled(definition, mesh)
    begun = Scored(0, Totals(len(corpus.names)), None, 0.0)
    if partial is not None:
        shapes = jax.eval_shape(functools.partial(init, lanes=lanes), params)
        begun = partial.begin(len(corpus.names), shapes)
    done, totals, state, earlier = begun
    if state is None:
        state = init(params, lanes=lanes)
    start = time.perf_counter() - earlier
    running: deque[tuple[Batch, jax.Array]] = deque()

    def finish(most: int) -> None:
        while len(running) > most:
            scored = totals.add(*running.popleft())
            if progress is not None:
                progress(scored)

    batches = make_batches(corpus, protocol, spans, lanes)
    for number, batch in enumerate(itertools.islice(batches, done, None), done):
        if partial is not None and partial.is_due(number):
            finish(0)
            partial.save(Scored(number, totals, state, time.perf_counter() - start))
            _end_if_stopped(partial, number, totals, spans)
        arrays = tuple(_place(a, mesh) for a in (batch.tokens_BT, batch.targets_BT, batch.reset_BT))
        state, nll_BT = score(params, state, *arrays)
        running.append((batch, nll_BT))
        finish(AHEAD)
    finish(0)
    seconds = time.perf_counter() - start
    return totals.result(corpus, protocol, spans, step=step, seconds=seconds)


def _end_if_stopped(partial: Partial, number: int, totals: Totals, spans: list[Span]) -> None:
    received = partial.stop.after(number)
    if received is not None:
        scored, total = int(totals.tokens.sum()), sum(span.targets for span in spans)
        told = f"{received.name}: scored {scored:,} of {total:,} tokens"
        raise Stopped(received, f"{told}; run the same command to go on")


def quick_eval(
    lm: LanguageModel | Parts,
    corpus: Corpus,
    config: Eval,
    *,
    sequence: int,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """An evaluation during training, on the first `config.tokens` tokens of a split.

    Whole documents in the order of the corpus; the one that would pass config.tokens is cut to
    whole segments. eval_loss: nats a token (nan if the model is broken). eval_bits_per_byte and
    eval_word_perplexity are there only if bytes, or words, of what was scored are known exactly:
    bytes with the tokenizers "bytes" and "bpe", words where no document was cut, or where words
    are the tokens.
    """
    result = evaluate(lm, corpus, config, sequence=sequence, max_tokens=config.tokens, mesh=mesh)
    values = {"eval_loss": result.loss, "eval_tokens": float(result.tokens)}
    if result.lossless and result.bits_per_byte is not None:
        values["eval_bits_per_byte"] = result.bits_per_byte
    if result.word_perplexity is not None and np.isfinite(result.word_perplexity):
        values["eval_word_perplexity"] = result.word_perplexity
    return values


def make_batches(
    corpus: Corpus, protocol: Protocol, spans: list[Span], lanes: int
) -> Iterator[Batch]:
    """The batches of an evaluation, in order, all of one shape."""
    width = min(protocol.context, max(span.targets for span in spans))

    def read(document: int, start: int, stop: int) -> np.ndarray:
        first = int(corpus.starts[document])
        return corpus.tokens[first + start : first + stop]

    for row in rounds(chains(protocol, spans), lanes):
        yield assemble(row, width, read)


def _lanes(protocol: Protocol, spans: list[Span], batch: int, mesh: Mesh | None) -> int:
    """Lanes that have work, rounded up to the devices of the mesh."""
    chained = [chain for chain, _ in zip(chains(protocol, spans), range(batch))]
    devices = 1 if mesh is None else sharding.axis_size(mesh, "lanes")
    return -(-len(chained) // devices) * devices


def _place(array: np.ndarray, mesh: Mesh | None) -> Any:
    return array if mesh is None else jax.device_put(array, sharding.lanes(mesh))


@functools.lru_cache(maxsize=8)
def _compiled(definition: nnx.GraphDef, mesh: Mesh | None) -> tuple[Callable, Callable]:
    """Compiled functions of a model: its initial state, and one batch of scores."""

    def init(params: dict, lanes: int) -> Any:
        return merge(definition, params).init_state(lanes)

    def score(params, state, tokens_BT, targets_BT, reset_BT):
        with sharding.over(mesh):
            lm = merge(definition, params)
            state, hidden_BTD, _ = lm.read(state, tokens_BT, reset_BT)
            return state, token_nll(lm, hidden_BTD, targets_BT)

    if mesh is None:
        return jax.jit(init, static_argnames="lanes"), jax.jit(score)
    lanes = sharding.lanes(mesh, LANE_AXIS)
    return (
        jax.jit(init, static_argnames="lanes", out_shardings=lanes),
        jax.jit(score, out_shardings=(lanes, sharding.replicated(mesh))),
    )


def token_nll(
    lm: LanguageModel, hidden_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log softmax(logits)[target] of each token, float32, in slices that bound the memory."""
    batch, length, _ = hidden_BTD.shape
    vocab_size = jax.eval_shape(lm.logits, hidden_BTD).shape[-1]

    def nll(hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        logits_BTY = lm.logits(hidden_BTD)
        chosen_BT1 = jnp.take_along_axis(logits_BTY, targets_BT[..., None], -1)
        return jax.nn.logsumexp(logits_BTY, -1) - chosen_BT1[..., 0]

    size = max(1, LOGITS_AT_ONCE // (batch * vocab_size))
    if size >= length:
        return nll(hidden_BTD, targets_BT)
    extra = -length % size

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, extra), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, -1, size, *array.shape[2:]), 1, 0)

    nll_NBC = jax.lax.map(lambda xs: nll(*xs), (cut(hidden_BTD), cut(targets_BT)))
    return jnp.moveaxis(nll_NBC, 0, 1).reshape(batch, -1)[:, :length]
