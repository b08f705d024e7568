"""The mLSTM on a TPU, by the kernel of linear attention."""

from functools import partial

from pallas_kernels.linear_attention.tpu import linear_attention_tpu, unfit
from pallas_kernels.mlstm.levels import mlstm_by

__all__ = ["mlstm_tpu", "unfit"]


def mlstm_tpu(q, k, v, log_input, log_forget, state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.mlstm` for shapes."""
    run = partial(linear_attention_tpu, scale=scale, chunk=chunk)
    return mlstm_by(run, q, k, v, log_input, log_forget, state, reset, scale=scale)
