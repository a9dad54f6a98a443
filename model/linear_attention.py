"""Gated DeltaNet (arXiv 2412.06464): attention whose memory is a matrix per head, of fixed size.

For each value head, with decay `exp(g_t)`, write strength `beta_t` and unit-length keys and queries:

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = S_t^T q_t

`chunked` computes it for many tokens, 64 at a time as matrix products; `recurrent` for one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.layers import Keys, RMSNorm, weight
from model.linear import Matmul, linear, merge_heads
from sharding.context_parallel import context_shards, from_previous, incoming_state
from sharding.rules import constrain

CHUNK = 64
"""Tokens whose mutual influence is solved at once."""

State = tuple[Array, ...]
"""Of a row: the last W - 1 inputs of the convolution over queries, keys and values, and the memory."""


def chunked(
    q_BTKH: Float[Array, "B T K H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTNI: Float[Array, "B T N I"],
    g_BTN: Float[Array, "B T N"],
    beta_BTN: Float[Array, "B T N"],
    documents_BT: Int[Array, "B T"],
    state_BNHI: Float[Array, "B N H I"],
) -> tuple[Float[Array, "B T N I"], Float[Array, "B N H I"]]:
    """Outputs and the memory after the last token; float32.

    The memory that comes in belongs to document 0; where sequences are cut over devices it is that of the device
    before, and `state` is not looked at. `documents` never decrease along a row; a token sees those of its own document
    alone. A token with `g = beta = 0` leaves the memory as it is.

    Within a chunk the writes depend on each other; in matrix form they solve a unit lower triangular system
    (arXiv 2406.06484, section 3.2, with the decay of 2412.06464, section 3.3).
    """
    length = q_BTKH.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    batch, _, key_heads, _ = q_BTKH.shape
    heads = v_BTNI.shape[2]
    groups = heads // key_heads
    count = -(-length // size)
    padding = count * size - length

    def split(x: Array) -> Array:
        """`[B, T, heads, ...]` to `[chunks, B, heads, size, ...]`; padded tokens are zero."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), (1, 3), (0, 2))

    q, k, v = split(q_BTKH), split(k_BTKH), split(v_BTNI)
    g, beta = split(g_BTN), split(beta_BTN)
    documents = jnp.pad(documents_BT, ((0, 0), (0, padding)), mode="edge").reshape(batch, count, size).swapaxes(0, 1)
    cut = context_shards() > 1
    first = from_previous(documents_BT[:, -1:]) if cut else jnp.zeros((batch, 1), documents.dtype)
    before = jnp.concatenate([first[None, :, 0], documents[:-1, :, -1]])
    continues = (documents == before[..., None])[:, :, None]  # [chunks, B, 1, size]: sees the memory that comes in

    same = (documents[..., :, None] == documents[..., None, :])[:, :, None] & jnp.tri(size, dtype=bool)
    total, decay = decays(g, same)

    def per_value_head(x: Array) -> Array:
        return x if groups == 1 else jnp.repeat(x, groups, axis=2)

    kk = per_value_head(jnp.einsum("cbkih,cbkjh->cbkij", k, k))
    qk = per_value_head(jnp.einsum("cbkih,cbkjh->cbkij", q, k)) * decay
    k, q = per_value_head(k), per_value_head(q)
    system = jnp.where(jnp.tri(size, k=-1, dtype=bool), beta[..., None] * kk * decay, 0.0)
    from_state = jnp.where(continues, jnp.exp(total), 0.0)[..., None]
    right = jnp.concatenate([v, k * from_state], axis=-1) * beta[..., None]
    solved = solve_unit_lower(system, right)
    writes, reads = jnp.split(solved, [v.shape[-1]], axis=-1)
    q_state = q * from_state
    k_end = k * decay[..., -1, :, None]
    kept = from_state[..., -1, :][..., None]

    def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        writes, reads, qk, q_state, k_end, kept = inputs
        new = writes - reads @ state
        out = q_state @ state + qk @ new
        return state * kept + jnp.swapaxes(k_end, -1, -2) @ new, out

    if cut:
        state_BNHI = incoming_state(*_summary(writes, reads, k_end, kept))
    state_BNHI, out = jax.lax.scan(step, state_BNHI, (writes, reads, qk, q_state, k_end, kept))
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, count * size, heads, -1)
    return out[:, :length], state_BNHI


