"""Accuracy on a synthetic task: every asked answer of fresh rows, scored once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from memjax import sharding
from memjax.data import TaskCorpus
from memjax.model import LanguageModel, merge, split

Parts = tuple[nnx.GraphDef, dict]


def evaluate_task(
    lm: LanguageModel | Parts,
    corpus: TaskCorpus,
    *,
    length: int,
    rows: int,
    batch: int = 64,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Answer `rows` rows of `length` symbols, each read from the initial state.

    Returns loss (nats an answer), accuracy (share of answers whose likeliest symbol is right),
    row_accuracy (share of rows without a mistake), answers and rows. `rows` is rounded up to whole
    batches. The rows are the same for every model.
    """
    definition, params = split(lm) if isinstance(lm, LanguageModel) else lm
    devices = 1 if mesh is None else sharding.axis_size(mesh, "lanes")
    batch = -(-min(batch, rows) // devices) * devices
    count = -(-rows // batch)
    answer, sums = _compiled(definition, mesh), np.zeros(4)
    for step in range(count):
        arrays = corpus.batch(step * batch, np.arange(batch), length)
        if mesh is not None:
            arrays = {k: jax.device_put(v, sharding.lanes(mesh)) for k, v in arrays.items()}
        sums += np.asarray(jax.device_get(answer(params, arrays)), np.float64)
    nll, right, answers, whole = sums
    return {
        "loss": float(nll / answers),
        "accuracy": float(right / answers),
        "row_accuracy": float(whole / (count * batch)),
        "answers": int(answers),
        "rows": count * batch,
    }


def quick_task(
    lm: LanguageModel | Parts, corpus: TaskCorpus, *, length: int, rows: int, mesh: Mesh | None
) -> dict[str, float]:
    """An evaluation during training: eval_loss, eval_accuracy, eval_row_accuracy."""
    result = evaluate_task(lm, corpus, length=length, rows=rows, mesh=mesh)
    return {f"eval_{name}": result[name] for name in ("loss", "accuracy", "row_accuracy")}


@functools.lru_cache(maxsize=8)
def _compiled(definition: nnx.GraphDef, mesh: Mesh | None) -> Callable:
    def answer(params: dict, arrays: dict[str, jax.Array]) -> jax.Array:
        lm = merge(definition, params)
        tokens_BT, weight_BT = arrays["tokens_BT"], arrays["weight_BT"]
        with sharding.over(mesh):
            _, logits_BTY = lm(lm.init_state(tokens_BT.shape[0]), tokens_BT, arrays["reset_BT"])
        target_BT1 = arrays["targets_BT"][..., None]
        chosen_BT = jnp.take_along_axis(logits_BTY, target_BT1, -1)[..., 0]
        nll_BT = jax.nn.logsumexp(logits_BTY, -1) - chosen_BT
        right_BT = jnp.argmax(logits_BTY, -1) == target_BT1[..., 0]
        whole = jnp.sum(jnp.all(right_BT | (weight_BT == 0), 1))
        sums = [weight_BT * nll_BT, weight_BT * right_BT, weight_BT]
        return jnp.stack([*(jnp.sum(a) for a in sums), whole.astype(jnp.float32)])

    return jax.jit(answer)
