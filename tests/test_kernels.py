"""Law: a kernel and its plain twin give the same values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from model import cache, paged_attention
from model.attention import Mask, attend, attend_in_blocks
from model.config import LinearAttentionConfig, ModelConfig
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
    mask = Mask(jnp.asarray(segments))

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


def copied(pages: Array | np.ndarray, table: Array) -> Array:
    """Keys or values `[B, K, S, H]` of pages `[P, K, page, H]`."""
    x = np.asarray(pages)[np.asarray(table)].swapaxes(1, 2)
    return jnp.asarray(x.reshape(*x.shape[:2], -1, x.shape[-1]))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(("queries", "window"), [(1, None), (6, None), (6, 5), (1, 3)])
def test_attention_to_pages(
    queries: int, window: int | None, device: str, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page, in both layouts and in pieces of one page or several, as to a copy of the whole row.

    The kernel does not run here: jax's own reference of it takes the arguments that it gets.
    """
    monkeypatch.setattr(paged_attention, "platform", lambda: device)
    draw = np.random.default_rng(0)
    rows, heads, kv_heads, page, count = 3, 4, 2, 8, 5
    lengths = jnp.asarray([17, 0, 33 - queries + 1], jnp.int32)
    table = jnp.asarray(draw.permutation(20)[: rows * count].reshape(rows, count), jnp.int32)
    q = jnp.asarray(draw.standard_normal((rows, queries, heads, 128)), jnp.float32)
    apart = [jnp.asarray(draw.standard_normal((20, kv_heads, page, 128)), jnp.float32) for _ in range(2)]
    both = jnp.stack(apart, axis=2).reshape(20, 2 * kv_heads, page, 128).swapaxes(1, 2)
    stored = cache.Cache((), lengths, table, page)
    paging = cache.make_paging(stored, jnp.ones((rows, queries), jnp.int32))
    keys = np.arange(count * page)
    seen = keys <= np.asarray(paging.index_BT)[..., None]
    seen &= True if window is None else keys > np.asarray(paging.index_BT)[..., None] - window
    logits = jnp.asarray([0.3, -1.0, 2.0, 0.0]) if sinks else None
    wanted = attend(q, copied(apart[0], table), copied(apart[1], table), jnp.asarray(seen), 0.3, logits)
    found = paged_attention.attend_to_pages(q, tuple(apart), paging, 0.3, window, logits)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    monkeypatch.setattr(paged, "fits", lambda width: False)
    found = paged_attention.attend_to_pages(q, (both,), paging, 0.3, window, logits)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    if not sinks:
        q_MNH, kv_lens, indices, starts, number = paged.arguments(q, lengths, table)
        found = kernel.ref_ragged_paged_attention(
            q_MNH, both, kv_lens, indices, starts, number, sm_scale=0.3, sliding_window=window
        )
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=2e-5)


def test_the_company_of_a_row_leaves_its_bits() -> None:
    """Pages that only a longer row has change nothing of a shorter one."""
    draw = np.random.default_rng(0)
    pages = [jnp.asarray(draw.standard_normal((9, 2, 4, 8)), jnp.float32) for _ in range(2)]
    q = jnp.asarray(draw.standard_normal((2, 1, 4, 8)), jnp.float32)
    table = jnp.asarray(draw.permutation(9)[:8].reshape(2, 4), jnp.int32)
    found = []
    for other in (0, 2, 15):
        stored = cache.Cache((), jnp.asarray([5, other], jnp.int32), table, 4)
        paging = cache.make_paging(stored, jnp.ones((2, 1), jnp.int32))
        found.append(np.asarray(paged_attention.attend_to_pages(q, tuple(pages), paging, 0.3, None, None))[0])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_what_is_written_to_pages_is_read_from_them() -> None:
    """In either layout, wherever pages lie; padding is written nowhere."""
    draw = np.random.default_rng(0)
    table = jnp.asarray(draw.permutation(9)[:6].reshape(2, 3), jnp.int32)
    stored = cache.Cache((), jnp.asarray([2, 5], jnp.int32), table, 4)
    paging = cache.make_paging(stored, jnp.asarray([[1, 1, 1], [1, 0, 0]]))
    assert paging.reach_B.tolist() == [5, 6]
    new = tuple(jnp.asarray(draw.standard_normal((2, 3, 2, 8)), jnp.float32) for _ in range(2))
    apart = cache.write((jnp.zeros((9, 2, 4, 8)), jnp.zeros((9, 2, 4, 8))), new, paging)
    (both,) = cache.write((jnp.zeros((9, 4, 4, 8)),), new, paging)
    wanted = np.zeros((2, 2, 2, 12, 8), np.float32)  # keys and values, rows, heads, positions
    wanted[:, 0, :, 2:5] = np.stack([a[0].swapaxes(0, 1) for a in new])
    wanted[:, 1, :, 5] = np.stack([a[1, 0] for a in new])
    np.testing.assert_array_equal(np.stack([copied(a, table) for a in apart]), wanted)
    heads_first = np.asarray(both).swapaxes(1, 2)
    np.testing.assert_array_equal(np.stack([copied(heads_first[:, i::2], table) for i in (0, 1)]), wanted)
    assert np.count_nonzero(np.stack(apart)) == np.count_nonzero(wanted), "nothing else was written"


def test_slots_keep_what_rows_leave() -> None:
    """A row that begins finds nothing; one without a token leaves its slot as it is."""
    linear = LinearAttentionConfig(num_key_heads=1, num_value_heads=1, key_dim=4, value_dim=4)
    config = ModelConfig(num_layers=2, attention_pattern=("linear", "full"), linear=linear)
    stored = tuple(
        jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) + 1
        for x in cache.empty_layer(config, 0, 5, 1, 4, jnp.dtype(jnp.float32))
    )
    slots = jnp.asarray([3, 0, 4], jnp.int32)
    held = cache.Cache((), jnp.asarray([2, 0, 1], jnp.int32), jnp.zeros((3, 1), jnp.int32), 4, slots_B=slots)
    paging = cache.make_paging(held, jnp.asarray([[1], [1], [0]]))
    taken = cache.take_slots(stored, paging)
    left = cache.put_slots(stored, tuple(x * 0 - 1 for x in taken), slots, paging.reach_B > held.lengths_B)
    for x, rows, after in zip(stored, taken, left, strict=True):
        np.testing.assert_array_equal(rows, np.stack([x[3], x[0] * 0, x[4]]))
        np.testing.assert_array_equal(after, np.stack([x[0] * 0 - 1, x[1], x[2], x[3] * 0 - 1, x[4]]))