def decays(g: Float[Array, "*B T"], same: Array) -> tuple[Float[Array, "*B T"], Float[Array, "*B T T"]]:
    """The sum of g over a token's document up to it, and `exp` of the sum between two tokens, 0 if not `same`.

    Args:
        same: `[..., T, T]`, whether j is of i's document and not after it.
    """
    # Summed over the document alone: in a sum over all, what other documents add cancels but for rounding.
    total = jnp.einsum("...j,...ij->...i", g, jnp.broadcast_to(same, (*g.shape, g.shape[-1])).astype(g.dtype))
    return total, _decay(g, same)


@jax.custom_vjp
def _decay(g: Array, same: Array) -> Array:
    """`exp(sum of g[k] for j < k <= i)` for the pairs that are `same`.

    Each sum is made of its own terms (Mamba-2's segsum, arXiv 2405.21060, listing 1), and the gradient is written out:
    as differences of two sums both would cancel, and lose up to three digits.
    """
    return _decay_forward(g, same)[0]


def _decay_forward(g: Array, same: Array) -> tuple[Array, Array]:
    size = g.shape[-1]
    terms = jnp.where(jnp.tri(size, k=-1, dtype=bool), g[..., :, None], 0.0)
    between = jnp.tri(size, dtype=g.dtype) @ terms
    decay = jnp.where(same, jnp.exp(jnp.where(same, between, 0.0)), 0.0)
    return decay, decay


def _decay_backward(decay: Array, d_decay: Array) -> tuple[Array, None]:
    size = decay.shape[-1]
    through = jnp.triu(jnp.ones((size, size), decay.dtype)) @ (d_decay * decay)  # summed over i >= k
    return jnp.sum(jnp.tril(through, -1), axis=-1), None


_decay.defvjp(_decay_forward, _decay_backward)


