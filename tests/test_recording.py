"""The experts that the engine tells of a reply are those that a forward pass over all of it chooses."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_one_forward import HYBRID, NAMES, RICHEST, TOKENS, Words, logits_of, make, rows_of

from model.forward import forward
from serve.engine import Engine
from serve.request import Completion
from serve.sampling_params import SamplingParams
from sharding.mesh import MeshConfig, make_mesh

PROMPTS = [[5, 9, 3, 7] * 3, [5, 9, 3, 7] * 3 + [2], [1, 2], [5, 9, 3, 7] * 3]
"""Some share a beginning."""


def replies(name: str, mesh: Mesh | None = None, **options: Any) -> list[Completion]:
    engine = Engine(make(name), Words(), slots=4, context=32, record_experts=True, mesh=mesh, **options)
    sampling = [SamplingParams(max_tokens=9 + index, seed=index) for index in range(len(PROMPTS))]
    return engine.generate(PROMPTS, sampling)


def check(name: str, found: list[Completion]) -> None:
    for prompt, reply in zip(PROMPTS, found, strict=True):
        whole = np.asarray(prompt + reply.tokens)[:-1]
        assert len(whole) < 32 and whole.max() < TOKENS
        chosen = forward(make(name), rows_of([whole])).experts_LBTC
        assert chosen is not None
        np.testing.assert_array_equal(reply.experts, np.moveaxis(np.asarray(chosen)[:, 0, : len(whole)], 0, 1))


@pytest.mark.parametrize(
    "name",
    [pytest.param("softmax experts", marks=pytest.mark.full), RICHEST, pytest.param(HYBRID, marks=pytest.mark.full)],
)
def test_recorded_experts_are_those_of_a_forward_pass(name: str) -> None:
    check(name, replies(name))


@pytest.mark.parametrize("options", [{"guesses": 3}, {"pages": 5}], ids=["guesses", "few pages"])
def test_guesses_and_rows_that_are_put_back_are_recorded_too(options: dict[str, Any]) -> None:
    check(NAMES[1], replies(NAMES[1], **options))


def test_slots_of_several_devices_are_recorded() -> None:
    check(NAMES[1], replies(NAMES[1], make_mesh(MeshConfig(expert=2))))


def test_replaying_the_record_gives_the_same_logits() -> None:
    (reply, *_) = replies(RICHEST)
    whole = np.asarray(PROMPTS[0] + reply.tokens)[:-1]
    batch = rows_of([whole])
    replay = np.full((reply.experts.shape[1], 1, batch.tokens_BT.shape[1], reply.experts.shape[2]), 0)
    replay[:, 0, : len(whole)] = np.moveaxis(reply.experts, 1, 0)
    own, again = forward(make(RICHEST), batch), forward(make(RICHEST), batch, replay=jnp.asarray(replay))
    np.testing.assert_array_equal(np.asarray(own.hidden_BTD), np.asarray(again.hidden_BTD))
    assert np.isfinite(np.asarray(logits_of(make(RICHEST), batch))).all()


def test_a_dense_model_has_no_experts_to_tell_of() -> None:
    assert all(reply.experts is None for reply in replies(NAMES[0]))
