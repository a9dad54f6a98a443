"""Decode state as a value: it goes into `forward` and a new one comes out.

Keys and values of all rows lie in pages of a fixed number of positions, and each row has a table of its pages: so rows
grow, end and share beginnings without anything being moved (PagedAttention, arXiv 2309.06180). What a linear layer
remembers has one size for each row, and lies in a slot.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.quantization import nearest
from sharding.mesh import BATCH_AXES, platform
from sharding.rules import constrain, on_own_parts

KVType = Literal["same", "int8"]
"""How keys, values and latents are stored: in the type that the model computes in, or in 8 bits."""

Stored = tuple[Array, ...]
"""What one layer remembers, see `Cache`."""

NOWHERE = 2**30
"""Page of a token that is not kept."""

KEYS, PAIRS = ("batch", "kv_heads", None, "head_dim"), ("batch", None, "kv_heads", "head_dim")
"""Logical axes of pages that are of keys or of values, and of pages with both."""

LATENTS = ("batch", None, None, "head_dim")
"""Logical axes of pages of latents."""

SLOTS = (
    *2 * (("batch", None, "kv_heads", "head_dim"),),
    ("batch", None, "heads", "head_dim"),
    ("batch", "heads", None, "head_dim"),
)
"""Logical axes of what a linear layer remembers: inputs of three convolutions, and its memory."""

TOKENS, TABLE = ("batch", None), ("batch", None)
"""Logical axes of what is given for each token, and of the tables of pages."""


@struct.dataclass
class Cache:
    """What every layer remembers of B rows.

    layers: of each layer its arrays, never stacked (slicing a stack copies it): pages of keys and values, see
    `empty_layer`; or, in a linear layer, its convolutions' inputs and its memory, for each slot.
    lengths_B: positions filled in each row; the next token of row b goes to `lengths_B[b]`.
    table_BX: the pages of each row, in order, counted among those of its device. page: positions of each.
    slots_B: the slot of each row, counted likewise; None: row b has slot b.
    undecided: how many of the batch's tokens stand is told later, see `model.forward.settle`.
    """

    layers: tuple[tuple[Array, ...], ...]
    lengths_B: Int[Array, " B"]
    table_BX: Int[Array, "B X"]
    page: int = struct.field(pytree_node=False)
    slots_B: Int[Array, " B"] | None = None
    undecided: bool = struct.field(pytree_node=False, default=False)

    @property
    def capacity(self) -> int:
        """Positions that a row can hold (S)."""
        return self.table_BX.shape[1] * self.page


@struct.dataclass
class Paging:
    """Where the tokens of a batch go, and what their rows hold.

    index_BT: the position of each in its row; `capacity`, out of range, for padding. page_BT, offset_BT: where its keys
    and values are kept. reach_B: positions filled when this batch is. The rest is as in `Cache`.
    """

    index_BT: Int[Array, "B T"]
    page_BT: Int[Array, "B T"]
    offset_BT: Int[Array, "B T"]
    lengths_B: Int[Array, " B"]
    reach_B: Int[Array, " B"]
    table_BX: Int[Array, "B X"]
    slots_B: Int[Array, " B"] | None
    page: int = struct.field(pytree_node=False)
    undecided: bool = struct.field(pytree_node=False)


def page_size(capacity: int) -> int:
    """Positions of a page where a row has at most `capacity`: as many as a kernel likes, and no more than it needs."""
    return min(capacity, 128 if platform() == "tpu" else 64)


def empty_cache(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A cache of `rows` rows with room for `capacity` positions, nothing filled; row after row has its own pages."""
    page = page_size(capacity)
    count = -(-capacity // page)
    layers = tuple(empty_layer(config, layer, rows, rows * count, page, dtype) for layer in range(config.num_layers))
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    own_B = jnp.arange(rows, dtype=jnp.int32) % max(rows // shards, 1)
    table_BX = own_B[:, None] * count + jnp.arange(count, dtype=jnp.int32)
    return Cache(layers, jnp.zeros(rows, jnp.int32), table_BX, page)


def empty_layer(
    config: ModelConfig,
    layer: int,
    slots: int,
    pages: int,
    page: int,
    dtype: jnp.dtype,
    kv_type: KVType = "same",
) -> tuple[Array, ...]:
    """What layer `layer` remembers before the first token.

    Keys and values are `[pages, K, page, H]` each; for TPUs, whose kernel reads them so, `[pages, page, 2K, H]`
    together, those of each head one after the other. Latents are `[pages, 1, page, U+P]`. In 8 bits, scales
    `[pages, K, page, 1]` of each come behind them.
    """

    def empty(*shapes: tuple[int, ...]) -> tuple[Array, ...]:
        if kv_type == "same":
            return tuple(jnp.zeros(shape, dtype) for shape in shapes)
        values = tuple(jnp.zeros(shape, jnp.int8) for shape in shapes)
        return *values, *(jnp.zeros((*shape[:-1], 1), jnp.float32) for shape in shapes)

    linear, latent = config.linear, config.latent
    if config.attention_kind(layer) == "linear":
        past, N = linear.conv_kernel - 1, linear.num_value_heads
        keys = jnp.zeros((slots, past, linear.num_key_heads, linear.key_dim), dtype)
        values = jnp.zeros((slots, past, N, linear.value_dim), dtype)
        return keys, keys, values, jnp.zeros((slots, N, linear.key_dim, linear.value_dim), jnp.float32)
    if latent.kv_rank:
        return empty((pages, 1, page, latent.kv_rank + latent.rope_dim))
    K, H = config.num_kv_heads, config.head_dim
    if platform() == "tpu" and kv_type == "same":
        return empty((pages, page, 2 * K, H))
    return empty((pages, K, page, H), (pages, K, page, H))


def layer_axes(config: ModelConfig, layer: int, count: int) -> tuple[tuple[str | None, ...], ...]:
    """Logical axes of what `empty_layer` gives, which is `count` arrays."""
    if config.attention_kind(layer) == "linear":
        return SLOTS
    if config.latent.kv_rank:
        return (LATENTS,) * count
    return (PAIRS,) if count == 1 else (KEYS,) * count


def make_paging(cache: Cache, segments_BT: Int[Array, "B T"]) -> Paging:
    """Where the tokens of a batch go in the rows of `cache`; padding (segment 0) goes nowhere."""
    real_BT = segments_BT > 0
    count_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32)
    index_BT = jnp.where(real_BT, cache.lengths_B[:, None] + count_BT - 1, cache.capacity)
    page_BT = jnp.take_along_axis(cache.table_BX, index_BT // cache.page, axis=1, mode="fill", fill_value=NOWHERE)
    reach_B = cache.lengths_B + count_BT[:, -1]
    # Behind the barrier these are made once; inside each layer's loop over what it writes they would be made again.
    index_BT, page_BT, offset_BT, reach_B = jax.lax.optimization_barrier(
        (index_BT, page_BT, index_BT % cache.page, reach_B)
    )
    rest = cache.table_BX, cache.slots_B, cache.page, cache.undecided
    return Paging(index_BT, page_BT, offset_BT, cache.lengths_B, reach_B, *rest)


def write(stored: tuple[Array, ...], new: tuple[Float[Array, "B T K H"], ...], paging: Paging) -> tuple[Array, ...]:
    """Pages with `new` keys and values (or latents) written to them."""
    if len(stored) < len(new):  # keys and values of a head, one after the other
        both = jnp.stack(new, axis=3).reshape(*new[0].shape[:2], -1, new[0].shape[3])
        return (_write(stored[0], both, paging, PAIRS, heads_last=True),)
    axes = KEYS if len(new) == 2 else LATENTS
    if len(stored) > len(new):
        new = quantized(new)
    return tuple(_write(old, x, paging, axes, heads_last=False) for old, x in zip(stored, new, strict=True))


def quantized(new: tuple[Float[Array, "B T K H"], ...]) -> tuple[Array, ...]:
    """The nearest in 8 bits, each token's head having a scale of its own; the scales come last."""
    values, scales = zip(*(nearest(x.astype(jnp.float32), (-1,)) for x in new), strict=True)
    return *values, *scales


def taken(stored: tuple[Array, ...], pages_M: Int[Array, " M"], parts: int) -> list[Array]:
    """Of some pages what is stored in `parts` arrays, or in as many of 8 bits with their scales."""
    found = [jnp.take(x, pages_M, axis=0, mode="clip") for x in stored]
    if len(stored) == parts:
        return found
    return [x.astype(jnp.float32) * scale for x, scale in zip(found[:parts], found[parts:], strict=True)]


def _write(pages: Array, new_BTKH: Array, paging: Paging, axes: tuple, *, heads_last: bool) -> Array:
    def local(pages: Array, new_BTKH: Array, page_BT: Array, offset_BT: Array) -> Array:
        new_BTKH = new_BTKH.astype(pages.dtype)
        if page_BT.size == 1:
            # XLA makes a slice update of a single write, and copies the whole cache around it; two it does in place.
            page_BT = jnp.concatenate([page_BT, jnp.full_like(page_BT, NOWHERE)], axis=1)
            offset_BT, new_BTKH = (jnp.concatenate([x, x], axis=1) for x in (offset_BT, new_BTKH))
        if heads_last:
            return pages.at[page_BT, offset_BT].set(new_BTKH, mode="drop")
        return pages.at[page_BT, :, offset_BT].set(new_BTKH, mode="drop")

    args = (pages, new_BTKH, paging.page_BT, paging.offset_BT)
    tokens = (*TOKENS, axes[2 if heads_last else 1], "head_dim")
    found = on_own_parts(local, args, (axes, tokens, TOKENS, TOKENS), axes)
    if found is None:
        raise ValueError(f"{[arg.shape for arg in args]} do not divide over the mesh in force")
    return found


def take_slots(stored: tuple[Array, ...], paging: Paging) -> tuple[Array, ...]:
    """What a linear layer remembers of each row of the batch: nothing of one that begins with it."""
    if paging.slots_B is None:
        return stored

    def local(x: Array, slots_B: Array, lengths_B: Array) -> Array:
        begun_B = (lengths_B > 0).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(begun_B, jnp.take(x, slots_B, axis=0, mode="clip"), 0)

    def one(x: Array, own: tuple[str | None, ...]) -> Array:
        args = (x, paging.slots_B, paging.lengths_B)
        found = on_own_parts(local, args, (own, ("batch",), ("batch",)), own)
        assert found is not None, "rows and slots divide over the mesh"
        return found

    return tuple(one(x, own) for x, own in zip(stored, SLOTS, strict=True))


def put_slots(
    stored: tuple[Array, ...], new: tuple[Array, ...], slots_B: Array | None, grown_B: Array
) -> tuple[Array, ...]:
    """`stored` with what the rows of the batch leave behind; rows that have not grown leave it as it is."""
    if slots_B is None:
        return new

    def local(x: Array, new: Array, slots_B: Array, grown_B: Array) -> Array:
        return x.at[jnp.where(grown_B, slots_B, NOWHERE)].set(new.astype(x.dtype), mode="drop")

    def one(x: Array, new: Array, own: tuple[str | None, ...]) -> Array:
        args = (x, new, slots_B, grown_B)
        found = on_own_parts(local, args, (own, own, ("batch",), ("batch",)), own)
        assert found is not None, "rows and slots divide over the mesh"
        return found

    return tuple(one(x, y, own) for x, y, own in zip(stored, new, SLOTS, strict=True))


def lay_out(config: ModelConfig, layers: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
    """Layers spread over the mesh in force in the same way after every step, so that they can be donated."""
    return tuple(
        tuple(
            constrain(array, *axes) for array, axes in zip(arrays, layer_axes(config, layer, len(arrays)), strict=True)
        )
        for layer, arrays in enumerate(layers)
    )
