"""Law: the sampler draws from exactly the distribution that its definition gives, and a row is drawn by itself.

The definition is `filtered` below: float64, sorted, one row at a time.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from serve.request import Request
from serve.rows import ROW, fill, unpack_rows
from serve.sampling import SamplingArrays, filter_threshold, float_of_order, largest_threshold, sample
from serve.sampling_params import SamplingParams

ROWS, VOCAB = 500, 300
SAMPLE = jax.jit(sample, static_argnames="vocab_limit")
THRESHOLD = jax.jit(largest_threshold)


def filtered(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution to draw from: temperature, then top-k, then top-p of what is left, then min-p; ties stay."""
    scaled = logits_V.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    if params.top_k:
        weights[logits_V < np.sort(logits_V)[::-1][min(params.top_k, len(logits_V)) - 1]] = 0
    if params.top_p < 1:
        order = np.argsort(-logits_V, kind="stable")
        reached = np.cumsum(weights[order]) >= params.top_p * weights.sum()
        weights[logits_V < logits_V[order[np.argmax(reached)]]] = 0
    weights[weights < params.min_p] = 0
    return weights / weights.sum()


def sampling_arrays(params: list[SamplingParams], rows: int | None = None) -> SamplingArrays:
    """What the device gets of these settings, filled up with greedy rows."""
    lines = np.zeros(rows or len(params), ROW)
    for line, one in zip(lines, params, strict=False):
        fill(line, Request([1], one if one.seed is not None else one.variants(1)[0], (), 1))
    return unpack_rows(jnp.asarray(lines.view(np.int32).reshape(len(lines), -1))).sampling


def draw(
    logits_BV: np.ndarray, params: list[SamplingParams], step: int | list[int] = 0, vocab_limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`sample` as one compiled program for all tests: rows and vocabulary are filled up."""
    rows, vocab = logits_BV.shape
    padded = np.full((ROWS, VOCAB), -np.inf, np.float32)
    padded[:, 0] = 0
    padded[:rows, :vocab] = logits_BV
    steps = np.zeros(ROWS, np.int32)
    steps[:rows] = step
    outputs = SAMPLE(jnp.asarray(padded), sampling_arrays(params, ROWS), jnp.asarray(steps), vocab_limit=vocab_limit)
    tokens, logprobs = (np.asarray(output)[:rows] for output in outputs)
    return tokens, logprobs


@jax.jit
def kept(logits: jax.Array, arrays: SamplingArrays) -> jax.Array:
    weights = jnp.exp((logits - logits.max()) / arrays.temperature_B[:, None])
    lowest = filter_threshold(logits, weights, arrays)
    return (logits >= lowest[:, None]) & (weights >= arrays.min_p_B[:, None])


def support(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The tokens that the sampler's own filters keep."""
    return np.asarray(kept(jnp.asarray(logits_V)[None], sampling_arrays([params])))[0]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 10_000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(params=PARAMS, seed=st.integers(0, 999), vocab=st.sampled_from([7, 1000]), spread=st.sampled_from([1, 6]))
def test_filters_keep_what_the_definition_keeps(params: SamplingParams, seed: int, vocab: int, spread: int) -> None:
    logits = (np.random.default_rng(seed).normal(size=vocab) * spread).astype(np.float32)
    assert np.array_equal(support(logits, params), filtered(logits, params) > 0)


def test_ties_are_kept_together() -> None:
    logits = np.asarray([2.0, 1.0, 1.0, 1.0, 0.0, -0.0], np.float32)
    assert support(logits, SamplingParams(top_k=2)).tolist() == [True] * 4 + [False] * 2
    assert support(logits, SamplingParams(top_k=5)).tolist() == [True] * 6
    assert support(logits, SamplingParams(top_p=0.5)).tolist() == [True] * 4 + [False] * 2


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_subnormal=False, allow_infinity=False), min_size=1, max_size=12
    ),
    k=st.integers(1, 14),
)
def test_threshold_is_the_kth_largest_of_any_floats(values: list[float], k: int) -> None:
    row = np.zeros(12, np.float32)
    row[: len(values)] = values
    found = THRESHOLD(jnp.asarray(row)[None], jnp.ones((1, 12)), jnp.asarray([float(k)]))[0]
    expected = np.sort(row)[::-1][k - 1] if k <= 12 else -np.inf
    assert float(found) == expected


