"""Law: a reply depends on its prompt and sampling alone: not on its company, on turns, on the form of the weights.

In deterministic mode to the bit; otherwise up to rounding, so that two greedy texts may part only where two tokens
were as good as equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from model.config import ModelConfig, MoEConfig
from model.forward import continuation, forward, unembed
from model.moe import MoE
from model.transformer import Transformer
from serve.engine import Engine
from serve.programs import Shape
from serve.request import Completion
from serve.sampling_params import SamplingParams
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
def engine(model: Transformer) -> Engine:
    return Engine(model, Words(), slots=4)


@pytest.fixture(scope="module")
def steady(model: Transformer) -> Engine:
    return Engine(model, Words(), slots=4, deterministic=True)


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


def test_deterministic_replies_do_not_depend_on_their_company(steady: Engine) -> None:
    asked = prompts(7)
    sampling = [GREEDY if i % 2 else SamplingParams(top_p=0.9, max_tokens=5 + i, seed=i) for i in range(7)]
    together = steady.generate(asked, sampling)
    backwards = steady.generate(asked[::-1], sampling[::-1])[::-1]
    assert together == backwards
    for prompt, params, reply in zip(asked, sampling, together, strict=True):
        assert steady.generate([prompt], params) == [reply]


def test_replies_agree_in_turns_and_alone(engine: Engine) -> None:
    asked = prompts(9)
    together = engine.generate(asked, GREEDY)
    for prompt, reply in zip(asked, together, strict=True):
        assert reply.prompt_tokens == len(prompt)
        assert_same_up_to_ties(engine.generate([prompt], GREEDY)[0], reply)


def test_seeds_decide(steady: Engine) -> None:
    params = SamplingParams(max_tokens=20, seed=1)
    same = steady.generate([[1, 2, 3]] * 2, params)
    assert same[0] == same[1]
    others = steady.generate([[1, 2, 3]] * 4, params.variants(4))
    assert others[0] == same[0]
    assert len({tuple(reply.tokens) for reply in others}) == 4
    unseeded = [steady.generate([[1, 2, 3]], replace(params, seed=None))[0].tokens for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_replies_end_at_stop_tokens_and_limits(engine: Engine) -> None:
    asked = prompts(3)
    free = engine.generate(asked, replace(GREEDY, stop_ids=()))
    assert {reply.finish_reason for reply in free} == {"length"}
    assert {len(reply.tokens) for reply in free} == {12}
    stop = free[0].tokens[4]
    first = free[0].tokens.index(stop)
    limits = [replace(GREEDY, stop_ids=(59, stop)), replace(GREEDY, stop_ids=(), max_tokens=1), GREEDY]
    stopped, short, _ = engine.generate(asked, limits)
    assert stopped.tokens == free[0].tokens[: first + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.content == free[0].tokens[:first]
    assert short.tokens == free[1].tokens[:1]
    assert short.content == short.tokens


def test_the_tokenizers_stop_ids_are_the_default(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = engine.generate([[5]], replace(GREEDY, stop_ids=()))[0]
    monkeypatch.setattr(Words, "stop_ids", (59, free.tokens[0]))
    reply = engine.generate([[5]], GREEDY)[0]
    assert (reply.tokens, reply.finish_reason) == (free.tokens[:1], "stop")


def test_a_reply_ends_with_the_positions(engine: Engine) -> None:
    prompt = [1] * (CONFIG.max_positions - 3)
    reply = engine.generate([prompt], replace(GREEDY, stop_ids=()))[0]
    assert (len(reply.tokens), reply.finish_reason) == (3, "length")


def test_tokens_come_one_by_one(engine: Engine) -> None:
    asked, heard = prompts(5), [[] for _ in range(5)]
    replies = engine.generate(asked, GREEDY, on_token=lambda row, *heard_: heard[row].append(heard_))
    for reply, tokens in zip(replies, heard, strict=True):
        assert tokens == list(zip(reply.tokens, reply.logprobs, strict=True))
    streamed = list(engine.stream(asked[0], GREEDY))
    assert [token for token, _ in streamed] == [token for token, _ in heard[0]]
    np.testing.assert_allclose([p for _, p in streamed], [p for _, p in heard[0]], atol=1e-5)


def test_nothing_is_compiled_after_warm_up(model: Transformer) -> None:
    engine = Engine(model, Words(), slots=4)
    sampled = SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, max_tokens=9, stop_ids=(1, 2, 3))
    asks = replace(
        sampled, presence_penalty=1, repetition_penalty=1.2, logit_bias=((3, 5.0),), min_tokens=4, top_logprobs=5
    )
    engine.warm_up()
    with compilations() as seen:
        jax.jit(lambda x: x + 1)(np.zeros(3))
    assert len(seen) == 1, "the count works"
    with compilations() as seen:
        for count in (1, 4, 6):
            engine.generate(
                prompts(count, longest=100), [GREEDY, sampled, asks, replace(sampled, seed=4), asks, asks][:count]
            )
    assert seen == []


@pytest.mark.parametrize("shape", [Shape(1), Shape(4), Shape(1, 64), Shape(8, 64)], ids=str)
def test_the_cache_is_updated_in_place(engine: Engine, shape: Shape) -> None:
    """What a step returns lies in the buffers that it was given, and nothing copies or transposes them."""
    compiled: Any = engine.device.programs[shape]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(engine.device.state))
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096
    pages = ",".join(map(str, engine.device.state.layers[0][0].shape))
    assert re.findall(rf"= f32\[{pages}\]\S* (?:copy|transpose)\(", compiled.as_text() or "") == []


def test_new_weights_need_no_compilation(model: Transformer, engine: Engine) -> None:
    other = jax.jit(lambda: Transformer(CONFIG, jax.random.key(1)))()
    before = engine.generate([[3, 1]], GREEDY)
    with compilations() as seen:
        engine.update(other)
        after = engine.generate([[3, 1]], GREEDY)
        engine.update(model)
        again = engine.generate([[3, 1]], GREEDY)
    assert seen == []
    assert before == again != after


def test_stacked_weights_become_the_same_list(model: Transformer) -> None:
    stacked = jax.jit(lambda: Transformer(CONFIG, jax.random.key(0), stacked=True))()
    listed, expected = (Engine(one, Words(), slots=1).device.leaves for one in (stacked, model))
    for leaf, wanted in zip(listed, expected, strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=1e-6)


def test_half_precision_keeps_the_router_whole(engine: Engine) -> None:
    half = jax.jit(lambda: Transformer(CONFIG, jax.random.key(0), dtype=jnp.dtype(jnp.bfloat16)))()
    rounded = Engine(half, Words(), slots=1)
    experts = rounded.model.stacks[0].blocks[0].feed_forward
    assert isinstance(experts, MoE)
    assert experts.router_DE[...].dtype == jnp.float32
    assert experts.gate_EDF[...].dtype == jnp.bfloat16
    first = replace(GREEDY, max_tokens=1)
    reply, expected = (g.generate([[7, 8, 9]], first)[0] for g in (rounded, engine))
    np.testing.assert_allclose(reply.logprobs, expected.logprobs, atol=0.1)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "expert": 2, "tensor": 2}, pytest.param({"tensor": 2}, marks=pytest.mark.full)], ids=str
)
def test_a_mesh_gives_the_same_replies(model: Transformer, engine: Engine, sizes: dict[str, Any]) -> None:
    asked = prompts(4)
    params = [GREEDY, GREEDY, SamplingParams(temperature=0.0, max_tokens=3), GREEDY]
    meshed = Engine(model, Words(), mesh=make_mesh(MeshConfig(**sizes)), slots=4)
    for reply, expected in zip(meshed.generate(asked, params), engine.generate(asked, params), strict=True):
        assert_same_up_to_ties(reply, expected)
    with compilations() as seen:
        meshed.generate(asked, replace(GREEDY, temperature=1.0, top_p=0.9))
    assert seen == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([[1], []], "prompt 2 is empty"),
        ([[1] * 200], "prompt 1 has 200 tokens, but the model has 128 positions"),
        ([[1] * 128], "128 tokens, but the model has 128 positions"),
        ([[1, 61]], "holds the id 61, but tokens run from 0 to 60"),
        ([[-1]], "holds the id -1"),
    ],
)
def test_impossible_prompts_are_refused(engine: Engine, asked: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine.generate(asked, GREEDY)
    with pytest.raises(UserError, match=message.replace("prompt 2", "prompt 1")):
        engine.stream(asked[-1], GREEDY)


def test_other_impossible_requests_are_refused(engine: Engine, model: Transformer) -> None:
    with pytest.raises(UserError, match="2 prompts came with 1 sampling settings"):
        engine.generate([[1], [2]], [GREEDY])
    with pytest.raises(UserError, match="slots=0"):
        Engine(model, Words(), slots=0)

    class Longer(Words):
        vocab_size = 65

    with pytest.raises(UserError, match="tokenizer has 65 tokens and the model 64"):
        Engine(model, Longer())
    assert engine.generate([], GREEDY) == []


# ---- the pool of pages ------------------------------------------------------
def test_a_prompt_that_begins_like_another_is_not_read_again(engine: Engine) -> None:
    draw = np.random.default_rng(5)
    beginning = draw.integers(0, 60, 70).tolist()
    engine.forget()
    first, again, longer = (engine.generate([beginning + more], GREEDY)[0] for more in ([], [], [1, 2, 3]))
    assert (first.cached_tokens, again.cached_tokens, longer.cached_tokens) == (0, 64, 64)
    assert_same_up_to_ties(first, again)
    engine.forget()
    assert_same_up_to_ties(longer, engine.generate([[*beginning, 1, 2, 3]], GREEDY)[0])
    both = engine.generate([[*beginning, 7], [*beginning, 8]], GREEDY)
    assert {reply.cached_tokens for reply in both} == {64}, "what is asked for at once is shared too"
    engine.update(engine.model)
    assert engine.generate([beginning], GREEDY)[0].cached_tokens == 0, "new weights forget what old ones made"


def test_replies_go_on_as_beginnings(engine: Engine) -> None:
    prompt = prompts(1)[0]
    reply = engine.generate([prompt], replace(GREEDY, max_tokens=80, stop_ids=()))[0]
    turn = engine.generate([[*prompt, *reply.tokens, 5]], GREEDY)[0]
    assert turn.cached_tokens == (len(prompt) + 79) // 64 * 64 > 0


def test_rows_that_find_no_page_wait_and_go_on(model: Transformer) -> None:
    """With pages for little more than one row at a time, replies are those of an engine that has plenty."""
    narrow, wide = (Engine(model, Words(), slots=4, pages=n) for n in (3, None))
    asked = prompts(6)
    params = [replace(GREEDY, max_tokens=100, stop_ids=())] * 3 + [
        SamplingParams(max_tokens=90, seed=i) for i in range(3)
    ]
    for one, other in zip(narrow.generate(asked, params), wide.generate(asked, params), strict=True):
        assert_same_up_to_ties(one, other)
    assert narrow.scheduler.preemptions > 0
    assert narrow.scheduler.pools[0].held == 0 and not narrow.scheduler.busy


def test_a_reply_that_is_left_gives_back_what_it_had(engine: Engine) -> None:
    stream = engine.stream([1, 2, 3], replace(GREEDY, stop_ids=()))
    next(stream)
    stream.close()
    assert not engine.scheduler.busy
    assert engine.scheduler.pools[0].held == 0


# ---- what requests may ask for ----------------------------------------------
@jax.jit
def all_logits(model: Transformer, row: jax.Array) -> jax.Array:
    return unembed(model, forward(model, continuation(row, jnp.zeros(1, jnp.int32))).hidden_BTD)


def reference(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    """A greedy reply by the definitions of bias and penalties, a token at a time."""
    tokens: list[int] = []
    while len(tokens) < params.max_tokens:
        known = [*prompt, *tokens]
        row = jnp.asarray([known + [0] * (128 - len(known))])
        logits = np.array(all_logits(engine.model, row)[0, len(known) - 1], np.float64)
        counts = np.bincount(tokens, minlength=len(logits))
        said = (counts > 0) | (np.bincount(prompt, minlength=len(logits)) > 0)
        logits = np.where(
            said, np.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty), logits
        )
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        for token, by in params.logit_bias:
            logits[token] += by
        if len(tokens) < params.min_tokens:
            logits[list(params.stop_ids or ())] = -np.inf
        logits[Words.vocab_size :] = -np.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] in (params.stop_ids or ()):
            break
    return tokens


ASKED = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.6},
    {
        "presence_penalty": 0.4,
        "frequency_penalty": -0.3,
        "repetition_penalty": 0.8,
        "logit_bias": ((7, 2.0), (9, -100.0)),
    },
    {"stop_ids": tuple(range(0, 16, 2)), "min_tokens": 5},
    {},
]


def test_bias_and_penalties_are_what_their_definitions_say(engine: Engine) -> None:
    asked = prompts(len(ASKED))
    params = [replace(GREEDY, **{"stop_ids": (), **more}) for more in ASKED]
    for reply, prompt, one in zip(engine.generate(asked, params), asked, params, strict=True):
        assert reply.tokens == reference(engine, prompt, one)


def test_what_others_ask_for_changes_nobodys_bits(steady: Engine) -> None:
    asked = prompts(4)
    plain = steady.generate(asked[:1], GREEDY)
    params = [GREEDY, *(replace(GREEDY, **more) for more in ASKED[:3])]
    assert steady.generate(asked, params)[:1] == plain


def test_the_most_likely_tokens(engine: Engine) -> None:
    prompt = prompts(1)[0]
    reply, plain = engine.generate([prompt] * 2, [replace(GREEDY, top_logprobs=20), GREEDY])
    assert (plain.top, plain.tokens) == ([], reply.tokens)
    row = jnp.asarray([[*prompt, *reply.tokens]])
    expected = np.asarray(jax.nn.log_softmax(all_logits(engine.model, row)[0]))
    for place, (token, logprob, top) in enumerate(zip(reply.tokens, reply.logprobs, reply.top, strict=True)):
        found = expected[len(prompt) - 1 + place]
        assert top[0][0] == token and math.isclose(top[0][1], logprob, abs_tol=1e-5)
        assert [t for t, _ in top] == np.argsort(-found, kind="stable")[:20].tolist()
        np.testing.assert_allclose([p for _, p in top], np.sort(found)[::-1][:20], atol=1e-5)
