"""Law: training, scoring, prefill and decoding are one function.

Log-probabilities do not depend on how tokens are cut into rows, chunks and steps; a token sees what stands before it
in its document and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from model.cache import empty_cache
from model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig
from model.forward import Batch, continuation, forward, unembed
from model.transformer import Transformer
from serve.engine import Engine
from serve.memory import Room
from serve.sampling_params import SamplingParams
from serve.weights import decode_weights
from train.scoring import Scorer

VOCAB, TOKENS = 64, 61
TINY = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=256,
)
EXPERTS = MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16)
CONFIGS = {
    "dense, qkv bias, tied": replace(TINY, qkv_bias=True, qk_norm=False, tie_embeddings=True),
    "softmax experts": replace(TINY, moe=EXPERTS),
    "softmax experts, not normalised, shared, yarn": replace(
        TINY,
        moe=replace(EXPERTS, normalize=False, shared_intermediate_size=24),
        rope=RopeConfig(theta=1e4, scaling="yarn", factor=4, original_max_positions=64),
    ),
    "sigmoid experts in groups, bias, gate, dense layer": replace(
        TINY,
        num_layers=3,
        attention_gate=True,
        moe=replace(
            EXPERTS,
            score="sigmoid",
            num_groups=4,
            groups_per_token=2,
            scale=2.5,
            selection_bias=True,
            shared_intermediate_size=24,
            shared_gate=False,
            dense_layers=(0,),
        ),
    ),
    "linear and gated full layers": replace(
        TINY,
        num_layers=4,
        attention_pattern=("linear", "full"),
        linear=LinearAttentionConfig(num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=6),
        attention_gate=True,
        norm="zero_centred",
        rope=RopeConfig(theta=1e4, share=0.5),
        moe=EXPERTS,
    ),
    "latent attention": replace(
        TINY, latent=LatentAttentionConfig(kv_rank=12, query_rank=20, nope_dim=8, rope_dim=4, value_dim=10)
    ),
    "sinks, a window, biases, clamped experts": replace(
        TINY,
        attention_pattern=("sliding", "full"),
        sliding_window=5,
        sinks=True,
        qk_norm=False,
        qkv_bias=True,
        output_bias=True,
        norm="float32",
        moe=replace(EXPERTS, bias=True, activation="clamped"),
    ),
}
NAMES = list(CONFIGS)
RICHEST = "sigmoid experts in groups, bias, gate, dense layer"
HYBRID = "linear and gated full layers"
WINDOWED = "sinks, a window, biases, clamped experts"
LENGTHS = (19, 13, 4)
LENGTH = 32


class Words:
    """A tokenizer as far as generation looks at it."""

    vocab_size = TOKENS
    stop_ids = ()


@cache
def make(name: str, *, stacked: bool = False) -> Transformer:
    """A random model, with norms, biases and gates that are not what they start from."""
    abstract = jax.eval_shape(lambda: Transformer(CONFIGS[name], jax.random.key(0), stacked=stacked))
    leaves, structure = jax.tree.flatten(abstract)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=leaf.shape) / (leaf.shape[-2] ** 0.5 if leaf.ndim > 1 else 2) for leaf in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(value, jnp.float32) for value in values])


def tolerance(config: ModelConfig) -> float:
    """How far log-probabilities may part that are made in two ways.

    Half a unit in the last place of every weight moves those of the model with linear layers by 1.8e-5 (its norm
    follows a sum that nearly cancels), those of the others by less than 2e-6.
    """
    return 4e-5 if "linear" in config.attention_pattern else 1e-5


@pytest.fixture(params=CONFIGS, scope="module")
def model(request: pytest.FixtureRequest) -> Transformer:
    return make(request.param)


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, TOKENS, length).astype(np.int32) for length in LENGTHS]


@jax.jit
def logits_of(model: Transformer, batch: Batch) -> Array:
    return unembed(model, forward(model, batch).hidden_BTD)


def log_probs(model: Transformer, batch: Batch) -> np.ndarray:
    """`[B, T, V]`, teacher forced."""
    return np.asarray(jax.nn.log_softmax(logits_of(model, batch)))


def rows_of(*rows: list[np.ndarray]) -> Batch:
    """The documents of each row one after the other, positions restarting, padded to `LENGTH`."""
    tokens, positions, segments = np.zeros((3, len(rows), LENGTH), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for index, document in enumerate(documents):
            end = start + len(document)
            tokens[row, start:end], segments[row, start:end] = document, index + 1
            positions[row, start:end] = np.arange(len(document))
            start = end
    return Batch(*map(jnp.asarray, (tokens, positions, segments)))


def chunks_of(lengths: tuple[int, ...]) -> Iterator[np.ndarray]:
    """How many tokens of each row are fed at a time: uneven prefill, an uneven chunk, then one by one."""
    done = np.zeros(len(lengths), int)
    for size in ([9, 5, 2], [4, 1, 0], *[[1] * len(lengths)] * max(lengths)):
        count = np.minimum(size, np.asarray(lengths) - done)
        if count.any():
            yield count
        done += count


@jax.jit
def step(model: Transformer, batch: Batch, cache) -> tuple:
    output = forward(model, batch, cache)
    return unembed(model, output.hidden_BTD), output.cache


def test_packed_and_separate_documents_agree(model: Transformer, documents: list[np.ndarray]) -> None:
    long, middle, short = documents
    separate = log_probs(model, rows_of([long], [middle], [short]))
    packed = log_probs(model, rows_of([short, long], [], [middle]))
    np.testing.assert_allclose(packed[0, :4], separate[2, :4], atol=tolerance(model.config))
    np.testing.assert_allclose(packed[0, 4:23], separate[0, :19], atol=tolerance(model.config))
    np.testing.assert_allclose(packed[2, :13], separate[1, :13], atol=tolerance(model.config))


def test_prefill_and_decode_agree_with_teacher_forcing(model: Transformer, documents: list[np.ndarray]) -> None:
    expected = log_probs(model, rows_of(*[[d] for d in documents]))
    stored = empty_cache(model.config, len(documents), 32, jnp.dtype(jnp.float32))
    done = np.zeros(len(documents), int)
    for count in chunks_of(LENGTHS):
        width = 1 if count.max() == 1 else 16
        tokens = np.zeros((len(documents), width), np.int32)
        valid = np.arange(width)[None] < count[:, None]
        for row, document in enumerate(documents):
            tokens[row, : count[row]] = document[done[row] : done[row] + count[row]]
        logits, stored = step(model, continuation(jnp.asarray(tokens), stored.lengths_B, jnp.asarray(valid)), stored)
        found = np.asarray(jax.nn.log_softmax(logits))
        for row in range(len(documents)):
            span = slice(done[row], done[row] + count[row])
            np.testing.assert_allclose(found[row, : count[row]], expected[row, span], atol=tolerance(model.config))
        done += count
    assert stored.lengths_B.tolist() == list(LENGTHS)


@pytest.mark.parametrize("name", [NAMES[0], RICHEST, HYBRID])
def test_the_samplers_log_probs_are_those_of_scoring(name: str, documents: list[np.ndarray]) -> None:
    model = make(name)
    generator = Engine(model, Words(), slots=4)
    sampling = [SamplingParams(temperature=t, top_p=0.9, max_tokens=n, seed=n) for t, n in ((0, 9), (1, 11), (3, 6))]
    prompts = [document.tolist() for document in documents]
    replies = generator.generate(prompts, sampling)
    assert [len(reply.tokens) for reply in replies] == [9, 11, 6]
    whole = [np.asarray(prompt + reply.tokens, np.int32) for prompt, reply in zip(prompts, replies, strict=True)]
    scored = log_probs(model, rows_of(*[[document] for document in whole]))
    for row, reply in enumerate(replies):
        places = len(prompts[row]) - 1 + np.arange(len(reply.tokens))
        np.testing.assert_allclose(reply.logprobs, scored[row, places, reply.tokens], atol=tolerance(model.config))


@pytest.mark.parametrize("name", ["softmax experts", "linear and gated full layers"])
def test_stacked_and_listed_layers_agree(name: str, documents: list[np.ndarray]) -> None:
    stacked = make(name, stacked=True)
    batch = rows_of(*[[document] for document in documents])
    listed = decode_weights(stacked, None)
    np.testing.assert_allclose(log_probs(stacked, batch), log_probs(listed, batch), atol=tolerance(stacked.config))


def test_padding_is_never_routed_or_counted(documents: list[np.ndarray]) -> None:
    model = make("softmax experts")
    moe, batch = model.config.moe, rows_of(*[[document] for document in documents])
    output = jax.jit(forward)(model, batch)
    assert output.stats is not None
    assert output.experts_LBTC is not None
    np.testing.assert_array_equal(output.stats.counts_E.sum(-1), sum(LENGTHS) * moe.experts_per_token)
    np.testing.assert_allclose(output.stats.scores_E.sum(-1), sum(LENGTHS), rtol=1e-5)
    padding = np.asarray(batch.segments_BT) == 0
    assert np.all(np.asarray(output.experts_LBTC)[:, padding] == moe.num_experts)
    assert np.all(np.asarray(output.experts_LBTC)[:, ~padding] < moe.num_experts)


@pytest.mark.parametrize("name", [NAMES[1], RICHEST, *NAMES[-3:]])
def test_nothing_flows_from_later_tokens_or_other_documents(name: str) -> None:
    model = make(name)
    pieces = np.split(np.arange(16, dtype=np.int32), [7, 12])  # every token once: its embedding stands for its place
    batch = rows_of(pieces)
    leaves, structure = jax.tree.flatten(model)
    place = next(i for i, leaf in enumerate(leaves) if leaf is model.embedding_VD[...])
    weights = jax.random.normal(jax.random.key(4), (TINY.hidden_size,))

    def outputs(embedding_VD: Array) -> Array:
        changed = jax.tree.unflatten(structure, [*leaves[:place], embedding_VD, *leaves[place + 1 :]])
        return forward(changed, batch).hidden_BTD[0, :16] @ weights

    gradient_TVD = np.asarray(jax.jit(jax.jacrev(outputs))(leaves[place]))[:, :16]
    flows = np.abs(gradient_TVD).sum(-1) > 0
    document = np.repeat([0, 1, 2], [7, 5, 4])
    expected = (document[:, None] == document[None]) & np.tri(16, dtype=bool)
    if name == WINDOWED:  # two layers, of which the second sees all: what counts is that nothing else flows
        expected &= flows
        assert flows[6, 0]
    np.testing.assert_array_equal(flows, expected)


@pytest.mark.parametrize(
    "name", [NAMES[0], RICHEST, HYBRID, *(pytest.param(n, marks=pytest.mark.full) for n in NAMES[-2:])]
)
def test_the_engine_agrees_with_scoring(name: str) -> None:
    """Requests come, are left and put back at any time, and begin with what others had read."""
    model = make(name)
    memory = 4 * Room(model.config, jnp.dtype(model.dtype), 64, "same").snapshot_bytes
    engine = Engine(model, Words(), slots=3, pages=9, snapshot_memory=memory)
    assert engine.device.store.count == (4 if memory else 0)
    rng = np.random.default_rng(1)
    beginnings = [rng.integers(0, TOKENS, length).tolist() for length in (0, 66, 135)]
    asked = []
    for index in range(14):
        prompt = beginnings[index % 3] + rng.integers(0, TOKENS, rng.integers(1, 20)).tolist()
        sampling = SamplingParams(temperature=index % 2, max_tokens=int(rng.integers(1, 90)), seed=index)
        asked.append(engine.request(prompt, sampling))
    waiting = list(asked)
    left = asked[5]
    while waiting or engine.scheduler.busy:
        for request in waiting[: rng.integers(0, 3)]:
            engine.submit(waiting.pop(waiting.index(request)))
        if len(left.tokens) > 2:
            engine.abort(left)
        engine.step()
    engine.step()
    assert left.finish_reason == "abort"
    assert engine.scheduler.pools[0].held == 0
    assert sum(request.cached_tokens > 0 for request in asked) >= 4
    scored = Scorer(model).score([request.known for request in asked])
    for request, (line, _) in zip(asked, scored, strict=True):
        assert request is left or len(request.tokens) == request.max_tokens
        expected = np.asarray(line[len(request.prompt) :], dtype=np.float64)
        np.testing.assert_allclose(request.logprobs, expected, atol=1e-4)
