"""Cross-entropy in pieces: the definition in float64, its gradients, its memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training_step import LENGTH, MODEL, ROWS, experiment

from memjax import cross_entropy as ce
from memjax.layers import dot_transposed
from memjax.training.step import make_trainer

B, T, D, Y = 2, 10, 6, 17


def logits_of(cap):
    def logits(hidden_BTD, table_YD):
        raw_BTY = dot_transposed(hidden_BTD, table_YD, jnp.dtype(jnp.float32))
        return raw_BTY if cap is None else cap * jnp.tanh(raw_BTY / cap)

    return logits


def case(seed=0):
    rng = np.random.default_rng(seed)
    hidden_BTD, table_YD = rng.normal(size=(B, T, D)), rng.normal(size=(Y, D))
    targets_BT = rng.integers(0, Y, (B, T))
    weight_BT = rng.random((B, T)) * (rng.random((B, T)) < 0.7)
    return hidden_BTD, table_YD, targets_BT, weight_BT


def oracle(hidden_BTD, table_YD, targets_BT, weight_BT, cap, z_loss):
    """Total and its gradients, token by token in float64, from the definition."""
    total, nll, z = 0.0, 0.0, 0.0
    dhidden, dtable = np.zeros_like(hidden_BTD), np.zeros_like(table_YD)
    dweight = np.zeros_like(weight_BT)
    for b, t in np.ndindex(B, T):
        raw = table_YD @ hidden_BTD[b, t]
        logit = raw if cap is None else cap * np.tanh(raw / cap)
        log_z = np.log(np.exp(logit).sum())
        loss, w = log_z - logit[targets_BT[b, t]], weight_BT[b, t]
        nll, z = nll + w * loss, z + w * log_z**2
        dweight[b, t] = loss + z_loss * log_z**2
        total += w * dweight[b, t]
        dlogit = w * np.exp(logit - log_z) * (1 + 2 * z_loss * log_z)
        dlogit[targets_BT[b, t]] -= w
        if cap is not None:
            dlogit *= 1 - (logit / cap) ** 2
        dhidden[b, t] = dlogit @ table_YD
        dtable += np.outer(dlogit, hidden_BTD[b, t])
    return (total, nll, z), (dhidden, dtable, dweight)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize(("pieces", "z_loss"), [(1, 0.3), (3, 0.0), (3, 0.3), (5, 0.3), (10, 0.3)])
def test_sums_and_gradients_are_those_of_the_definition(pieces, z_loss, cap):
    hidden_BTD, table_YD, targets_BT, weight_BT = values = case()
    expected, gradients = oracle(*values, cap, z_loss)

    def loss(hidden_BTD, table_YD, weight_BT):
        score = ce.cross_entropy(
            logits_of(cap),
            hidden_BTD,
            table_YD,
            jnp.asarray(targets_BT),
            weight_BT,
            z_loss=z_loss,
            pieces=pieces,
        )
        return 2 * score.total, score

    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden_BTD, table_YD, weight_BT)]
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, score), got = gradient(*arrays)
    np.testing.assert_allclose(score, expected, rtol=2e-6)
    for ours, theirs in zip(got, gradients):
        np.testing.assert_allclose(ours, 2 * theirs, rtol=1e-5, atol=2e-6)


def test_bfloat16_rounds_the_same_in_pieces_and_whole():
    hidden_BTD, table_YD, targets_BT, weight_BT = case(1)
    hidden_BTD = jnp.asarray(hidden_BTD, jnp.bfloat16)
    targets_BT = jnp.asarray(targets_BT)
    table_YD, weight_BT = jnp.asarray(table_YD, jnp.float32), jnp.asarray(weight_BT, jnp.float32)

    def gradient(pieces):
        def loss(hidden_BTD, table_YD):
            args = (logits_of(None), hidden_BTD, table_YD, targets_BT, weight_BT)
            return ce.cross_entropy(*args, z_loss=0.1, pieces=pieces).total

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden_BTD, table_YD)

    (whole, (dhidden, dtable)), (parts, (dhidden_parts, dtable_parts)) = gradient(1), gradient(4)
    assert dhidden_parts.dtype == jnp.bfloat16 and dtable_parts.dtype == jnp.float32
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    np.testing.assert_allclose(dtable_parts, dtable, atol=1e-5)
    close = {"rtol": 2**-7, "atol": 1e-6}  # one rounding of bfloat16
    np.testing.assert_allclose(np.float32(dhidden_parts), np.float32(dhidden), **close)


@pytest.mark.parametrize(
    ("rows", "length", "vocab", "devices", "pieces"),
    [(8, 1024, 256, 1, 1), (8, 1024, 2**15, 1, 64), (8, 1024, 2**15, 8, 8), (2, 7, 2**24, 1, 7)],
)
def test_pieces_follow_the_size_of_the_logits(rows, length, vocab, devices, pieces):
    assert ce.count_pieces(rows, length, vocab, devices) == pieces


def test_the_compiled_step_holds_no_logits_of_the_whole_batch(monkeypatch):
    vocab, widest = 1031, re.compile(r"\[([\d,]+)\]")

    def logits_held():
        """Rows of logits in the largest array of the program that ends in the vocabulary."""
        config = experiment(horizon=1, model=dataclasses.replace(MODEL, logit_cap=20.0))
        trainer = make_trainer(config, vocab)
        shapes = {"tokens_BT": "int32", "targets_BT": "int32", "weight_BT": "float32"}
        batch = {
            name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype)
            for name, dtype in {**shapes, "reset_BT": "bool"}.items()
        }
        text = trainer.step.lower(trainer.abstract, batch).compile().as_text()
        found = [[int(n) for n in m.split(",")] for m in widest.findall(text)]
        return max(int(np.prod(s)) // vocab for s in found if vocab in s and MODEL.d_model not in s)

    assert logits_held() == ROWS * LENGTH
    monkeypatch.setitem(ce.LOGITS, "cpu", ROWS * LENGTH * vocab // 3)
    assert logits_held() == ROWS * LENGTH // 3