def _summary(writes: Array, reads: Array, k_end: Array, kept: Array) -> tuple[Array, Array]:
    """`[B, N, H, H]` and `[B, N, H, I]`: the chunks of `chunked` make `transition @ S + update` of any memory S."""
    batch, heads, _, width = k_end.shape[1:]

    def step(carry: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        (transition, update), (writes, reads, k_end, kept) = carry, inputs
        k_end = jnp.swapaxes(k_end, -1, -2)
        update = update * kept + k_end @ (writes - reads @ update)
        return (transition * kept - k_end @ (reads @ transition), update), None

    identity = jnp.broadcast_to(jnp.eye(width, dtype=k_end.dtype), (batch, heads, width, width))
    nothing = jnp.zeros((batch, heads, width, writes.shape[-1]), writes.dtype)
    return jax.lax.scan(step, (identity, nothing), (writes, reads, k_end, kept))[0]


@jax.custom_vjp
def solve_unit_lower(strict: Float[Array, "*B T T"], right: Float[Array, "*B T X"]) -> Float[Array, "*B T X"]:
    """The solution Y of `(1 + strict) Y = right` for strictly lower triangular matrices; T is a power of two.

    By matrix products alone, which every backend does well in batches.
    """
    return inverse_unit_lower(strict) @ right


def inverse_unit_lower(strict: Array) -> Array:
    """The inverse of `1 + strict`. Diagonal blocks of twice the size are put together at each level:
    `[[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]`, which is as stable as forward substitution."""
    size = strict.shape[-1]
    inverses = jnp.ones((*strict.shape[:-2], size, 1, 1), strict.dtype)
    width = 1
    while width < size:
        count = size // (2 * width)
        blocks = strict.reshape(*strict.shape[:-2], count, 2 * width, count, 2 * width)
        corner = jnp.einsum("...iaib->...iab", blocks)[..., width:, :width]
        pairs = inverses.reshape(*strict.shape[:-2], count, 2, width, width)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        below = -small_product(small_product(second, corner), first)
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverses = jnp.concatenate([above, jnp.concatenate([below, second], axis=-1)], axis=-2)
        width *= 2
    return inverses[..., 0, :, :]


def small_product(x: Array, y: Array) -> Array:
    """`x @ y`; of tiny matrices element by element, since a call for each would cost more than the work."""
    return x @ y if x.shape[-1] > 4 else (x[..., :, :, None] * y[..., None, :, :]).sum(-2)


def _solve_forward(strict: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = inverse_unit_lower(strict)
    solved = inverse @ right
    return solved, (inverse, solved)


def _solve_backward(saved: tuple[Array, Array], d_solved: Array) -> tuple[Array, Array]:
    inverse, solved = saved
    d_right = jnp.swapaxes(inverse, -1, -2) @ d_solved
    return jnp.tril(-d_right @ jnp.swapaxes(solved, -1, -2), -1), d_right


solve_unit_lower.defvjp(_solve_forward, _solve_backward)


def recurrent(
    q_BKH: Float[Array, "B K H"],
    k_BKH: Float[Array, "B K H"],
    v_BNI: Float[Array, "B N I"],
    g_BN: Float[Array, "B N"],
    beta_BN: Float[Array, "B N"],
    state_BNHI: Float[Array, "B N H I"],
) -> tuple[Float[Array, "B N I"], Float[Array, "B N H I"]]:
    """One token: its output and the memory after it; float32."""
    groups = v_BNI.shape[1] // k_BKH.shape[1]
    q_BNH, k_BNH = (jnp.repeat(x, groups, axis=1) for x in (q_BKH, k_BKH))
    state_BNHI = state_BNHI * jnp.exp(g_BN)[..., None, None]
    known_BNI = jnp.einsum("bnhi,bnh->bni", state_BNHI, k_BNH)
    change_BNI = (v_BNI - known_BNI) * beta_BN[..., None]
    state_BNHI = state_BNHI + k_BNH[..., None] * change_BNI[..., None, :]
    return jnp.einsum("bnhi,bnh->bni", state_BNHI, q_BNH), state_BNHI


def unit_length(x: Array) -> Array:
    """`x` in float32 with its last axis scaled to length one."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def causal_convolution(
    x_BTNH: Float[Array, "B T N H"],
    weight_WNH: Float[Array, "W N H"],
    stored_BWNH: Float[Array, "B W-1 N H"] | None,
    documents_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T+W-1 N H"]]:
    """SiLU of the weighted sum of each channel's last W positions in its document; and the inputs it ran over.

    What is `stored` came before, in document 0; without it there is nothing, or what the device before has.
    """
    batch, taps = len(documents_BT), weight_WNH.shape[0]
    documents_BL = jnp.pad(documents_BT, ((0, 0), (taps - 1, 0)))
    if stored_BWNH is None and context_shards() > 1:
        stored_BWNH, before = (from_previous(a[:, a.shape[1] - taps + 1 :]) for a in (x_BTNH, documents_BT))
        documents_BL = jnp.concatenate([before, documents_BT], axis=1)
    elif stored_BWNH is None:
        stored_BWNH = jnp.zeros((batch, taps - 1, *x_BTNH.shape[2:]), x_BTNH.dtype)
    inputs = jnp.concatenate([stored_BWNH.astype(x_BTNH.dtype), x_BTNH], axis=1)
    return convolve(inputs, weight_WNH, documents_BL), inputs


@jax.custom_vjp
def convolve(
    inputs: Float[Array, "B L N H"], weight_WNH: Float[Array, "W N H"], documents_BL: Int[Array, "B L"]
) -> Float[Array, "B T N H"]:
    """SiLU of `sum_w weight[w] * inputs[t + w]` over those of the W inputs that are of the last one's document.

    L = T + W - 1. The gradient is written out: what jax derives of slices and sums takes ten times as long on a CPU.
    """
    return _convolve_forward(inputs, weight_WNH, documents_BL)[0]


def _seen(inputs: Array, documents_BL: Array, tap: int, taps: int) -> Array:
    """For each output its input at `tap`, or zero where that is of another document."""
    length = inputs.shape[1] - taps + 1
    same_BT = documents_BL[:, tap : tap + length] == documents_BL[:, taps - 1 :]
    return jnp.where(same_BT[..., None, None], inputs[:, tap : tap + length], 0)


def _convolve_forward(inputs: Array, weight_WNH: Array, documents_BL: Array) -> tuple[Array, tuple[Array, ...]]:
    taps = weight_WNH.shape[0]
    y_BTNH = _seen(inputs, documents_BL, taps - 1, taps) * weight_WNH[-1]
    for tap in range(taps - 1):
        y_BTNH += _seen(inputs, documents_BL, tap, taps) * weight_WNH[tap]
    return jax.nn.silu(y_BTNH), (inputs, weight_WNH, documents_BL, y_BTNH)


def _convolve_backward(saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, None]:
    inputs, weight_WNH, documents_BL, y_BTNH = saved
    taps, length = weight_WNH.shape[0], inputs.shape[1]
    (dy_BTNH,) = jax.vjp(jax.nn.silu, y_BTNH)[1](d_out)
    rows = dy_BTNH.shape[0] * dy_BTNH.shape[1]
    # With outputs padded on both sides, input i gives to output i - tap, which lies at i - tap + taps - 1.
    outer = ((0, 0), (taps - 1, taps - 1))
    dy = jnp.pad(dy_BTNH, (*outer, (0, 0), (0, 0)))
    documents = jnp.pad(documents_BL[:, taps - 1 :], outer, constant_values=-1)
    d_inputs, d_weight = jnp.zeros_like(inputs), []
    for tap in range(taps):
        at = slice(taps - 1 - tap, taps - 1 - tap + length)
        same_BL = documents[:, at] == documents_BL
        d_inputs += jnp.where(same_BL[..., None, None], dy[:, at], 0) * weight_WNH[tap]
        product = _seen(inputs, documents_BL, tap, taps) * dy_BTNH
        # A sum over rows as a product with ones: plainly, each channel would be gathered from all of memory.
        d_weight.append(jnp.ones(rows, product.dtype) @ product.reshape(rows, -1))
    return d_inputs, jnp.stack(d_weight).reshape(weight_WNH.shape), None


convolve.defvjp(_convolve_forward, _convolve_backward)


class GatedDeltaNet(nnx.Module):
    """Projections, short convolutions, the memory, and the gated way back into the residual stream."""

    def __init__(self, config: ModelConfig, keys: Keys):
        linear, D = config.linear, config.hidden_size
        K, N, H, I = linear.num_key_heads, linear.num_value_heads, linear.key_dim, linear.value_dim
        W = linear.conv_kernel
        key, value = ("kv_heads", "head_dim"), ("heads", "head_dim")
        self.q_DKH = weight(keys, (D, K, H), ("embed", *key), D, sums=(0,))
        self.k_DKH = weight(keys, (D, K, H), ("embed", *key), D, sums=(0,))
        self.v_DNI = weight(keys, (D, N, I), ("embed", *value), D, sums=(0,))
        self.gate_DNI = weight(keys, (D, N, I), ("embed", *value), D, sums=(0,))
        self.beta_DN = weight(keys, (D, N), ("embed", "heads"), D)
        self.decay_DN = weight(keys, (D, N), ("embed", "heads"), D)
        self.q_conv_WKH = weight(keys, (W, K, H), (None, *key), W)
        self.k_conv_WKH = weight(keys, (W, K, H), (None, *key), W)
        self.v_conv_WNI = weight(keys, (W, N, I), (None, *value), W)
        log_rate = jnp.log(jax.random.uniform(keys(), (N,), jnp.float32, 0.01, 16.0))
        self.log_rate_N = nnx.Param(log_rate, axes=("heads",))
        self.decay_bias_N = nnx.Param(jnp.ones(N, jnp.float32), axes=("heads",))
        self.norm = RMSNorm(I, config.norm_eps)
        self.o_NID = weight(keys, (N, I, D), (*value, "embed"), N * I, residual_layers=config.num_layers, sums=(0, 1))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        valid_BT: Array,
        documents_BT: Int[Array, "B T"],
        stored: State | None,
        matmul: Matmul = "plain",
        *,
        undecided: bool = False,
    ) -> tuple[Float[Array, "B T D"], State | None]:
        """The output and, with a `stored` state, the state after this batch; padding leaves it untouched.

        Of a batch that is `undecided` it gives instead what `settle` needs, which then makes the state.
        """
        dtype, float32 = x_BTD.dtype, jnp.float32
        x_BTD = jnp.where(valid_BT[..., None], x_BTD, 0)

        def project(weight: nnx.Param, heads: str) -> Array:
            return constrain(linear(x_BTD, weight[...], matmul), "batch", "length", heads, "head_dim")

        mixed, inputs = [], []
        parts = (
            (self.q_DKH, self.q_conv_WKH, "kv_heads"),
            (self.k_DKH, self.k_conv_WKH, "kv_heads"),
            (self.v_DNI, self.v_conv_WNI, "heads"),
        )
        for index, (projection, taps, heads) in enumerate(parts):
            past = None if stored is None else stored[index]
            y, seen = causal_convolution(project(projection, heads), taps[...].astype(dtype), past, documents_BT)
            mixed.append(y)
            inputs.append(seen)
        q_BTKH, k_BTKH, v_BTNI = unit_length(mixed[0]), unit_length(mixed[1]), mixed[2].astype(float32)
        q_BTKH = q_BTKH * q_BTKH.shape[-1] ** -0.5
        valid_BT1 = valid_BT[..., None]
        beta_BTN = jax.nn.sigmoid((x_BTD @ self.beta_DN[...].astype(dtype)).astype(float32)) * valid_BT1
        step_BTN = (x_BTD @ self.decay_DN[...].astype(dtype)).astype(float32) + self.decay_bias_N[...].astype(float32)
        g_BTN = -jnp.exp(self.log_rate_N[...].astype(float32)) * jax.nn.softplus(step_BTN) * valid_BT1

        batch, _, heads, width = v_BTNI.shape
        memory = jnp.zeros((batch, heads, k_BTKH.shape[-1], width), float32) if stored is None else stored[3]
        to_settle = (*inputs, k_BTKH, v_BTNI, g_BTN, beta_BTN, memory)
        with jax.named_scope("delta_rule"):
            if x_BTD.shape[1] == 1 and stored is not None:
                q, k, v, g, beta = (x[:, 0] for x in (q_BTKH, k_BTKH, v_BTNI, g_BTN, beta_BTN))
                out_BNI, memory = recurrent(q, k, v, g, beta, memory)
                out_BTNI = out_BNI[:, None]
            else:
                out_BTNI, memory = chunked(q_BTKH, k_BTKH, v_BTNI, g_BTN, beta_BTN, documents_BT, memory)
        gate_BTNI = project(self.gate_DNI, "heads").astype(float32)
        out_BTNI = (self.norm(out_BTNI.astype(dtype)) * jax.nn.silu(gate_BTNI)).astype(dtype)
        out_BTNI = constrain(out_BTNI, "batch", "length", "heads", "head_dim")
        out_BTD = merge_heads(out_BTNI, self.o_NID[...], matmul)
        if stored is None or undecided:
            return out_BTD, to_settle if undecided else None
        lengths_B = valid_BT.sum(axis=1, dtype=jnp.int32)
        conv = [last_inputs(seen, lengths_B, seen.shape[1] - x_BTD.shape[1]) for seen in inputs]
        return out_BTD, (conv[0], conv[1], conv[2], memory)


def settle(undecided: State, kept_B: Int[Array, " B"]) -> State:
    """The state after the first `kept` tokens of a batch that was read `undecided`; no weights are needed for that."""
    *inputs, k_BTKH, v_BTNI, g_BTN, beta_BTN, memory = undecided
    length = k_BTKH.shape[1]
    kept_BT1 = (jnp.arange(length) < kept_B[:, None])[..., None]
    documents_BT = jnp.zeros(k_BTKH.shape[:2], jnp.int32)
    _, memory = chunked(k_BTKH, k_BTKH, v_BTNI, g_BTN * kept_BT1, beta_BTN * kept_BT1, documents_BT, memory)
    conv = [last_inputs(seen, kept_B, seen.shape[1] - length) for seen in inputs]
    return conv[0], conv[1], conv[2], memory


def last_inputs(inputs: Array, lengths_B: Int[Array, " B"], count: int) -> Array:
    """The last `count` inputs of each row up to its length; the row's tokens come after `count` older ones."""
    index = lengths_B[:, None] + jnp.arange(count)
    return jnp.take_along_axis(inputs, index.reshape(*index.shape, *[1] * (inputs.ndim - 2)), axis=1)
