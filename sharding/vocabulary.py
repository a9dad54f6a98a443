"""A vocabulary cut over `tensor`, its embedding over `fsdp` too: rows looked up, and what losses need of all logits.

Neither ever has the whole table of an embedding on a device, nor all logits of a token. For a loss the vocabulary is
cut over `expert` too, and the tokens there come together: the gradient of a whole head would be the largest of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import shard_map
from jax.sharding import PartitionSpec as P

from sharding.data_parallel import divides
from sharding.mesh import TOKEN_AXES
from sharding.rules import TOKENS, TRAIN, spec

EMBEDDING = spec(("vocab", "columns"), TRAIN)
PARTS = ("expert", "tensor")
"""Axes that the vocabulary of a loss is cut over, where it divides; else `tensor` alone."""


Parts = tuple[str, ...]
"""Axes that a vocabulary is cut over; none outside of `on_own_logits`."""


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding, `[B, T, D]` of `dtype`, each on the device of its token.

    Every device looks up its columns for the tokens of all its peers along `fsdp`, and these travel: the table,
    which is larger, stays.
    """
    if not divides(tokens_BT.shape, dtype):
        return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)

    def local(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
        tokens_M = jax.lax.all_gather(tokens_bt.reshape(-1), "fsdp", tiled=True)
        own_M = tokens_M - jax.lax.axis_index("tensor") * len(table_vd)
        own_M = jnp.where(own_M < 0, len(table_vd), own_M)  # a negative index would count from the end
        rows_Md = jnp.take(table_vd, own_M, axis=0, mode="fill", fill_value=0).astype(dtype)
        rows_Md = jax.lax.psum(rows_Md, "tensor")
        rows_mD = jax.lax.all_to_all(rows_Md, "fsdp", 0, 1, tiled=True)
        return rows_mD.reshape(*tokens_bt.shape, -1)

    return shard_map(local, in_specs=(EMBEDDING, TOKENS), out_specs=TOKENS, check_vma=False)(table_VD, tokens_BT)


def on_own_logits(
    function: Callable[..., tuple[Any, Any]],
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    *tokens: jax.Array,
    gradients: bool,
) -> tuple[Any, Any]:
    """`function(hidden, head, *tokens)` on each device's tokens and part of the vocabulary.

    Args:
        gradients: whether there are any.
        function: gives sums over tokens, and None or gradients: of `hidden`, from this part of the vocabulary, and
            of `head`, from these tokens. Where the vocabulary is cut it also gets `parts`, the axes for
            `over_vocabulary` and `vocabulary_start`.

    Returns:
        The sums over all devices; and the gradients, laid out as what they are of.
    """
    if not divides(hidden_BTD.shape[:2], hidden_BTD.dtype):
        return function(hidden_BTD, head_DV, *tokens)
    mesh = jax.sharding.get_abstract_mesh()
    parts = PARTS if head_DV.shape[1] % (mesh.shape["expert"] * mesh.shape["tensor"]) == 0 else ("tensor",)
    together = "expert" in parts
    rest = tuple(axis for axis in TOKEN_AXES if axis != "fsdp" and axis not in parts)

    def local(hidden_btD: jax.Array, head_dv: jax.Array, *tokens: jax.Array) -> tuple[Any, Any]:
        head_Dv = jax.lax.all_gather(head_dv.astype(hidden_btD.dtype), "fsdp", tiled=True)
        if together:
            hidden_btD = jax.lax.all_gather(hidden_btD, "expert", tiled=True)
            tokens = tuple(jax.lax.all_gather(x, "expert", tiled=True) for x in tokens)
        sums, found = function(hidden_btD, head_Dv, *tokens, parts=parts)
        sums = jax.lax.psum(sums, tuple(axis for axis in TOKEN_AXES if axis not in parts))
        if not gradients:
            return sums, None
        d_hidden, d_head = found
        if together:
            d_hidden = jax.lax.psum_scatter(d_hidden, "expert", tiled=True)
        # In the type of the activations, as gradients of other weights travel.
        d_head = jax.lax.psum_scatter(d_head.astype(hidden_btD.dtype), "fsdp", tiled=True)
        return sums, (jax.lax.psum(d_hidden, "tensor"), jax.lax.psum(d_head, rest))

    head = P("fsdp", parts)
    specs = (TOKENS, head, *(TOKENS for _ in tokens))
    return shard_map(local, in_specs=specs, out_specs=(P(), (TOKENS, head) if gradients else None), check_vma=False)(
        hidden_BTD, head_DV, *tokens
    )


def over_vocabulary(reduce: Callable[[jax.Array, tuple[str, ...]], jax.Array], x: jax.Array, parts: Parts) -> jax.Array:
    """`reduce`, such as `jax.lax.psum`, over the parts of the vocabulary; `x` itself where there is one part."""
    return reduce(x, parts) if parts else x


def vocabulary_start(size: int, parts: Parts) -> jax.Array | int:
    """The first token of this device's part, of `size` tokens."""
    return jax.lax.axis_index(parts) * size if parts else 0
