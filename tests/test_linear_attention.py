"""Law: Gated DeltaNet's chunks are its recurrence, whatever the length; a document's memory is its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.linear_attention import causal_convolution, chunked, recurrent, unit_length

BATCH, KEY_HEADS, HEADS, WIDTH, VALUES = 2, 2, 4, 8, 6


def inputs(length: int, seed: int = 0) -> list[np.ndarray]:
    """Queries and keys of unit length, values, log decays, write strengths; float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(BATCH, length, *shape)).astype(np.float32)

    q, k = (np.asarray(unit_length(jnp.asarray(normal(KEY_HEADS, WIDTH)))) for _ in range(2))
    decay = -np.abs(normal(HEADS)) * 0.3
    strength = (1 / (1 + np.exp(-normal(HEADS)))).astype(np.float32)
    return [q, k, normal(HEADS, VALUES), decay, strength]


def by_hand(arrays: list[np.ndarray], documents: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence as it is written, in float64, the memory emptied where a document begins."""
    q, k, v, g, beta = arrays
    state, out = np.array(state, np.float64), np.zeros(v.shape)
    before = np.zeros(BATCH, int)
    for row in range(BATCH):
        for t in range(v.shape[1]):
            if documents[row, t] != before[row]:
                state[row], before[row] = 0, documents[row, t]
            for n in range(HEADS):
                key, query = k[row, t, n // 2].astype(np.float64), q[row, t, n // 2].astype(np.float64)
                memory = state[row, n] * np.exp(g[row, t, n])
                memory += np.outer(key, beta[row, t, n] * (v[row, t, n] - memory.T @ key))
                state[row, n], out[row, t, n] = memory, memory.T @ query
    return out, state


def start(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(BATCH, HEADS, WIDTH, VALUES)).astype(np.float32)


@jax.jit
def chunks(arrays: list[jax.Array], documents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`chunked` from the memory of `start`."""
    return chunked(*arrays, documents_BT=documents, state_BNHI=jnp.asarray(start()))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_chunks_are_the_recurrence(length: int) -> None:
    arrays, documents = inputs(length), np.zeros((BATCH, length), np.int32)
    expected, last = by_hand(arrays, documents, start())
    found, state = chunks(arrays, documents)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(state, last, atol=2e-5)


def test_one_token_is_one_step() -> None:
    arrays = inputs(1)
    expected, last = by_hand(arrays, np.zeros((BATCH, 1), int), start())
    found, state = recurrent(*(jnp.asarray(a[:, 0]) for a in arrays), state_BNHI=jnp.asarray(start()))
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_documents_do_not_share_a_memory() -> None:
    """Also where several begin in one chunk, and where one goes on from the memory that came in."""
    length = 150
    documents = np.zeros((BATCH, length), np.int32)
    for cut in (3, 40, 64, 65, 128):
        documents[0, cut:] += 1
    documents[1, 70:] += 1
    arrays = inputs(length)
    expected, last = by_hand(arrays, documents, start())
    found, state = chunks(arrays, documents)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(state, last, atol=2e-5)


def test_tokens_that_neither_decay_nor_write_leave_the_memory() -> None:
    arrays = inputs(70)
    arrays[3][:, 33:] = arrays[4][:, 33:] = 0
    documents = np.zeros((BATCH, 70), np.int32)
    _, whole = chunks(arrays, documents)
    _, part = chunks([a[:, :33] for a in arrays], documents[:, :33])
    np.testing.assert_allclose(whole, part, atol=1e-6)


def test_equal_keys_stay_exact() -> None:
    """Keys that are all the same make the system as far from the identity as it gets."""
    arrays, documents = inputs(128), np.zeros((BATCH, 128), np.int32)
    arrays[1] = np.repeat(arrays[1][:, :1], 128, axis=1)
    arrays[3] = arrays[3] * np.float32(0.01)
    expected, _ = by_hand(arrays, documents, start())
    found, _ = chunks(arrays, documents)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_gradients_are_those_of_the_recurrence() -> None:
    length = 70
    documents = np.zeros((BATCH, length), np.int32)
    documents[0, 30:] = 1
    dy = np.random.default_rng(9).normal(size=(BATCH, length, HEADS, VALUES)).astype(np.float32)

    def by_chunks(*arrays):
        return jnp.sum(chunked(*arrays, documents_BT=jnp.asarray(documents), state_BNHI=jnp.asarray(start()))[0] * dy)

    def by_steps(*arrays):
        def step(carry, inputs):
            state, before = carry
            *one, document = inputs
            state = jnp.where((document == before)[:, None, None, None], state, 0)
            out, state = recurrent(*one, state_BNHI=state)
            return (state, document), out

        columns = [jnp.moveaxis(jnp.asarray(a), 1, 0) for a in (*arrays, documents)]
        _, out = jax.lax.scan(step, (jnp.asarray(start()), jnp.zeros(BATCH, jnp.int32)), tuple(columns))
        return jnp.sum(jnp.moveaxis(out, 0, 1) * dy)

    arrays = [jnp.asarray(a) for a in inputs(length)]
    found, expected = (jax.jit(jax.grad(f, range(5)))(*arrays) for f in (by_chunks, by_steps))
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_the_convolution_by_hand() -> None:
    """The last four inputs of the document, what came before the batch included."""
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(1, 6, 1, 2)).astype(np.float32), rng.normal(size=(4, 1, 2)).astype(np.float32)
    stored = rng.normal(size=(1, 3, 1, 2)).astype(np.float32)
    documents = np.array([[0, 0, 0, 0, 1, 1]], np.int32)
    found, seen = causal_convolution(*map(jnp.asarray, (x, taps, stored, documents)))
    line = np.concatenate([stored, x], axis=1)[0, :, 0]
    np.testing.assert_array_equal(seen[0, :, 0], line)
    for t in range(6):
        total = sum(taps[w, 0] * line[t + w] for w in range(4) if t < 4 or t + w - 3 >= 4)
        np.testing.assert_allclose(found[0, t, 0], total / (1 + np.exp(-total)), rtol=1e-5)
