"""The mLSTM on a Hopper GPU, by the kernel of linear attention."""

from functools import partial

from pallas_kernels.linear_attention import gpu
from pallas_kernels.mlstm.levels import mlstm_by


def mlstm_gpu(q, k, v, log_input, log_forget, state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.mlstm` for shapes.

    Chunks are of 64 tokens, whatever `chunk` is.
    """
    run = partial(gpu.linear_attention_gpu, scale=scale, chunk=chunk)
    return mlstm_by(run, q, k, v, log_input, log_forget, state, reset, scale=scale)


def unfit(q, k, v, *, scale: float | None) -> str | None:
    """Why the kernel cannot take a call."""
    return gpu.unfit(q, k, v, None, scale=scale)
