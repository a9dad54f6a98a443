"""Law: a sequence cut over devices is attended to as a whole one, and each device needs less memory for it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import Mask, attend_in_blocks
from model.flash import attend_piece
from sharding.data_parallel import on_own_tokens
from sharding.mesh import ContextExchange, MeshConfig, make_mesh

LONG, SHORT = 32_768, 96


def inputs(length: int, heads: int, kv_heads: int, width: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Queries, keys, values, the gradient of the output, and documents, one of which is longer than a device's part."""
    draw = np.random.default_rng(0)
    arrays = [
        draw.standard_normal((1, length, n, width)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)
    ]
    segments = np.searchsorted(np.array([0.02, 0.45, 0.9]) * length, np.arange(length))[None].astype(np.int32) + 1
    segments[:, int(0.97 * length) :] = 0
    return arrays, segments


def attention(q, k, v, segments, exchange: ContextExchange = "ring", window=None, sinks=None):
    """As the model does it; `[B, T, heads, width]` in and out."""
    mask = Mask(segments, exchange)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return attend_in_blocks(q, k, v, mask, 0.3, window, sinks)


def spread(q, k, v, segments, **more):
    """`attention` of sequences cut over the mesh in force."""
    return on_own_tokens(lambda _, tokens: (attention(*tokens, **more), ()), [], [], (q, k, v, segments))[0]


def loss(function, q, k, v, segments, dy):
    real = (segments > 0)[..., None, None]
    return jnp.sum(jnp.where(real, function(q, k, v, segments) * dy, 0))


def both(function, arrays, segments):
    q, k, v, dy = arrays
    return jax.jit(jax.value_and_grad(partial(loss, function), argnums=(0, 1, 2)))(q, k, v, segments, dy)


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("context", [2, 4, 8, 3])
def test_values_and_gradients(context: int, window: int | None, exchange: str) -> None:
    arrays, segments = inputs(SHORT, 4, 2, 8)
    sinks = jnp.asarray([0.3, -1.0, 2.0, 0.0])
    value, wanted = both(partial(attention, window=window, sinks=sinks), arrays, segments)
    with jax.set_mesh(make_mesh(MeshConfig(context=context))):
        found, gradients = both(partial(spread, exchange=exchange, window=window, sinks=sinks), arrays, segments)
    assert abs(found - value) <= 1e-5 * abs(value) + 1e-4
    for a, b in zip(gradients, wanted, strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 1e-5 * np.abs(b).max()


def test_long_sequences_on_eight_devices() -> None:
    arrays, segments = inputs(LONG, 1, 1, 8)
    value, wanted = both(attention, arrays, segments)
    with jax.set_mesh(make_mesh(MeshConfig(context=8))):
        found, gradients = both(spread, arrays, segments)
    assert abs(found - value) <= 1e-5 * abs(value) + 1e-3
    for a, b in zip(gradients, wanted, strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 2e-5 * np.abs(b).max()


def test_memory_falls_with_the_axis() -> None:
    (q, k, v, dy), segments = inputs(LONG, 2, 1, 16)
    peaks = []
    for context in (2, 4, 8):
        with jax.set_mesh(make_mesh(MeshConfig(context=context))):
            step = jax.jit(jax.grad(partial(loss, spread), argnums=(0, 1, 2)))
            memory = step.lower(q, k, v, segments, dy).compile().memory_analysis()
        assert memory is not None
        peaks.append(memory.temp_size_in_bytes)
    assert peaks[1] < 0.7 * peaks[0] and peaks[2] < 0.7 * peaks[1], peaks


def test_pieces_are_what_softmax_is_made_of() -> None:
    """By hand: two queries of one head, three keys, of which the second query's document has one."""
    q, k, v = (
        jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, *s)), jnp.float32)
        for s in ((1, 2, 4), (3, 4), (3, 5))
    )
    out, lse = attend_piece(q, k, v, jnp.array([[1, 2]]), jnp.array([[1, 1, 2]]), 7, 0)
    scores = np.asarray(q[0, 0, 0] @ k[0, 0].T)
    shares = np.exp(scores[0, :2]) / np.exp(scores[0, :2]).sum()
    np.testing.assert_allclose(out[0, 0, 0, 0], shares @ np.asarray(v[0, 0, :2]), rtol=1e-5)
    np.testing.assert_allclose(out[0, 0, 0, 1], v[0, 0, 2], rtol=1e-5)
    np.testing.assert_allclose(lse[0, 0, 0], [np.log(np.exp(scores[0, :2]).sum()), scores[1, 2]], rtol=1e-5)
