"""Law: a rotation keeps lengths, and products of rotated vectors depend on the distance of their positions alone.

The frequencies are those of the published formulas, worked by hand here.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from model.config import RopeConfig
from model.layers import rope_frequencies, rope_tables, rotate
from model.sizes import named

YARN = RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_max_positions=32_768)
LLAMA3 = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=8192)


def plain(theta: float, width: int) -> np.ndarray:
    return np.array([theta ** (-2 * i / width) for i in range(width // 2)])


def at(x: np.ndarray, position: int, config: RopeConfig) -> np.ndarray:
    """One vector `[H]`, rotated to a position."""
    cos, sin = rope_tables(config, x.shape[-1], jnp.full((1, 1), position), jnp.dtype(jnp.float32))
    return np.asarray(rotate(jnp.asarray(x, jnp.float32)[None, None, None], cos, sin))[0, 0, 0]


# ---- frequencies ----------------------------------------------------------
def test_plain_frequencies():
    frequencies, factor = rope_frequencies(RopeConfig(theta=10_000.0), 8)
    assert frequencies == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert frequencies.dtype == np.float32
    assert factor == 1.0


def test_yarn_by_hand():
    # Corners: 128 ln(32768 / (32 * 2 pi)) / (2 ln 1e6) = 23.6, downwards 23; with 1 in place of 32, 39.7, upwards 40.
    frequencies, factor = rope_frequencies(YARN, 128)
    kept = frequencies / plain(1e6, 128)
    assert kept[:24] == pytest.approx(1.0)
    assert kept[40:] == pytest.approx(1 / 4)
    # At 31, 8/17 of the way: 8/17 of it stretched by 4 and 9/17 left alone.
    assert kept[31] == pytest.approx(2 / 17 + 9 / 17)
    assert kept[24] == pytest.approx(1 / 17 / 4 + 16 / 17)
    assert (np.diff(kept[23:41]) < 0).all()
    assert factor == pytest.approx(1.13863, abs=5e-6)


def test_yarn_without_rounding_its_corners():
    low, high = (128 * math.log(32_768 / (beta * 2 * math.pi)) / (2 * math.log(1e6)) for beta in (32, 1))
    config = RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_max_positions=32_768, truncate=False)
    ramp = (31 - low) / (high - low)
    assert rope_frequencies(config, 128)[0][31] == pytest.approx(plain(1e6, 128)[31] * (ramp / 4 + 1 - ramp))


def test_yarn_with_its_own_attention_factor():
    config = RopeConfig(scaling="yarn", factor=4.0, original_max_positions=32_768, attention_factor=1.5)
    assert rope_frequencies(config, 128)[1] == 1.5
    cos, sin = rope_tables(config, 128, jnp.arange(6)[None], jnp.dtype(jnp.float32))
    assert np.square(cos) + np.square(sin) == pytest.approx(1.5**2)


def test_llama3_by_hand():
    # Wavelengths of 2 pi and 4096 of 8192 positions: two turns, a third of the way from one turn to four.
    theta = (4096 / (2 * math.pi)) ** 2
    config = RopeConfig(theta=theta, scaling="llama3", factor=8.0, original_max_positions=8192)
    frequencies, factor = rope_frequencies(config, 4)
    assert frequencies == pytest.approx([1.0, 2 * math.pi / 4096 * (2 / 3 / 8 + 1 / 3)])
    assert factor == 1.0


def test_llama3_of_the_published_size():
    config = named("Llama-3.1-405B").rope
    frequencies, _ = rope_frequencies(config, 128)
    expected = []
    for f in plain(5e5, 128):
        wavelength = 2 * math.pi / f
        if wavelength > 8192 / 1:
            expected.append(f / 8)
        elif wavelength < 8192 / 4:
            expected.append(f)
        else:
            s = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - s) * f / 8 + s * f)
    assert frequencies == pytest.approx(expected, rel=1e-6)
    kept = frequencies / plain(5e5, 128)
    assert (kept.min(), kept.max()) == (pytest.approx(1 / 8), pytest.approx(1.0))


@pytest.mark.parametrize("scaling", ["yarn", "llama3"])
def test_a_factor_of_one_changes_nothing(scaling):
    config = RopeConfig(theta=1e6, scaling=scaling, factor=1.0, original_max_positions=512)
    frequencies, factor = rope_frequencies(config, 64)
    assert frequencies == pytest.approx(plain(1e6, 64))
    assert factor == 1.0


def test_scaling_without_its_numbers_is_refused():
    with pytest.raises(UserError, match="original_max_positions > 0"):
        RopeConfig(scaling="yarn", factor=4.0)
    with pytest.raises(UserError, match="factor >= 1"):
        RopeConfig(scaling="llama3", factor=0.5, original_max_positions=32)


# ---- rotation -------------------------------------------------------------
def test_a_rotation_by_hand():
    """Channel i turns with channel i + H/2, by position times frequency."""
    x = np.array([1.0, 0.0, 0.0, 2.0])
    config = RopeConfig(theta=10_000.0)  # 1 and 0.01 radians per position
    cos, sin = math.cos, math.sin
    assert at(x, 3, config) == pytest.approx([cos(3), -2 * sin(0.03), sin(3), 2 * cos(0.03)], abs=1e-6)
    assert (at(x, 0, config) == x).all()


def test_tables_broadcast_over_heads_and_take_the_type_asked_for():
    positions_BT = jnp.arange(10).reshape(2, 5)
    cos, sin = rope_tables(RopeConfig(), 8, positions_BT, jnp.dtype(jnp.bfloat16))
    assert cos.shape == sin.shape == (2, 5, 1, 4)
    assert cos.dtype == sin.dtype == jnp.bfloat16


def test_angles_are_float32_whatever_the_type_of_the_tables():
    """At position 100,000 bfloat16 could not tell neighbours apart."""
    far, next_to_it = (
        rope_tables(RopeConfig(), 8, jnp.full((1, 1), p), jnp.dtype(jnp.bfloat16))[0] for p in (10**5, 10**5 + 1)
    )
    assert not (far == next_to_it).all()


VECTORS = st.lists(st.floats(-2, 2, width=32), min_size=16, max_size=16).map(np.array)
SCALINGS = st.sampled_from([RopeConfig(), YARN, LLAMA3])
POSITIONS = st.integers(0, 400)


@settings(deadline=None, max_examples=40)
@given(x=VECTORS, position=POSITIONS, config=SCALINGS)
def test_lengths_of_pairs_are_kept(x, position, config):
    def lengths(v):
        return np.hypot(v[:8], v[8:])

    _, factor = rope_frequencies(config, 16)
    assert lengths(at(x, position, config)) == pytest.approx(factor * lengths(x), abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(q=VECTORS, k=VECTORS, first=POSITIONS, second=POSITIONS, shift=POSITIONS, config=SCALINGS)
def test_products_depend_on_distance_alone(q, k, first, second, shift, config):
    here = at(q, first, config) @ at(k, second, config)
    there = at(q, first + shift, config) @ at(k, second + shift, config)
    # An angle of 800 radians is known to 6e-5 in float32, and 16 products are at most 4 each (and the factor).
    assert here == pytest.approx(there, abs=16 * 4 * 1.3 * 2e-4)
