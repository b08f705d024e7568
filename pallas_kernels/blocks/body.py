"""What happens to the blocks of a round."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from pallas_kernels.blocks.carries import scan_carries
from pallas_kernels.blocks.layout import Layout, select_leading

MOST_BLOCKS = 8
ROUND_TOKENS = 128


@runtime_checkable
class Round(Protocol):
    """How a round of blocks is computed. Hashable: it is compared.

    Blocks are `[N, B, C, ...]`, carries `[B, ...]`; a block restarts from `initial` where
    `layout.fresh_NB`, and changes the carry where `layout.full_NB`.
    """

    def size(self, block: int) -> int:
        """The most blocks of `block` tokens to compute together."""
        raise NotImplementedError

    def run(
        self, layout: Layout, consts: Any, initial: Any, carry: Any, blocks: Any
    ) -> tuple[Any, Any]:
        """The carry after the blocks, and their outputs `[N, B, C, ...]`. Differentiable."""
        raise NotImplementedError


def _identity(consts: Any, xs: Any, valid_NBC: jax.Array) -> Any:
    return xs


def _as_kept(consts: Any, carry: Any, prepared: Any, kept: Any) -> Any:
    return kept


class Body(NamedTuple):
    """What happens to a block. Functions of module level: the tuple is compared and hashed.

    step(consts, carry, prepared) -> (carry, kept): one block; `carry` as it enters the block,
        `[B, ...]`; the first result counts for lanes where the block is full, and for no others.
    prepare(consts, xs, valid_NBC) -> prepared: what does not depend on the carry, for N blocks at
        once; xs `[N, B, C, ...]`, 0 where `valid_NBC` is false (behind the end of a short block).
    finish(consts, carry, prepared, kept) -> y: outputs `[N, B, C, ...]` of N blocks at once, from
        the carry that entered each, `[N, B, ...]`.
    most: blocks computed together, at most.
    Token c of y must not depend on later tokens of its block. y where not valid is dropped.
    """

    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    prepare: Callable[[Any, Any, jax.Array], Any] = _identity
    finish: Callable[[Any, Any, Any, Any], Any] = _as_kept
    most: int = MOST_BLOCKS

    def size(self, block: int) -> int:
        """Many of a few tokens, one where that has work enough for a processor."""
        return min(self.most, max(1, ROUND_TOKENS // block))

    def run(
        self, layout: Layout, consts: Any, initial: Any, carry: Any, blocks: Any
    ) -> tuple[Any, Any]:
        """The carry after the blocks of a round, and their outputs."""
        prepared = self.prepare(consts, blocks, layout.valid_NBC)
        fresh_NB = layout.fresh_NB
        # Restarts happen where a block is left, in the same pass over the carry as its update.
        restart_NB = jnp.concatenate([fresh_NB[1:], jnp.zeros_like(fresh_NB[:1])])
        carry = select_leading(fresh_NB[0], initial, carry)
        if len(fresh_NB) == 1:
            carry, entering, kept = _only_block(self, consts, carry, prepared, layout.full_NB)
        else:
            carry, entering, kept = scan_carries(
                self.step, consts, initial, carry, prepared, layout.full_NB, restart_NB
            )
        return carry, self.finish(consts, entering, prepared, kept)


def _only_block(body: Body, consts, carry, prepared, full_1B):
    """What `scan_carries` gives for one block; its own gradient serves, and repeats nothing."""
    new, kept = body.step(consts, carry, jax.tree.map(lambda x: x[0], prepared))
    new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, carry)
    entering, kept = jax.tree.map(lambda x: x[None], (carry, kept))
    return select_leading(full_1B[0], new, carry), entering, kept
