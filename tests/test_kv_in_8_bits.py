"""Law: keys and values in 8 bits are the nearest there are, and are attended to as what they stand for."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import cache as kv
from model.load import load_model
from model.paged_attention import attend_to_pages
from model.transformer import Transformer
from serve.engine import Engine
from serve.memory import Room
from serve.sampling_params import SamplingParams
from tests.test_lora import MODELS
from tests.tiny import DENSE

ROOT = Path(__file__).resolve().parent.parent
GREEDY = SamplingParams(temperature=0.0, max_tokens=60, stop_ids=())


class Words:
    vocab_size = 64
    stop_ids = ()


def test_they_are_the_nearest_and_stand_for_it() -> None:
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((2, 5, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    k = k.at[0, 1, 0].set(0)
    *values, k_scale, v_scale = kv.quantized((k, v))
    wide = [x * scale for x, scale in zip(values, (k_scale, v_scale), strict=True)]
    for given, found, scale in zip((k, v), wide, (k_scale, v_scale), strict=True):
        assert (np.abs(given - found) <= scale / 2 * (1 + 1e-5)).all()
        np.testing.assert_allclose(np.abs(found).max(-1), np.abs(given).max(-1), rtol=1e-6)

    def attended(kind: kv.KVType, keys: jax.Array, values: jax.Array) -> jax.Array:
        empty = kv.empty_layer(DENSE, 0, 2, 4, 4, jnp.dtype(jnp.float32), kind)
        table = jnp.arange(4, dtype=jnp.int32).reshape(2, 2)
        rows = kv.Cache((empty,), jnp.zeros(2, jnp.int32), table, 4)
        paging = kv.make_paging(rows, jnp.ones((2, 5), jnp.int32))
        return attend_to_pages(q, kv.write(empty, (keys, values), paging), paging, 0.3, None, None)

    np.testing.assert_allclose(attended("int8", k, v), attended("same", wide[0], wide[1]), atol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) for kind in ("latent", "hybrid")])
def test_every_kind_of_memory(kind: str) -> None:
    """Replies of models with latents, and with linear layers between, stay close where they agree."""
    model = jax.jit(lambda: Transformer(MODELS[kind], jax.random.key(2), stacked=False))()
    prompt = list(range(2, 50))
    (wanted,), (found,) = (
        Engine(model, Words(), slots=1, kv_type=kv_type).generate([prompt], GREEDY) for kv_type in ("same", "int8")
    )
    np.testing.assert_allclose(found.logprobs[0], wanted.logprobs[0], atol=0.02)
    assert found.logprobs != wanted.logprobs


def test_a_real_model_says_the_same_from_a_third_of_the_bytes() -> None:
    model, tokenizer = load_model(ROOT / "tests" / "data" / "stories260K.bin")
    prompt = tokenizer.encode("Once upon a time, there was a little girl named Lily. She liked to play outside")
    (wanted,), (found,) = (
        Engine(model, tokenizer, slots=2, context=256, kv_type=kind).generate([prompt], GREEDY)
        for kind in ("same", "int8")
    )
    part = next((i for i, (a, b) in enumerate(zip(wanted.tokens, found.tokens, strict=True)) if a != b), 60)
    assert part >= 8
    assert abs(np.mean(wanted.logprobs[:part]) - np.mean(found.logprobs[:part])) < 0.01
    sizes = [Room(model.config, jnp.dtype(jnp.float32), 64, kind).page_bytes for kind in ("same", "int8")]
    width = model.config.head_dim  # a scale of four bytes for each head of a token
    assert sizes[1] * 4 * width == sizes[0] * (width + 4)
