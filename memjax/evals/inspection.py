"""What every memory of a model writes, keeps and reads along a document.

The same measurement for every architecture, by what happens when a memory is emptied. A document is
read in stretches. Beside the model that reads it, for each memory one more lane reads the stretch,
with that memory alone as it is at the start of a document and everything else as it was:

    S   the memory before the stretch       S0  at the start of a document
    S'  after the stretch, from S           E'  after the stretch, from S0
    p   predictions in the stretch          e   those of the lane whose memory was emptied

    norm     |S'|                    what is there
    written  |E' - S0|               what the stretch puts into an empty memory
    forget   1 - |S' - E'| / |S - S0|    share of what was there that no longer makes a difference
    read     mean of KL(p, e)        how much predictions depend on what was there, nats a token
    gain     mean of nll(e) - nll(p)     how much better they are for it, nats a token
    rank     exp of the entropy of the singular values of a matrix memory, mean over heads

Tails of convolutions, positions, counts, scales and the tokens of an unfinished block are not
memory: they stay, and are in no norm.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from memjax import telemetry
from memjax.architecture import Model
from memjax.data import Corpus
from memjax.evals.perplexity import Parts
from memjax.model import LANE_AXIS, merge
from memjax.segments import SegmentState

MEASURES = ("norm", "written", "forget", "read", "gain", "rank")
NOT_MEMORY = ("tokens", "level", "position", "count")
QUICK_STRIDE = 64
LANES = 4
"""Memories that are emptied side by side: states of large models are large."""


class Memory(NamedTuple):
    """One memory of a model. layer: None for what is around all layers."""

    name: str
    layer: int | None
    kind: str


class Inspection(NamedTuple):
    """Measures of each memory, `[memories, stretches]`; nan where there is nothing to measure.

    nll: of every token that was read, nats. notes: what layers say of themselves, by layer and name
    (`memjax.telemetry`), `[stretches]`.
    """

    memories: tuple[Memory, ...]
    stride: int
    nll: np.ndarray
    measures: dict[str, np.ndarray]
    notes: dict[tuple[int, str], np.ndarray]


def inspect(
    parts: Parts, config: Model, tokens: Integer[np.ndarray, "N"], *, stride: int
) -> Inspection:
    """Read a document; tokens[0] is its start, which is not predicted.

    Tokens behind the last whole stretch are left out; a shorter document is one stretch.
    """
    definition, params = parts
    stride = min(stride, len(tokens) - 1)
    count = (len(tokens) - 1) // stride
    shapes = jax.eval_shape(lambda p: merge(definition, p).init_state(1), params)
    memories, owners = find_memories(config, shapes)
    used = jnp.asarray(tokens[: count * stride + 1], jnp.int32)
    xs = used[:-1].reshape(count, stride), used[1:].reshape(count, stride)
    nll, measures, notes = _read(definition, owners, len(memories), params, *xs)
    return Inspection(
        memories,
        stride,
        np.asarray(nll).reshape(-1),
        {name: np.asarray(values).T for name, values in zip(MEASURES, measures, strict=True)},
        _by_layer(config, {name: np.asarray(values) for name, values in notes.items()}),
    )


def _by_layer(config: Model, notes: dict[str, np.ndarray]) -> dict[tuple[int, str], np.ndarray]:
    """What layers noted, out of the repeats of the pattern and the tail."""
    length, found = len(config.pattern), {}
    for path, values_SR in notes.items():
        part, block, name = path.split("/", 2)
        place = int(block.partition("_")[0])
        place += length * config.repeat if part == "tail" else 0
        for row, values_S in enumerate(values_SR.T):
            found[place + row * length, name] = values_S
    return dict(sorted(found.items()))


def quick_inspection(parts: Parts, config: Model, corpus: Corpus, tokens: int) -> dict[str, float]:
    """An inspection during training: means along the first tokens of the corpus's first document.

    Named memory/<memory>/<measure> and memory/<layer>/<name>; what is nowhere measured is left out.
    """
    first, end = int(corpus.starts[0]), len(corpus.tokens)
    stop = int(corpus.starts[1]) if len(corpus.starts) > 1 else end
    document = np.asarray(corpus.tokens[first : min(stop, first + tokens + 1, end)])
    if len(document) < 2:
        return {}
    found = inspect(parts, config, document, stride=min(QUICK_STRIDE, len(document) - 1))
    rows = {
        f"memory/{memory.name.replace(' ', '_')}/{measure}": found.measures[measure][i]
        for i, memory in enumerate(found.memories)
        for measure in MEASURES
    }
    rows |= {f"memory/{layer}/{name}": values for (layer, name), values in found.notes.items()}
    return {
        name: float(np.mean(values[np.isfinite(values)]))
        for name, values in rows.items()
        if np.isfinite(values).any()
    }


class Owner(NamedTuple):
    """Which memory each row of a leaf of the state belongs to, on one of its axes."""

    axis: int
    rows: tuple[int, ...]


def find_memories(config: Model, state: Any) -> tuple[tuple[Memory, ...], tuple[Owner | None, ...]]:
    """The memories in the state of a model, and the owner of each leaf; None for inputs."""
    segments = isinstance(state, SegmentState)
    found: list[tuple[int, list[Memory]] | None] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        where = _where(path, segments)
        if where is None or jnp.issubdtype(leaf.dtype, jnp.integer):
            found.append(None)
            continue
        rows = range(leaf.shape[where.axis])
        found.append((where.axis, [_memory(config, where, row) for row in rows]))
    every = {memory for item in found if item is not None for memory in item[1]}
    memories = sorted(every, key=lambda m: (-1 if m.layer is None else m.layer, m.name))
    number = {memory: i for i, memory in enumerate(memories)}
    owners = (
        None if item is None else Owner(item[0], tuple(number[memory] for memory in item[1]))
        for item in found
    )
    return tuple(memories), tuple(owners)


class _Where(NamedTuple):
    """part: "patterns", "tail" or "" around the layers. place: in it. axis: of the repeats."""

    part: str
    place: int
    owner: str
    axis: int


def _where(path: tuple, segments: bool) -> _Where | None:
    """Where the memory is that a leaf belongs to, told from its path; None for inputs."""
    names = [getattr(key, "name", getattr(key, "idx", None)) for key in path]
    axis = 0
    if segments:
        if names[0] != "memory":
            return None
        if names[1] == "tokens":
            return _Where("", 0, "memory", 0)
        names, axis = names[2:], 2
        if names[2] not in ("mixer", "memory"):  # parts of the memory alone, not whole layers
            names.insert(2, "memory")
    inside = [name for name in names[3:] if isinstance(name, str)]
    if any("tail" in name or name.startswith(NOT_MEMORY) for name in inside):
        return None
    return _Where(str(names[0]), int(names[1] or 0), str(names[2]), axis)


def _memory(config: Model, where: _Where, row: int) -> Memory:
    kind = "" if config.memory is None else config.memory.kind
    if not where.part:
        return Memory(kind, None, kind)
    length = len(config.pattern)
    layer = row * length + where.place
    layer += length * config.repeat if where.part == "tail" else 0
    if where.owner == "mixer":
        name = config.layers_in_order[layer]
        return Memory(f"{layer} {name}", layer, config.mixer(name).kind)
    return Memory(f"{layer} {kind}", layer, kind)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read(definition, owners, count, params, tokens_ST, targets_ST):
    """nll `[S, T]`; measures, each `[S, memories]`; what layers note, each `[S, R]`."""
    lm = merge(definition, params)
    init = lm.init_state(1)
    groups = max(1, -(-count // LANES))
    ids_GK = jnp.arange(groups * LANES).reshape(groups, LANES)
    all_M = jnp.arange(count)

    def read(state, tokens_T, targets_T, lanes):
        tokens_BT = jnp.broadcast_to(tokens_T, (lanes, *tokens_T.shape))
        reading = lm.read(state, tokens_BT, jnp.zeros(tokens_BT.shape, bool))
        log_p_BTY = jax.nn.log_softmax(lm.logits(reading.hidden_BTD))
        nll_BT = -jnp.take_along_axis(log_p_BTY, targets_T[None, :, None], -1)[..., 0]
        return reading.state, log_p_BTY, nll_BT

    def stretch(state, xs):
        with telemetry.listening() as notes:
            after, log_p_1TY, nll_1T = read(state, *xs, 1)

        def group(_, ids_K):
            emptied = _emptied(state, init, owners, ids_K)
            alone, log_p_KTY, nll_KT = read(emptied, *xs, LANES)
            kl_KT = jnp.sum(jnp.exp(log_p_1TY) * (log_p_1TY - log_p_KTY), -1)
            read_K = jnp.maximum(jnp.mean(kl_KT, 1), 0.0)  # rounding may take it below
            written_K, forget_K = _sizes(state, init, after, alone, owners, ids_K)
            return None, (written_K, forget_K, read_K, jnp.mean(nll_KT - nll_1T, 1))

        by_group = jax.lax.scan(group, None, ids_GK)[1]
        norm = jnp.sqrt(_squares(after, owners, all_M))
        measures = (norm, *(x.reshape(-1)[:count] for x in by_group))
        return after, (nll_1T[0], (*measures, _ranks(after, owners, all_M)), notes)

    return jax.lax.scan(stretch, init, (tokens_ST, targets_ST))[1]


def _mine(owner: Owner, ids_B: jax.Array, ndim: int) -> jax.Array:
    """Whether rows are of the memory that a lane is about; broadcasts against the leaf."""
    lanes = ids_B.reshape([-1 if axis == LANE_AXIS else 1 for axis in range(ndim)])
    rows = np.array(owner.rows).reshape([-1 if axis == owner.axis else 1 for axis in range(ndim)])
    return rows == lanes


def _emptied(state: Any, init: Any, owners: Sequence[Owner | None], ids_B: jax.Array) -> Any:
    """The state in as many lanes as there are ids, each without the memory of its id."""
    leaves, tree = jax.tree.flatten(state)
    wide = []
    for leaf, start, owner in zip(leaves, jax.tree.leaves(init), owners, strict=True):
        leaf = jnp.broadcast_to(leaf, (leaf.shape[0], ids_B.size, *leaf.shape[2:]))
        if owner is not None:
            leaf = jnp.where(_mine(owner, ids_B, leaf.ndim), start, leaf)
        wide.append(leaf)
    return jax.tree.unflatten(tree, wide)


def _sizes(before, init, after, alone, owners, ids_K) -> tuple[jax.Array, jax.Array]:
    """written and forget of the memories that were emptied in the lanes of `alone`."""

    def difference(a: Any, b: Any) -> jax.Array:
        return _squares(jax.tree.map(_minus, a, b), owners, ids_K)

    kept, held = difference(after, alone), difference(before, init)
    forget = jnp.where(held > 0, 1 - jnp.sqrt(kept / jnp.where(held > 0, held, 1)), jnp.nan)
    return jnp.sqrt(difference(alone, init)), forget


def _minus(a: jax.Array, b: jax.Array) -> jax.Array:
    return a - b if jnp.issubdtype(a.dtype, jnp.floating) else a


def _squares(state: Any, owners: Sequence[Owner | None], ids_B: jax.Array) -> jax.Array:
    """Of each id, the sum of squares over its memory in its lane (or in the only one)."""
    total = jnp.zeros(ids_B.size)
    for leaf, owner in zip(jax.tree.leaves(state), owners, strict=True):
        if owner is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            mine = _mine(owner, ids_B, leaf.ndim)
            square = jnp.where(mine, jnp.square(leaf.astype(jnp.float32)), 0)
            total += jnp.sum(square, _but_lanes(square))
    return total


def _but_lanes(x: jax.Array) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != LANE_AXIS)


def _ranks(state: Any, owners: Sequence[Owner | None], ids_B: jax.Array) -> jax.Array:
    """Mean effective rank of the matrices of each memory; nan for those that have none."""
    total, number = jnp.zeros(ids_B.size), jnp.zeros(ids_B.size)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), owner in zip(leaves, owners, strict=True):
        if owner is not None and _is_matrix(path, leaf):
            rank = effective_rank(leaf)
            mine = _mine(owner, ids_B, rank.ndim)
            for_each = jnp.where(mine, rank, 0)
            total += jnp.sum(for_each, _but_lanes(for_each))
            number += jnp.sum(jnp.where(mine, jnp.ones_like(rank), 0), _but_lanes(for_each))
    return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)


def _is_matrix(path: tuple, leaf: jax.Array) -> bool:
    """Whether the last two axes of a leaf are a matrix memory, told from its name."""
    names = [key.name for key in path if hasattr(key, "name")]
    letters = re.fullmatch(r"memory_B([A-Z]+)", names[-1])
    if letters or names[:2] == ["memory", "tokens"]:
        matrix = letters is None or len(letters[1]) > 1
    else:  # of test-time memories, with heads; of slots beside a layer, without
        matrix = bool({"weights", "carry"} & set(names)) and leaf.ndim >= 5 - ("mixer" not in names)
    return matrix and jnp.issubdtype(leaf.dtype, jnp.floating) and min(leaf.shape[-2:]) > 1


def effective_rank(matrix: Array) -> Array:
    """exp(-sum p log p), p the singular values over their sum; 0 for a matrix of zeros.

    From 1, one direction holds everything, to the smaller side, all directions alike
    (Roy and Vetterli 2007).
    """
    values = jnp.linalg.svd(matrix.astype(jnp.float32), compute_uv=False)
    total = jnp.sum(values, -1, keepdims=True)
    p = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)
