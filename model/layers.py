"""The small parts: normalisation, rotary positions, embedding, gated feed-forward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import RopeConfig
from model.linear import Matmul, linear
from sharding.rules import constrain


class Keys:
    """Random keys, another with each call: key n is `fold_in(key, n)`.

    In the place of `nnx.Rngs`, whose counter is a variable: traced, it costs more than all else of making a model.
    """

    def __init__(self, key: Array):
        self.key, self.count = key, 0

    def __call__(self) -> Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def weight(
    keys: Keys,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    fan_in: int,
    *,
    residual_layers: int = 0,
    sums: tuple[int, ...] = (),
) -> nnx.Param:
    """A float32 weight drawn from a normal of variance 1/fan_in, truncated at two deviations.

    A weight that writes into the residual stream of a model of `residual_layers` layers is made smaller by
    sqrt(2 * layers), so that the stream's variance does not grow with depth (GPT-2).

    Args:
        sums: dimensions that products sum over, of a weight that these can take in 8 bits.
    """
    deviation = 1.0 / math.sqrt(fan_in * max(1, 2 * residual_layers))
    init = jax.nn.initializers.truncated_normal(deviation)
    return nnx.Param(init(keys(), shape, jnp.float32), axes=axes, sums=sums)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), statistics in float32.

    kind: how the weight is applied, as `ModelConfig.norm` explains.
    """

    def __init__(self, size: int, eps: float, kind: str = "cast"):
        initial = jnp.zeros if kind == "zero_centred" else jnp.ones
        self.weight = nnx.Param(initial(size, jnp.float32), axes=(None,))
        self.eps, self.kind = eps, kind

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        scaled = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...]
        if self.kind == "cast":
            return scaled.astype(x.dtype) * weight.astype(x.dtype)
        weight = weight.astype(jnp.float32)
        return (scaled * (1.0 + weight if self.kind == "zero_centred" else weight)).astype(x.dtype)


def rope_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies `[H/2]` (radians per position, float32) and the factor on cos and sin.

    YaRN: arXiv 2309.00071, section 3.2 and equation 22 for the factor. Llama 3: the scaling of its
    reference implementation, linear in the inverse wavelength between two corners.
    """
    half = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = 1.0 / config.theta**half
    if config.scaling == "yarn":

        def corner(rotations: float) -> float:
            wanted = config.original_max_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(wanted) / (2 * math.log(config.theta))

        low, high = corner(config.beta_fast), corner(config.beta_slow)
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        scaled = plain / config.factor * ramp + plain * (1 - ramp)
        return scaled.astype(np.float32), config.attention_factor or 0.1 * math.log(config.factor) + 1.0
    if config.scaling == "llama3":
        original, low, high = config.original_max_positions, config.low_freq_factor, config.high_freq_factor
        turns = original * plain / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - smooth) * plain / config.factor + smooth * plain).astype(np.float32), 1.0
    return plain.astype(np.float32), 1.0


def rope_tables(
    config: RopeConfig, rotary_dim: int, positions_BT: Int[Array, "B T"], dtype: jnp.dtype
) -> tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]:
    """cos and sin of every position and frequency, computed in float32, broadcast over heads."""
    frequencies, factor = rope_frequencies(config, rotary_dim)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotary embedding (arXiv 2104.09864) of pairs (i, i + P/2) of the first P channels, which the tables are for."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, hidden: int, layers: int, keys: Keys):
        self.gate_DF = weight(keys, (width, hidden), ("embed", "mlp"), width, sums=(0,))
        self.up_DF = weight(keys, (width, hidden), ("embed", "mlp"), width, sums=(0,))
        self.down_FD = weight(keys, (hidden, width), ("mlp", "embed"), hidden, residual_layers=layers, sums=(0,))

    def __call__(self, x_BTD: Float[Array, "B T D"], matmul: Matmul = "plain") -> Float[Array, "B T D"]:
        gate_BTF = linear(x_BTD, self.gate_DF[...], matmul)
        up_BTF = linear(x_BTD, self.up_DF[...], matmul)
        hidden_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, "batch", "length", "mlp")
        return linear(hidden_BTF, self.down_FD[...], matmul)
