"""Layout of the kernels: a lane for each head of each row of the batch, tokens in whole chunks."""

import jax
import jax.numpy as jnp

SMALLEST_CHUNK = 16  # a tile of bfloat16 on a TPU has 16 rows
LARGEST_CHUNK = 256
VMEM_BYTES = 12 * 2**20
CARRIES = 12  # of a carry or its start, in the backward pass: two of each block that moves


def chunk_unfit(chunk: int) -> str | None:
    """Why a kernel cannot take chunks of `chunk` tokens."""
    if chunk & (chunk - 1) or not SMALLEST_CHUNK <= chunk <= LARGEST_CHUNK:
        return f"chunk={chunk} must be a power of two from {SMALLEST_CHUNK} to {LARGEST_CHUNK}"
    return None


def dtype_unfit(**arrays: jax.Array | None) -> str | None:
    """Why a kernel cannot take arrays of these types."""
    for name, x in arrays.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} has dtype {x.dtype}, and the kernel takes float32 and bfloat16"
    return None


def vmem_unfit(carry: list[tuple[int, int]]) -> str | None:
    """Why a kernel cannot hold carries of these `[rows, columns]`."""
    tiled = [-(-rows // 8) * 8 * (-(-columns // 128) * 128) for rows, columns in carry]
    needed = 4 * CARRIES * sum(tiled)
    if needed > VMEM_BYTES:
        return (
            f"its state needs {needed >> 20} MiB of VMEM a head; at most {VMEM_BYTES >> 20} are "
            "taken"
        )
    return None


def chunk_length(chunk: int, tokens: int) -> int:
    """Tokens a chunk: `chunk`, or the smallest that holds a shorter segment."""
    return min(chunk, max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length()))


def pad_tokens(x_BT: jax.Array, length: int) -> jax.Array:
    """Zeros behind the last token, up to whole chunks."""
    widths = [(0, 0)] * x_BT.ndim
    widths[1] = (0, -x_BT.shape[1] % length)
    return jnp.pad(x_BT, widths)


def fold(x_BTHK: jax.Array, length: int) -> jax.Array:
    """`[B, T, H, K]` to `[N, L, K]`."""
    x_BLHK = pad_tokens(x_BTHK, length)
    batch, padded, heads, size = x_BLHK.shape
    return jnp.swapaxes(x_BLHK, 1, 2).reshape(batch * heads, padded, size)


def fold_rows(x_BTH: jax.Array, length: int) -> jax.Array:
    """`[B, T, H]` to `[N, chunks, 1, C]`: numbers of tokens as rows, in float32."""
    x_BLH = pad_tokens(x_BTH.astype(jnp.float32), length)
    batch, padded, heads = x_BLH.shape
    return jnp.swapaxes(x_BLH, 1, 2).reshape(batch * heads, padded // length, 1, length)


def unfold(x_NLV: jax.Array, batch: int, tokens: int) -> jax.Array:
    """`[N, L, V]` to `[B, T, H, V]`."""
    _, padded, size = x_NLV.shape
    x_BHLV = x_NLV.reshape(batch, -1, padded, size)
    return jnp.swapaxes(x_BHLV, 1, 2)[:, :tokens]


def documents(reset_BT: jax.Array, length: int) -> jax.Array:
    """Resets since the start of each chunk, `[B, chunks, 1, C]`, float32."""
    fresh_BL = pad_tokens(reset_BT.astype(jnp.float32), length)
    batch, padded = fresh_BL.shape
    return jnp.cumsum(fresh_BL.reshape(batch, padded // length, 1, length), axis=-1)


def fold_state(
    state_BHKV: jax.Array | None, batch: int, heads: int, *size: int, like: jax.Array
) -> jax.Array:
    """`[B, H, K, V]` to `[N, K, V]`, float32; zeros if None."""
    if state_BHKV is not None:
        return state_BHKV.astype(jnp.float32).reshape(batch * heads, *size)
    return jnp.zeros_like(like, shape=(batch * heads, *size), dtype=jnp.float32)
