"""Laws of noise on embeddings: of the size that the paper says, a function of seed, step and row, in training alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.run import LossConfig, Run
from errors import UserError
from model.forward import Batch, embed, forward
from sharding.mesh import MeshConfig, make_mesh
from tests.tiny import DENSE, MOE, Trainer, make_rows, make_run
from train.noise import embedding_noise, noise_keys
from train.step import make_validation_step

ALPHA, WIDTH = 5.0, 64
LOSS = LossConfig(neftune=ALPHA)
SMALL = replace(DENSE, num_layers=1)


def trainer(**changes: Any) -> Trainer:
    """A run on conversations with noise, on one device unless it is told otherwise."""
    run = make_run(SMALL, **{"objective": "sft", "loss": LOSS, **changes})
    return Trainer(run, make_mesh(run.mesh))


def test_the_noise_is_as_large_as_the_paper_says_and_padding_has_none() -> None:
    segments = np.zeros((2, 512), np.int32)
    segments[0, :100], segments[0, 100:500], segments[1, :] = 1, 2, 1
    noise = np.asarray(embedding_noise(noise_keys(0, jnp.int32(3), 2), jnp.asarray(segments), WIDTH, ALPHA))
    assert noise.shape == (2, 512, WIDTH) and noise.dtype == np.float32
    for row, part, tokens in ((0, slice(0, 100), 100), (0, slice(100, 500), 400), (1, slice(0, 512), 512)):
        drawn, most = noise[row, part], ALPHA / np.sqrt(tokens * WIDTH)
        assert 0.999 * most < np.abs(drawn).max() <= most * (1 + 1e-6)
        assert abs(drawn.mean()) < 4 * most / np.sqrt(3 * drawn.size)
        assert drawn.var() == pytest.approx(most**2 / 3, rel=0.03)
        # The mean norm of a document's noise is alpha / sqrt(3), whatever its length.
        assert np.sqrt((drawn**2).sum()) == pytest.approx(ALPHA / np.sqrt(3), rel=0.02)
    assert not noise[0, 500:].any()


def test_rows_and_steps_and_seeds_have_noise_of_their_own() -> None:
    keys = [noise_keys(seed, jnp.int32(step), 4) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(key) for rows in keys for key in np.asarray(rows).tolist()}) == 12
    assert (noise_keys(0, jnp.int32(0), 8)[:4] == keys[0]).all(), "a row's key does not depend on how many there are"


def test_noise_is_added_to_the_embeddings_and_nothing_else() -> None:
    """A row of other tokens with the difference of embeddings as noise is the row of the first tokens."""
    model = trainer().skeleton.merge(*(lambda s: (s.params, s.extra))(trainer().state))
    rows = jax.tree.map(jnp.asarray, make_rows(make_run(SMALL)))
    batch = Batch(rows["tokens"], rows["positions"], rows["segments"])
    other = replace(batch, tokens_BT=(batch.tokens_BT + 1) % DENSE.vocab_size)
    noise = embed(model, batch.tokens_BT) - embed(model, other.tokens_BT)
    expected, found = forward(model, batch).hidden_BTD, forward(model, other, noise=noise).hidden_BTD
    there = rows["segments"] > 0
    np.testing.assert_allclose(found[there], expected[there], atol=1e-5)


@pytest.mark.full
def test_micro_batches_and_meshes_change_no_noise() -> None:
    whole, cut = trainer(), trainer(accumulate=2)
    spread = trainer(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    rows = make_rows(whole.run)
    each = [one(rows) for one in (whole, cut, spread)]
    for found in each[1:]:
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(found[name], each[0][name], rtol=1e-5)


def test_a_state_that_was_put_aside_goes_on_to_the_same_bits() -> None:
    one = trainer()
    first, second = make_rows(one.run, 1), make_rows(one.run, 2)
    one(first)
    put_aside = jax.tree.map(np.asarray, one.state)
    loss = one(second)["loss"]
    after = jax.tree.map(np.asarray, one.state.params)
    one.state = jax.tree.map(jnp.asarray, put_aside)
    assert one(second)["loss"] == loss
    assert all((after[name] == one.state.params[name]).all() for name in after)
    one.state = replace(jax.tree.map(jnp.asarray, put_aside), step=one.state.step)
    assert one(second)["loss"] != loss, "another step has other noise"


def test_validation_has_no_noise() -> None:
    noisy, plain = trainer(), trainer(loss=LossConfig())
    rows = make_rows(noisy.run)
    found = [
        jax.jit(make_validation_step(one.run, one.skeleton, one.loss))(noisy.state, rows) for one in (noisy, plain)
    ]
    assert found[0]["loss"] == found[1]["loss"]


@pytest.mark.parametrize("objective", ["pretrain", "dpo", "kto", "reward"])
def test_it_goes_with_conversations_alone(objective: Any) -> None:
    with pytest.raises(UserError, match=f"goes with objective=sft, not {objective}"):
        Run(model=MOE, objective=objective, loss=LOSS)
    with pytest.raises(UserError, match=r"loss\.neftune=-1"):
        LossConfig(neftune=-1)
