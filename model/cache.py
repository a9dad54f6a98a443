"""Decode state as a value: it goes into `forward` and a new one comes out.

Keys and values of all rows lie in pages of a fixed number of positions, and each row has a table of its pages: so rows
grow, end and share beginnings without anything being moved. What a linear layer remembers has one size for each row.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from sharding.mesh import BATCH_AXES, platform
from sharding.rules import on_own_parts

PAGE_SIZES = (128, 64)
"""Positions of a page on TPUs: the first that divides a capacity, or else a row is one page; as it is elsewhere."""

KEYS, PAIRS, TABLE = ("batch", "kv_heads", None, "head_dim"), ("batch", None, "kv_heads", "head_dim"), ("batch", None)
"""Logical axes of pages that are of keys or of values, of pages with both, and of what each row has a number of."""


@struct.dataclass
class Cache:
    """What every layer remembers of B rows.

    layers: of each layer its arrays, never stacked (slicing a stack copies it): pages of keys and values, see
    `empty_layer`; or, in a linear layer, its convolutions' inputs and its memory, for each row.
    lengths_B: positions filled in each row; the next token of row b goes to `lengths_B[b]`.
    table_BX: the pages of each row, in order, counted among those of its device. page: positions of each.
    in_order: page b is that of row b, which has no other: nothing is copied to read it.
    empty: nothing was written yet, so that the first batch has only itself to attend to.
    """

    layers: tuple[tuple[Array, ...], ...]
    lengths_B: Int[Array, " B"]
    table_BX: Int[Array, "B X"]
    page: int = struct.field(pytree_node=False)
    in_order: bool = struct.field(pytree_node=False, default=False)
    empty: bool = struct.field(pytree_node=False, default=False)

    @property
    def capacity(self) -> int:
        """Positions that a row can hold (S)."""
        return self.table_BX.shape[1] * self.page


@struct.dataclass
class Paging:
    """Where the tokens of a batch go, and what their rows hold.

    index_BT: the position of each in its row; `capacity`, out of range, for padding. The rest is as in `Cache`.
    """

    index_BT: Int[Array, "B T"]
    lengths_B: Int[Array, " B"]
    table_BX: Int[Array, "B X"]
    page: int = struct.field(pytree_node=False)
    in_order: bool = struct.field(pytree_node=False, default=False)


def empty_cache(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A cache of `rows` rows with room for `capacity` positions, nothing filled; row after row has its own pages."""
    sizes = PAGE_SIZES if platform() == "tpu" else ()
    page = next((size for size in sizes if capacity % size == 0), capacity)
    count = capacity // page
    layers = tuple(empty_layer(config, layer, rows, rows * count, page, dtype) for layer in range(config.num_layers))
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    own_B = jnp.arange(rows, dtype=jnp.int32) % max(rows // shards, 1)
    table_BX = own_B[:, None] * count + jnp.arange(count, dtype=jnp.int32)
    return Cache(layers, jnp.zeros(rows, jnp.int32), table_BX, page, in_order=count == 1, empty=True)


def empty_layer(
    config: ModelConfig, layer: int, rows: int, pages: int, page: int, dtype: jnp.dtype
) -> tuple[Array, ...]:
    """What layer `layer` remembers before the first token.

    Keys and values are `[pages, K, page, H]` each; for TPUs, whose kernel reads them so, `[pages, page, 2K, H]`
    together, those of each head one after the other. Latents are `[pages, 1, page, U+P]`.
    """
    linear, latent = config.linear, config.latent
    if config.attention_kind(layer) == "linear":
        past, N = linear.conv_kernel - 1, linear.num_value_heads
        keys = jnp.zeros((rows, past, linear.num_key_heads, linear.key_dim), dtype)
        values = jnp.zeros((rows, past, N, linear.value_dim), dtype)
        return keys, keys, values, jnp.zeros((rows, N, linear.key_dim, linear.value_dim), jnp.float32)
    if latent.kv_rank:
        return (jnp.zeros((pages, 1, page, latent.kv_rank + latent.rope_dim), dtype),)
    K, H = config.num_kv_heads, config.head_dim
    if platform() == "tpu":
        return (jnp.zeros((pages, page, 2 * K, H), dtype),)
    empty = jnp.zeros((pages, K, page, H), dtype)
    return empty, empty


def layer_axes(config: ModelConfig, layer: int) -> tuple[tuple[str | None, ...], ...]:
    """Logical axes of what `empty_layer` gives."""
    if config.attention_kind(layer) == "linear":
        keys, values = ("batch", None, "kv_heads", "head_dim"), ("batch", None, "heads", "head_dim")
        return keys, keys, values, ("batch", "heads", None, "head_dim")
    if config.latent.kv_rank:
        return (("batch", None, None, "head_dim"),)
    return (PAIRS,) if platform() == "tpu" else (KEYS, KEYS)


def write_positions(lengths_B: Array, segments_BT: Array, capacity: int) -> Int[Array, "B T"]:
    """Where each new token goes in its row; padding (segment 0) gets `capacity`, out of range, and is dropped."""
    real_BT = segments_BT > 0
    index_BT = lengths_B[:, None] + jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
    return jnp.where(real_BT, index_BT, capacity)


def write(
    stored: tuple[Array, ...], new: tuple[Float[Array, "B T K H"], ...], paging: Paging
) -> tuple[Float[Array, "P K page H"], ...]:
    """Pages with `new` keys and values (or latents) written to them."""
    if len(stored) < len(new):  # keys and values of a head, one after the other
        both = jnp.stack(new, axis=3).reshape(*new[0].shape[:2], -1, new[0].shape[3])
        return (_write(stored[0], both, paging, PAIRS, heads_last=True),)
    heads = "kv_heads" if len(new) == 2 else None
    axes = ("batch", heads, None, "head_dim")
    return tuple(_write(old, x, paging, axes, heads_last=False) for old, x in zip(stored, new, strict=True))


def _write(pages: Array, new_BTKH: Array, paging: Paging, axes: tuple, *, heads_last: bool) -> Array:
    def local(pages: Array, new_BTKH: Array, index_BT: Array, table_BX: Array) -> Array:
        page = paging.page
        if index_BT.size == 1:
            # XLA makes a slice update of a single write, and copies the whole cache around it; two it does in place.
            index_BT = jnp.concatenate([index_BT, jnp.full_like(index_BT, table_BX.shape[1] * page)], axis=1)
            new_BTKH = jnp.concatenate([new_BTKH, new_BTKH], axis=1)
        if paging.in_order and not heads_last:  # what is looked up in a table is written twice as slowly on a CPU
            rows_B1 = jnp.arange(len(pages))[:, None]
            return pages.at[rows_B1, :, index_BT].set(new_BTKH.astype(pages.dtype), mode="drop")
        page_BT = jnp.take_along_axis(table_BX, index_BT // page, axis=1, mode="fill", fill_value=len(pages))
        new_BTKH = new_BTKH.astype(pages.dtype)
        if heads_last:
            return pages.at[page_BT, index_BT % page].set(new_BTKH, mode="drop")
        return pages.at[page_BT, :, index_BT % page].set(new_BTKH, mode="drop")

    args, tokens = (pages, new_BTKH, paging.index_BT, paging.table_BX), ("batch", None, axes[2 if heads_last else 1])
    return _on_own_pages(local, args, (axes, (*tokens, "head_dim"), TABLE, TABLE), axes)


def read(pages: Float[Array, "P K page H"], paging: Paging, heads: str | None) -> Float[Array, "B K S H"]:
    """All positions of each row, whether filled or not, copied from its pages."""
    if paging.in_order:
        return pages

    def local(pages: Array, table_BX: Array) -> Array:
        x = jnp.take(pages, table_BX, axis=0, mode="clip").swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    axes = ("batch", heads, None, "head_dim")
    return _on_own_pages(local, (pages, paging.table_BX), (axes, TABLE), axes)


def read_pairs(pages: Float[Array, "P page 2K H"], paging: Paging) -> tuple[Array, Array]:
    """`read` of pages with keys and values: keys, and values, `[B, K, S, H]`."""

    def local(which: int, pages: Array, table_BX: Array) -> Array:
        x = jnp.take(pages[:, :, which::2], table_BX, axis=0, mode="clip")
        return x.reshape(len(x), -1, *x.shape[3:]).swapaxes(1, 2)

    keys, values = (
        _on_own_pages(partial(local, which), (pages, paging.table_BX), (PAIRS, TABLE), KEYS) for which in (0, 1)
    )
    return keys, values


def _on_own_pages(function, args: tuple[Array, ...], axes: tuple, out: tuple) -> Array:
    """`function` on each device's own rows and pages."""
    found = on_own_parts(function, args, axes, out)
    if found is None:
        raise ValueError(f"{[arg.shape for arg in args]} do not divide over the mesh in force")
    return found