def test_places_in_the_order_of_floats() -> None:
    places = jnp.asarray([-0x7F800001, -2, -1, 0, 1, 0x3F800000, 0x7F800000], jnp.int32)
    numbers = np.asarray(float_of_order(places))
    assert numbers[0] == -np.inf
    assert numbers[3] == 0
    assert numbers[5] == 1
    assert numbers[6] == np.inf
    assert np.all(np.diff(numbers[np.isfinite(numbers)].astype(np.float64)) >= 0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.5, top_k=40),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.3, top_k=200, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_draws_follow_the_definition(params: SamplingParams) -> None:
    repeats = 40
    logits = (np.random.default_rng(1).normal(size=VOCAB) * 2).astype(np.float32)
    expected = filtered(logits, params) * repeats * ROWS
    counts = np.zeros(VOCAB)
    for step in range(repeats):
        tokens, _ = draw(np.broadcast_to(logits, (ROWS, VOCAB)), replace(params, seed=5).variants(ROWS), step)
        counts += np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    possible = wanted > 0
    chi2 = ((observed[possible] - wanted[possible]) ** 2 / wanted[possible]).sum()
    freedom = possible.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 8, (chi2, freedom)


@pytest.mark.parametrize(
    "own",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=11),
        SamplingParams(top_p=0.9, top_k=50, seed=3),
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_its_company(own: SamplingParams) -> None:
    logits = np.random.default_rng(2).normal(size=(6, VOCAB)) * 3
    companies = [
        [SamplingParams(temperature=0.0)] * 5,
        [SamplingParams(temperature=1.0, seed=i) for i in range(5)],
        [SamplingParams(top_k=5, top_p=0.5, min_p=0.1, seed=i) for i in range(5)],
    ]
    seen = set()
    for company in companies:
        for row in (0, 3):
            params = [*company[:row], own, *company[row:]]
            mixed = np.concatenate([logits[1 : row + 1], logits[:1], logits[row + 1 :]])
            tokens, logprobs = draw(mixed, params, 7)
            seen.add((int(tokens[row]), float(logprobs[row])))
    assert len(seen) == 1, seen


def test_randomness_is_the_seed_and_the_step() -> None:
    flat = np.zeros((4, VOCAB))
    params = [SamplingParams(seed=seed) for seed in (1, 1, 2, 1 + 2**32)]
    first, _ = draw(flat, params)
    again, _ = draw(flat, params, [0, 1, 0, 0])
    assert first[0] == first[1] == again[0]
    assert len({int(first[0]), int(first[2]), int(first[3]), int(again[1])}) == 4


def test_the_log_probability_is_the_models_own() -> None:
    logits = (np.random.default_rng(3).normal(size=(3, 50)) * 4).astype(np.float32)
    params = [SamplingParams(temperature=0.0), SamplingParams(top_k=2, seed=1), SamplingParams(temperature=3, seed=1)]
    tokens, logprobs = draw(logits, params)
    expected = jax.nn.log_softmax(jnp.asarray(logits))[jnp.arange(3), tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-6)


def test_tokens_past_the_limit_are_never_chosen() -> None:
    logits = np.zeros((200, VOCAB), np.float32)
    logits[:, 260:] = 50.0
    params = [SamplingParams(temperature=0.0)] * 100 + [SamplingParams(seed=i) for i in range(100)]
    tokens, logprobs = draw(logits, params, vocab_limit=260)
    assert tokens.max() < 260
    assert tokens[:100].tolist() == [0] * 100
    np.testing.assert_allclose(logprobs, -50 - np.log(40), rtol=1e-5)


def test_extreme_logits_and_temperatures() -> None:
    logits = np.asarray([[0.0, -np.inf, 80.0, -np.inf], [1e30, -1e30, 3.0, 1e30], [-1e9, -1e9, -1e9, -2e9]])
    params = [SamplingParams(temperature=t, top_p=p, seed=4) for t, p in ((1e-4, 0.9), (1e-3, 1.0), (5.0, 0.5))]
    padded = np.full((3, VOCAB), -np.inf)
    padded[:, :4] = logits
    tokens, logprobs = draw(padded, params)
    assert tokens[0] == 2
    assert tokens[1] in (0, 3)
    assert tokens[2] in (0, 1, 2)
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"seed": -1},
        {"seed": 2**63},
        {"max_tokens": 0},
    ],
    ids=str,
)
def test_impossible_parameters_are_refused_by_name(wrong: dict) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        SamplingParams(**wrong)


def test_variants_have_seeds_of_their_own() -> None:
    assert [p.seed for p in SamplingParams(seed=2**63 - 1).variants(3)] == [2**63 - 1, 0, 1]
    assert len({p.seed for p in SamplingParams().variants(4)}) == 4
