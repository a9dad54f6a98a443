"""Law: a reply depends on its prompt and sampling alone: not on its company, on waves, on the form of the weights.

In deterministic mode to the bit; otherwise up to rounding, so that two greedy texts may part only where two tokens
were as good as equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from model.config import ModelConfig, MoEConfig
from model.moe import MoE
from model.transformer import Transformer
from serve.generate import Completion, Generator, bucket
from serve.sampling import SamplingParams, sampling_arrays
from serve.steps import Rows
from sharding.mesh import MeshConfig, make_mesh

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
    moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16),
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


class Words:
    """A tokenizer as far as generation looks at it."""

    vocab_size = 61
    stop_ids = (60,)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return jax.jit(lambda: Transformer(CONFIG, jax.random.key(0)))()


@pytest.fixture(scope="module")
def generator(model: Transformer) -> Generator:
    return Generator(model, Words(), max_rows=4)


@pytest.fixture(scope="module")
def steady(generator: Generator) -> Generator:
    """The same in deterministic mode; the compiled steps are shared."""
    made = copy(generator)
    made.deterministic = True
    return made


def prompts(count: int, longest: int = 16) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 60, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the programs compiled in this block."""
    seen: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        assert duration_secs >= 0
        if event.endswith("backend_compile_duration"):
            seen.append(str(kwargs.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def assert_same_up_to_ties(one: Completion, other: Completion) -> None:
    """Equal, or parting where both chose a token that was as good as the other's."""
    pairs = list(zip(one.tokens, other.tokens, strict=False))
    part = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    np.testing.assert_allclose(one.logprobs[: part + 1], other.logprobs[: part + 1], atol=1e-4)
    if part < len(pairs):
        print(f"parted at {part}: {pairs[part]} with log-probs {one.logprobs[part]}, {other.logprobs[part]}")


def test_deterministic_replies_do_not_depend_on_their_company(steady: Generator) -> None:
    asked = prompts(7)
    sampling = [GREEDY if i % 2 else SamplingParams(top_p=0.9, max_tokens=5 + i, seed=i) for i in range(7)]
    together = steady.generate(asked, sampling)
    backwards = steady.generate(asked[::-1], sampling[::-1])[::-1]
    assert together == backwards
    for prompt, params, reply in zip(asked, sampling, together, strict=True):
        assert steady.generate([prompt], params) == [reply]


def test_replies_agree_in_waves_and_alone(generator: Generator) -> None:
    asked = prompts(9)
    together = generator.generate(asked, GREEDY)
    for prompt, reply in zip(asked, together, strict=True):
        assert reply.prompt_tokens == len(prompt)
        assert_same_up_to_ties(generator.generate([prompt], GREEDY)[0], reply)


def test_seeds_decide(steady: Generator) -> None:
    params = SamplingParams(max_tokens=20, seed=1)
    same = steady.generate([[1, 2, 3]] * 2, params)
    assert same[0] == same[1]
    others = steady.generate([[1, 2, 3]] * 4, params.variants(4))
    assert others[0] == same[0]
    assert len({tuple(reply.tokens) for reply in others}) == 4
    unseeded = [steady.generate([[1, 2, 3]], replace(params, seed=None))[0].tokens for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_replies_end_at_stop_tokens_and_limits(generator: Generator) -> None:
    asked = prompts(3)
    free = generator.generate(asked, replace(GREEDY, stop_ids=()))
    assert {reply.finish_reason for reply in free} == {"length"}
    assert {len(reply.tokens) for reply in free} == {12}
    stop = free[0].tokens[4]
    first = free[0].tokens.index(stop)
    limits = [replace(GREEDY, stop_ids=(59, stop)), replace(GREEDY, stop_ids=(), max_tokens=1), GREEDY]
    stopped, short, _ = generator.generate(asked, limits)
    assert stopped.tokens == free[0].tokens[: first + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.content == free[0].tokens[:first]
    assert short.tokens == free[1].tokens[:1]
    assert short.content == short.tokens


def test_the_tokenizers_stop_ids_are_the_default(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generator.generate([[5]], replace(GREEDY, stop_ids=()))[0]
    monkeypatch.setattr(Words, "stop_ids", (59, free.tokens[0]))
    reply = generator.generate([[5]], GREEDY)[0]
    assert (reply.tokens, reply.finish_reason) == (free.tokens[:1], "stop")


def test_a_reply_ends_with_the_positions(generator: Generator) -> None:
    prompt = [1] * (CONFIG.max_positions - 3)
    reply = generator.generate([prompt], replace(GREEDY, stop_ids=()))[0]
    assert (len(reply.tokens), reply.finish_reason) == (3, "length")


def test_tokens_come_one_by_one(generator: Generator) -> None:
    asked, heard = prompts(5), [[] for _ in range(5)]
    replies = generator.generate(asked, GREEDY, on_token=lambda row, *heard_: heard[row].append(heard_))
    for reply, tokens in zip(replies, heard, strict=True):
        assert tokens == list(zip(reply.tokens, reply.logprobs, strict=True))
    assert list(generator.stream(asked[0], GREEDY)) == heard[0]
    stream = generator.stream(asked[0], GREEDY)
    assert next(stream) == heard[0][0]


def test_nothing_is_compiled_after_the_first_wave(generator: Generator) -> None:
    sampled = SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, max_tokens=9, stop_ids=(1, 2, 3))
    generator.generate(prompts(4), GREEDY)
    with compilations() as seen:
        jax.jit(lambda x: x + 1)(np.zeros(3))
    assert len(seen) == 1, "the count works"
    with compilations() as seen:
        generator.generate(prompts(4, longest=9), sampled)
        generator.generate(prompts(3), [GREEDY, sampled, replace(sampled, seed=4)])
    assert seen == []


@pytest.mark.parametrize("count", [1, 4])
def test_the_cache_is_updated_in_place(generator: Generator, count: int) -> None:
    """What a decode step returns lies in the buffers that it was given, and nothing copies or transposes them."""
    rows = Rows(sampling_arrays([GREEDY] * count), jnp.full((count, 4), -1), jnp.full(count, 9))
    tokens, lengths = np.ones((count, 16), np.int32), np.full(count, 5, np.int32)
    state, _ = generator.prefill_step(generator.leaves, tokens, lengths, rows, capacity=128)
    compiled = generator.decode_step.lower(generator.leaves, state, rows).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024
    results = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled.as_text() or "")
    moved = [shape for shape in results if math.prod(map(int, shape.split(","))) == state.cache.layers[0][0].size]
    assert moved == []
    before = state.cache.layers[0][0].unsafe_buffer_pointer()
    after, _ = generator.decode_step(generator.leaves, state, rows)
    assert after.cache.layers[0][0].unsafe_buffer_pointer() == before
    assert state.cache.layers[0][0].is_deleted()


def test_new_weights_need_no_compilation(model: Transformer, generator: Generator) -> None:
    other = jax.jit(lambda: Transformer(CONFIG, jax.random.key(1)))()
    before = generator.generate([[3, 1]], GREEDY)
    with compilations() as seen:
        generator.update(other)
        after = generator.generate([[3, 1]], GREEDY)
        generator.update(model)
        again = generator.generate([[3, 1]], GREEDY)
    assert seen == []
    assert before == again != after


def test_stacked_weights_become_the_same_list(model: Transformer) -> None:
    stacked = jax.jit(lambda: Transformer(CONFIG, jax.random.key(0), stacked=True))()
    listed, expected = Generator(stacked, Words()).leaves, Generator(model, Words()).leaves
    for leaf, wanted in zip(listed, expected, strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=1e-6)


def test_half_precision_keeps_the_router_whole(generator: Generator) -> None:
    half = jax.jit(lambda: Transformer(CONFIG, jax.random.key(0), dtype=jnp.dtype(jnp.bfloat16)))()
    rounded = Generator(half, Words())
    experts = rounded.model.stacks[0].blocks[0].feed_forward
    assert isinstance(experts, MoE)
    assert experts.router_DE[...].dtype == jnp.float32
    assert experts.gate_EDF[...].dtype == jnp.bfloat16
    first = replace(GREEDY, max_tokens=1)
    reply, expected = (g.generate([[7, 8, 9]], first)[0] for g in (rounded, generator))
    np.testing.assert_allclose(reply.logprobs, expected.logprobs, atol=0.1)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "expert": 2, "tensor": 2}, pytest.param({"tensor": 2}, marks=pytest.mark.full)], ids=str
)
def test_a_mesh_gives_the_same_replies(model: Transformer, generator: Generator, sizes: dict[str, Any]) -> None:
    asked = prompts(4)
    params = [GREEDY, GREEDY, SamplingParams(temperature=0.0, max_tokens=3), GREEDY]
    meshed = Generator(model, Words(), mesh=make_mesh(MeshConfig(**sizes)), max_rows=4)
    for reply, expected in zip(meshed.generate(asked, params), generator.generate(asked, params), strict=True):
        assert_same_up_to_ties(reply, expected)
    with compilations() as seen:
        meshed.generate(asked, replace(GREEDY, temperature=1.0, top_p=0.9))
    assert seen == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([[1], []], "prompt 2 is empty"),
        ([[1] * 200], "200 tokens, but the model has 128 positions"),
        ([[1] * 128], "128 tokens, but the model has 128 positions"),
        ([[1, 61]], "holds the id 61, but tokens run from 0 to 60"),
        ([[-1]], "holds the id -1"),
    ],
)
def test_impossible_prompts_are_refused(generator: Generator, asked: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generator.generate(asked, GREEDY)
    with pytest.raises(UserError, match=message.replace("prompt 2", "prompt 1")):
        generator.stream(asked[-1], GREEDY)


def test_other_impossible_requests_are_refused(generator: Generator, model: Transformer) -> None:
    with pytest.raises(UserError, match="2 prompts came with 1 sampling settings"):
        generator.generate([[1], [2]], [GREEDY])
    with pytest.raises(UserError, match="max_rows=0"):
        Generator(model, Words(), max_rows=0)

    class Longer(Words):
        vocab_size = 65

    with pytest.raises(UserError, match="tokenizer has 65 tokens and the model 64"):
        Generator(model, Longer())
    assert generator.generate([], GREEDY) == []


def test_buckets() -> None:
    assert [bucket(n, 16, 1000) for n in (1, 16, 17, 600, 1000)] == [16, 16, 32, 1000, 1000]
    assert [bucket(n, 128, 9999, halves=True) for n in (1, 129, 193, 256, 257, 400)] == [128, 192, 256, 256, 384, 512]
