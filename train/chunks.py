"""How many positions' logits are made at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sharding.mesh import platform

SMALL_CHUNK, LARGE_CHUNK = 2**24, 2**26
"""Logits (elements per device) that are worth holding at once; and the most that are ever held on a CPU.

An accelerator holds five times as many: each chunk reads and writes the gradient of the whole head, and there that
would take as long as the products.
"""


def chunk_length(batch: int, length: int, vocab: int, summed: int = 0) -> int:
    """Positions per chunk: a divisor of `length` that keeps a chunk's logits small; of many a sixteenth of all.

    For accelerators half of them.

    Args:
        summed: elements of what each chunk adds to, such as the gradient of the head. On a CPU a chunk of twice as many
            logits is enough; smaller ones lie in its caches, larger ones only in memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.manual_axes else max(1, mesh.size)
    share, largest = (16, LARGE_CHUNK) if platform() == "cpu" else (2, 5 * LARGE_CHUNK)
    small = min(SMALL_CHUNK, max(2 * summed, SMALL_CHUNK // 8)) if summed and platform() == "cpu" else SMALL_CHUNK
    wanted = min(max(small, batch * length * vocab // devices // share), largest) * devices
    most = max(1, wanted // (batch * vocab))
    return max(size for size in range(1, min(most, length) + 1) if length % size == 0)


def in_chunks(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """`function` of a tree of arrays `[B, T, ...]`, `size` positions at a time; its results are such arrays too."""
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    if size == length:
        return function(arrays)
    split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(batch, -1, size, *a.shape[2:]), 1, 0), arrays)
    found = jax.lax.map(function, split)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, length, *a.shape[3:]), found)
