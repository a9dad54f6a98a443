"""Law: the chunked loss is the plain one, in value, gradient and never in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import chunks
from train.losses import balance_loss, cross_entropy


def plain(hidden: jax.Array, head: jax.Array, targets: Any, weights: Any, z_weight: float) -> jax.Array:
    """The definition, with all logits at once."""
    logits = hidden @ head
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + z_weight * log_z**2))


@pytest.mark.parametrize("chunk", [1, 2**9, 2**30])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_equals_the_definition(monkeypatch: pytest.MonkeyPatch, chunk: int, z_weight: float) -> None:
    monkeypatch.setattr(chunks, "SMALL_CHUNK", chunk)
    monkeypatch.setattr(chunks, "LARGE_CHUNK", max(chunk, 2**9))
    draw = np.random.default_rng(0)
    hidden, head = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((3, 12, 16), (16, 50)))
    targets, weights = jnp.asarray(draw.integers(0, 50, (3, 12))), jnp.asarray(draw.uniform(size=(3, 12)), jnp.float32)
    weights = weights.at[1, 4:].set(0)

    def ours(hidden: Any, head: Any) -> jax.Array:
        return cross_entropy(hidden, head, targets, weights, z_weight)[0]

    value, gradients = jax.value_and_grad(ours, (0, 1))(hidden, head)
    expected, by_hand = jax.value_and_grad(lambda h, w: plain(h, w, targets, weights, z_weight), (0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.allclose(ours(hidden, head), expected, rtol=1e-6)
    for found, wanted in zip(gradients, by_hand, strict=True):
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_large_vocabulary_needs_a_quarter_of_its_logits() -> None:
    vocab, tokens, width = 151_936, 2048, 64
    shapes = (
        jax.ShapeDtypeStruct((8, tokens // 8, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((8, tokens // 8), jnp.int32),
        jax.ShapeDtypeStruct((8, tokens // 8), jnp.float32),
    )

    def loss(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return cross_entropy(hidden, head, targets, weights, 1e-4)[0]

    memory = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= tokens * vocab * 4 / 4


def test_balance_loss_by_hand() -> None:
    # Two experts, three tokens, one expert each: f = (2/3, 1/3), P = (0.6, 0.4): 2 * (0.4 + 0.1333) = 1.0667.
    counts, scores = jnp.array([[2.0, 1.0]]), jnp.array([[1.8, 1.2]])
    assert np.isclose(balance_loss(counts, scores, jnp.array(3.0), jnp.array(3.0)), 2 * (0.4 + 0.4 / 3))
    even = balance_loss(jnp.array([[4.0, 4.0]]), jnp.array([[2.0, 2.0]]), jnp.array(4.0), jnp.array(4.0))
    assert np.isclose(even, 2.0)  # experts per token


def test_balance_is_over_the_global_batch() -> None:
    # Each micro-batch is lopsided, the batch is even: the published loss sees no imbalance in the last one.
    first = balance_loss(jnp.array([[8.0, 0.0]]), jnp.array([[6.0, 2.0]]), jnp.array(8.0), jnp.array(8.0))
    both = balance_loss(jnp.array([[8.0, 8.0]]), jnp.array([[2.0, 6.0]]), jnp.array(16.0), jnp.array(8.0))
    assert first > 1.4 and np.isclose(both, 1.0)
