"""Law: guesses change the number of steps and nothing else; those that do not come true leave no trace."""

from __future__ import annotations

import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import UserError
from model.forward import Batch, forward, predict_further, unembed
from model.transformer import Transformer
from serve.engine import Engine
from serve.lookup import LONGEST, SHORTEST, Lookup
from serve.request import Completion
from serve.sampling_params import SamplingParams
from sharding.mesh import MeshConfig, make_mesh
from tests.test_lora import MODELS

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, stop_ids=())
ASKED = [
    GREEDY,
    replace(GREEDY, temperature=0.7, seed=3, top_k=3),
    replace(GREEDY, max_tokens=7, top_logprobs=4),
    replace(GREEDY, presence_penalty=1.0),
    replace(GREEDY, stop_ids=tuple(range(8, 12)), min_tokens=5, logit_bias=((9, 0.5),)),
]
PROMPTS = [[2, 3, 4, 5] * 4, [7, 8, 9] * 5, [5, 6] * 9, [2, 3, 4] * 3, list(range(2, 40))]


class Words:
    vocab_size = 64
    stop_ids = (1,)


def same(found: list[Completion], wanted: list[Completion]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert [[token for token, _ in top] for top in one.top] == [[token for token, _ in top] for top in other.top]


FULL = [pytest.param(kind, marks=pytest.mark.full) for kind in ("dense", "moe", "latent")]


@pytest.mark.parametrize("kind", ["hybrid", *FULL])
def test_replies_are_those_without_guesses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = jax.jit(lambda: Transformer(MODELS[kind], jax.random.key(2), stacked=False))()
    plain = Engine(model, Words(), slots=4)
    wanted = plain.generate(PROMPTS, ASKED)
    engine = Engine(model, Words(), slots=4, guesses=3)
    same(engine.generate(PROMPTS, ASKED), wanted)
    assert 0 < engine.guesses_kept <= engine.guesses_made, "replies of small models repeat themselves"

    draw, guess = random.Random(0), Lookup.guess

    def sometimes_wrong(self: Lookup, tokens: list[int], count: int) -> list[int]:
        found = guess(self, tokens, count) or [draw.randrange(64) for _ in range(count)]
        return [token if draw.random() < 0.7 else draw.randrange(64) for token in found]

    monkeypatch.setattr(Lookup, "guess", sometimes_wrong)
    made, kept = engine.guesses_made, engine.guesses_kept
    same(engine.generate(PROMPTS, ASKED), wanted)
    assert 0 < engine.guesses_kept - kept < engine.guesses_made - made
    # What was read beside wrong guesses is found by others, who continue it as if there had been none.
    again = [[*prompt, *reply.tokens] for prompt, reply in zip(PROMPTS, wanted, strict=True)]
    again = [prompt for prompt in again if len(prompt) < 60]
    same(engine.generate(again, replace(GREEDY, max_tokens=3)), plain.generate(again, replace(GREEDY, max_tokens=3)))
    assert engine.scheduler.pools[0].held == 0 and not engine.scheduler.busy


def with_block(kind: str, *, sees_through: bool = False) -> Transformer:
    """A model with a block for multi-token prediction; one that sees through looks at the next token alone."""
    config = replace(MODELS[kind], mtp_layers=1, max_positions=256)
    config = replace(config, attention_pattern=(*config.attention_pattern[:-1], "full"))
    model = jax.jit(lambda: Transformer(config, jax.random.key(2), stacked=False))()
    if sees_through:
        assert model.mtp is not None
        size = config.hidden_size
        model.mtp.join_XD[...] = jnp.concatenate([jnp.eye(size), jnp.zeros((size, size))])
    return model


BLOCKS = ["dense", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("moe", "latent", "hybrid"))]


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_models_own_block_guesses(kind: str) -> None:
    """Right or wrong, guesses change nothing; one that sees what the model sees is more often right."""
    shares = []
    for sees_through in (False, True):
        model = with_block(kind, sees_through=sees_through)
        wanted = Engine(model, Words(), slots=4).generate(PROMPTS, ASKED)
        engine = Engine(model, Words(), slots=4, guesses=3)
        for _ in range(2):  # the second time prompts begin with pages that are there
            same(engine.generate(PROMPTS, ASKED), wanted)
        shares.append(engine.guesses_kept / engine.guesses_made)
    assert shares[0] < shares[1] < 1


@pytest.mark.parametrize("kind", ["moe", pytest.param("hybrid", marks=pytest.mark.full)])
def test_a_guess_is_what_the_block_predicts_of_the_whole_text(kind: str) -> None:
    """With prompts that are read in pieces, and with guesses that came true and others between."""
    model = with_block(kind, sees_through=True)
    engine = Engine(model, Words(), slots=2, guesses=2)
    prompt = np.random.RandomState(0).randint(2, 64, 90).tolist()
    engine.generate([prompt[:70]], GREEDY)
    request = engine.request(prompt, replace(GREEDY, max_tokens=60))
    engine.submit(request)
    found: list[tuple[int, int]] = []  # tokens that were known, and the first guess of what comes then
    guess = None
    while request.finish_reason is None:
        slot, known = request.place and request.place.slot, len(request.tokens)
        engine.step()
        if guess is not None and len(request.tokens) > known:
            found.append((len(request.tokens), guess))
        assert engine.device.state.drafts is not None
        guess = None if slot is None else int(engine.device.state.drafts.token_SG[slot, 0])
    assert request.cached_tokens == 64 and 0 < engine.guesses_kept < engine.guesses_made
    tokens = jnp.asarray([[*prompt, *request.tokens]])
    batch = Batch(tokens, jnp.arange(tokens.size)[None], jnp.ones_like(tokens))
    further_BTD, _ = predict_further(model, batch, forward(model, batch).hidden_BTD)
    wanted = np.argmax(unembed(model, further_BTD[0]), axis=-1)
    assert len(found) > 10
    assert [wanted[len(prompt) + known - 2] for known, _ in found] == [guess for _, guess in found]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["moe", "hybrid"])
def test_guesses_on_a_mesh(kind: str) -> None:
    """Replies are those of one device without guesses."""
    model = with_block(kind, sees_through=True)
    wanted = Engine(model, Words(), slots=4).generate(PROMPTS, ASKED)
    engine = Engine(model, Words(), slots=4, guesses=2, mesh=make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2)))
    same(engine.generate(PROMPTS, ASKED), wanted)
    assert engine.guesses_kept > 0


def test_as_many_guesses_as_one_likes_but_no_fewer_than_none() -> None:
    model = Transformer(MODELS["dense"], jax.random.key(2), stacked=False)
    with pytest.raises(UserError, match="guesses=-1 must be 0 or more"):
        Engine(model, Words(), guesses=-1)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5), st.lists(st.integers(1, 6), max_size=8))
def test_a_guess_is_what_followed_last_time(tokens: list[int], count: int, cuts: list[int]) -> None:
    lookup, end = Lookup(), 0
    for cut in [*cuts, 100]:
        end = min(len(tokens), end + cut)
        known = tokens[:end]
        wanted: list[int] = []
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            places = [at for at in range(size, end) if known[at - size : at] == known[end - size :]]
            if places:
                wanted = known[places[-1] : places[-1] + count]
                break
        assert lookup.guess(known, count) == wanted
