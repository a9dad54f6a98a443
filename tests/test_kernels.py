"""Law: a kernel and its plain twin give the same values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import Mask, attend_in_blocks
from model.kernels import grouped
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
