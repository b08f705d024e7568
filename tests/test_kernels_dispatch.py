"""Which implementation runs, and what is refused."""

import logging

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import attention, delta_rule, dispatch, linear_attention

Q = jnp.ones((2, 5, 4, 3))
RATE = jnp.ones((2, 5, 4))
STATE = jnp.ones((2, 4, 3, 3))
CALLS = {
    "linear_attention": lambda **kw: linear_attention(Q, Q, Q, **kw),
    "delta_rule": lambda **kw: delta_rule(Q, Q, Q, RATE, **kw),
    "attention": lambda **kw: attention(Q, Q, Q, **kw),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(
    "impl, runs", [("auto", "xla"), ("xla", "xla"), ("reference", "reference")]
)
def test_the_resolved_implementation_is_the_one_that_runs(op, impl, runs):
    assert dispatch.resolve(op, impl) == runs
    lowered = jax.jit(lambda: CALLS[op](impl=impl)).lower()
    text = lowered.as_text(debug_info=True)
    assert f"{op}_{runs}" in text
    assert f"{op}_{'xla' if runs == 'reference' else 'reference'}" not in text


@pytest.mark.parametrize("op", CALLS)
def test_every_listed_implementation_exists_and_no_other(op):
    module = __import__(f"pallas_kernels.{op}", fromlist=["IMPLEMENTATIONS"])
    assert tuple(module.IMPLEMENTATIONS) == dispatch.AVAILABLE[op]
    assert op in pallas_kernels.__all__


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("impl, what", [("tpu", "not available"), ("cuda", "unknown")])
def test_an_implementation_that_is_not_there_is_refused_by_name(op, impl, what):
    with pytest.raises(ValueError, match=f"{op}: impl='{impl}' is {what}.*reference, xla"):
        CALLS[op](impl=impl)


def test_the_automatic_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, dispatch.__name__):
        for _ in range(2):
            dispatch.resolve("attention")
            dispatch.resolve("attention", "xla")
    assert [record.getMessage() for record in caplog.records] == [
        "attention: impl='auto' runs 'xla'"
    ]


REFUSED = {
    "v has shape .*B is 2": lambda: linear_attention(Q, Q, Q[:1]),
    "k has shape .*H is 4": lambda: delta_rule(Q, Q[:, :, :2], Q, RATE),
    r"beta has shape .*must be \[B, T, H\]": lambda: delta_rule(Q, Q, Q, Q),
    "initial_state has shape": lambda: linear_attention(Q, Q, Q, initial_state=STATE[:, :2]),
    "log_decay has a value of 1; it must be at most 0": lambda: linear_attention(Q, Q, Q, RATE),
    "reset has dtype int32; it must be bool": lambda: linear_attention(
        Q, Q, Q, reset=jnp.ones((2, 5), jnp.int32)
    ),
    "q has dtype int32; it must be floating": lambda: attention(Q.astype(jnp.int32), Q, Q),
    "chunk=0 must be an integer of at least 1": lambda: delta_rule(Q, Q, Q, RATE, chunk=0),
    "window=0 must be an integer of at least 1": lambda: attention(Q, Q, Q, window=0),
    "q has H=4 heads.*multiple of the G=3": lambda: attention(Q, Q[:, :, :3], Q[:, :, :3]),
    "query_positions has dtype float32": lambda: attention(Q, Q, Q, positions=jnp.ones((2, 5))),
    "key_segment_ids has shape .*J is 4": lambda: attention(
        Q, Q[:, :4], Q[:, :4], segment_ids=jnp.ones((2, 5), jnp.int32)
    ),
    "T=0 tokens": lambda: linear_attention(Q[:, :0], Q[:, :0], Q[:, :0]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_argument_is_named_with_its_value_and_rule(message, unchecked):
    with pytest.raises(ValueError, match=message) as error:
        REFUSED[message]()
    assert "\n" not in str(error.value)
