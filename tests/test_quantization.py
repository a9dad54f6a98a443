"""Law: a weight in 8 bits is the nearest there is, and is used as what it stands for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.cache import empty_cache
from model.forward import continuation, forward, unembed
from model.linear import widened as widened_product
from model.load import load_model
from model.quantization import Quantized, WeightType, quantize
from model.transformer import Transformer
from model.tree import Skeleton, make_skeleton
from serve.engine import Engine
from serve.prompts import Prompts
from serve.sampling_params import SamplingParams
from serve.weights import decode_weights
from sharding.mesh import MeshConfig, make_mesh
from tests.test_one_forward import NAMES, RICHEST, Words, make, rows_of

ROOT = Path(__file__).resolve().parent.parent
OFTEN = (NAMES[0], RICHEST, NAMES[-1])


def test_the_nearest_of_255_steps() -> None:
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(3, 20, 6)).astype(np.float32) * draw.uniform(0.01, 100, size=(3, 1, 6))
    weight[1, :, 2] = 0
    found = quantize(jnp.asarray(weight), (1,))
    assert found.values.dtype == jnp.int8 and found.scale.shape == (3, 1, 6)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(np.asarray(found.values) * np.asarray(found.scale) - weight) <= step * 0.5001).all()
    assert np.abs(np.asarray(found.values)).max() == 127


def widened(model: Transformer) -> Transformer:
    """`model` with what its weights in 8 bits stand for."""

    def plain(leaf: Any, shape: tuple[int, ...]) -> Any:
        return (leaf.values * leaf.scale).reshape(shape) if isinstance(leaf, Quantized) else leaf

    listed = make_skeleton(model.config, stacked=False)
    weights, state = Skeleton(model).split(model)
    return listed.merge({name: plain(leaf, listed.shapes[name]) for name, leaf in weights.items()}, state)


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.full) for n in NAMES])
def test_products_with_8_bits_are_those_with_what_they_stand_for(name: str) -> None:
    """Of a batch, of prompts into a cache, and of one token more."""
    small = decode_weights(make(name), None, "int8")
    kinds = jax.tree.leaves(Skeleton(small).split(small)[0], is_leaf=lambda leaf: isinstance(leaf, Quantized))
    matrices = sum(leaf.values.size for leaf in kinds if isinstance(leaf, Quantized))
    assert matrices > 0.8 * sum(a.size for a in jax.tree.leaves(kinds))
    documents = [np.arange(1, 12, dtype=np.int32), np.arange(5, 9, dtype=np.int32)]
    batch = rows_of(*([one] for one in documents))

    def run(model: Transformer) -> list[jax.Array]:
        cache = empty_cache(model.config, 2, 64, jnp.dtype(jnp.float32))
        whole = forward(model, batch)
        prompts = continuation(batch.tokens_BT, cache.lengths_B, batch.segments_BT > 0)
        first = forward(model, prompts, cache)
        assert first.cache is not None
        then = forward(model, continuation(jnp.array([[3], [4]]), first.cache.lengths_B), first.cache)
        return [unembed(model, output.hidden_BTD) for output in (whole, first, then)]

    for found, wanted in zip(jax.jit(run)(small), jax.jit(run)(widened(small)), strict=True):
        valid = np.asarray(batch.segments_BT > 0) if found.shape[1] > 1 else np.ones((2, 1), bool)
        assert np.abs(np.asarray(found) - np.asarray(wanted))[valid].max() <= 1e-4 * np.abs(np.asarray(wanted)).max()


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.full), RICHEST])
@pytest.mark.full
def test_many_devices_reply_as_one(name: str) -> None:
    model, prompts = make(name), [[1, 2, 3, 4, 5], [7, 8], [9, 3, 1]]
    sampling = SamplingParams(temperature=0, max_tokens=6)
    one = Engine(model, Words(), slots=4, weight_type="int8").generate(prompts, sampling)
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    many = Engine(model, Words(), slots=4, mesh=mesh, weight_type="int8").generate(prompts, sampling)
    for a, b in zip(one, many, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 256, 384])
@pytest.mark.parametrize("rows", [(1,), (3, 2), (100,)])
def test_blocks_of_columns_are_the_whole_product(rows: tuple[int, ...], columns: int) -> None:
    draw = np.random.default_rng(0)
    x, values = draw.standard_normal((*rows, 48)).astype(np.float32), draw.integers(-127, 128, (48, columns), np.int8)
    found = jax.jit(widened_product)(x, values)
    np.testing.assert_allclose(found, x @ values.astype(np.float32), rtol=1e-5, atol=1e-3)


def test_perplexity_hardly_changes() -> None:
    """Of real text under a real model, by less than a hundredth."""
    model, tokenizer = load_model(ROOT / "tests" / "data" / "stories260K.bin")
    stories = ROOT / "configs" / "demo_data" / "pretrain_en_tinystories.jsonl.gz"
    with gzip.open(stories, "rt", encoding="utf-8") as lines:
        texts = [tokenizer.encode(json.loads(line)["text"])[:256] for line, _ in zip(lines, range(8), strict=False)]

    def total(weight_type: WeightType) -> float:
        engine = Engine(model, tokenizer, slots=1, context=256, weight_type=weight_type)
        return sum(x for text in texts for x in Prompts(engine.device).logprobs(text, 0)[0] if x is not None)

    tokens = sum(len(text) - 1 for text in texts)
    assert tokens > 1000 and abs(np.expm1((total("same") - total("int8")) / tokens)) < 0.01
