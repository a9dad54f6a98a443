"""Law: a kernel and its plain twin give the same values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from model import cache
from model.attention import Mask, attend_in_blocks
from model.kernels import grouped, paged
from model.kernels.splash import block_sizes, fits, splash


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width", "values", "window", "sinks"),
    [(128, 4, 2, 128, 128, None, False), (256, 2, 1, 64, 64, 100, True), (256, 2, 2, 24, 16, None, False)],
)
def test_splash_attention(length, heads, kv_heads, width, values, window, sinks) -> None:
    draw = np.random.default_rng(0)
    q, k, v, dy = (
        draw.standard_normal(shape).astype(np.float32)
        for shape in (
            (2, length, heads, width),
            (2, kv_heads, length, width),
            (2, kv_heads, length, values),
            (2, length, heads, values),
        )
    )
    logits = jnp.asarray(draw.standard_normal(heads), jnp.float32) if sinks else None
    segments = np.ones((2, length), np.int32)
    segments[0, 50:], segments[1, 90:] = 2, 0
    mask = Mask(jnp.broadcast_to(jnp.arange(length), (2, length)), jnp.asarray(segments), length)

    def plain(q, k, v, logits):
        return attend_in_blocks(q, k, v, mask, 0.3, window, logits)

    def fused(q, k, v, logits):
        return splash(q, k, v, jnp.asarray(segments), 0.3, window, logits, interpret=True)

    wanted, pull = jax.vjp(plain, q, k, v, logits)
    found, fused_pull = jax.vjp(fused, q, k, v, logits)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    for a, b in zip(jax.tree.leaves(fused_pull(dy)), jax.tree.leaves(pull(dy)), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.parametrize("sizes", [(64, 0, 100, 28), (0, 0, 0, 0), (0, 300, 84, 0)])
def test_sums_over_groups(sizes: tuple[int, ...]) -> None:
    """Of uneven and empty groups, with rows behind the last that mean nothing."""
    draw = np.random.default_rng(0)
    x, y = (jnp.asarray(draw.normal(size=(384, width)), jnp.float32) for width in (128, 256))
    x, y = (jnp.where(jnp.arange(384)[:, None] < sum(sizes), a, 7.0) for a in (x, y))
    found = grouped.sums_by_group(x, y, jnp.asarray(sizes), interpret=True)
    ends = np.cumsum(sizes)
    for group, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        wanted = np.asarray(x)[end - size : end].T @ np.asarray(y)[end - size : end]
        np.testing.assert_allclose(found[group], wanted, atol=1e-3)
    assert grouped.fits(40960) and not grouped.fits(40)


def test_blocks_divide_the_length() -> None:
    for length in (128, 384, 4096, 32768):
        sizes = block_sizes(length, 128)
        assert fits(length, length) and length % sizes.block_q == 0 and length % sizes.block_kv == 0
    assert block_sizes(4096, 128).block_kv_dkv == 4096 and block_sizes(4096, 256).block_kv_dkv == 1024
    assert block_sizes(32768, 128).block_q_dq and not fits(100, 100) and not fits(128, 256)


@pytest.mark.parametrize(("queries", "window"), [(1, None), (6, None), (6, 5)])
def test_attention_to_pages(queries: int, window: int | None) -> None:
    """The kernel does not run here: jax's own reference of it takes the arguments that it gets."""
    draw = np.random.default_rng(0)
    rows, heads, kv_heads, page, count = 3, 4, 2, 8, 4
    lengths = jnp.asarray([17, 0, 25 - queries + 1], jnp.int32)
    table = jnp.asarray(draw.permutation(20)[: rows * count].reshape(rows, count), jnp.int32)
    q = jnp.asarray(draw.standard_normal((rows, queries, heads, 128)), jnp.float32)
    pages = jnp.asarray(draw.standard_normal((20, page, 2 * kv_heads, 128)), jnp.float32)
    index_BT = lengths[:, None] + jnp.arange(queries)
    paging = cache.Paging(index_BT, lengths, table, page)
    keys, values = cache.read_pairs(pages, paging)
    wanted = attend_in_blocks(q, keys, values, Mask(index_BT, None, count * page), 0.3, window)
    q_MNH, kv_lens, indices, starts, number = paged.arguments(q, lengths, table)
    found = kernel.ref_ragged_paged_attention(
        q_MNH, pages, kv_lens, indices, starts, number, sm_scale=0.3, sliding_window=window
    )
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=2e-5)
    assert paged.fits(128) and not paged.fits(64)


def test_what_is_written_to_pages_is_read_from_them() -> None:
    """In either layout, wherever pages lie; padding is written nowhere."""
    draw = np.random.default_rng(0)
    table = jnp.asarray(draw.permutation(9)[:6].reshape(2, 3), jnp.int32)
    lengths = jnp.asarray([2, 5], jnp.int32)
    index_BT = cache.write_positions(lengths, jnp.asarray([[1, 1, 1], [1, 0, 0]]), 12)
    paging = cache.Paging(index_BT, lengths, table, 4)
    new = tuple(jnp.asarray(draw.standard_normal((2, 3, 2, 8)), jnp.float32) for _ in range(2))
    apart = cache.write((jnp.zeros((9, 2, 4, 8)), jnp.zeros((9, 2, 4, 8))), new, paging)
    (both,) = cache.write((jnp.zeros((9, 4, 4, 8)),), new, paging)
    wanted = np.zeros((2, 2, 2, 12, 8), np.float32)  # keys and values, rows, heads, positions
    wanted[:, 0, :, 2:5] = np.stack([a[0].swapaxes(0, 1) for a in new])
    wanted[:, 1, :, 5] = np.stack([a[1, 0] for a in new])
    np.testing.assert_array_equal(np.stack([cache.read(a, paging, "kv_heads") for a in apart]), wanted)
    np.testing.assert_array_equal(np.stack(cache.read_pairs(both, paging)), wanted)
