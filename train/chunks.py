"""How many positions' logits are made at once."""

from __future__ import annotations

import jax

from sharding.mesh import platform

SMALL_CHUNK, LARGE_CHUNK = 2**24, 2**26
"""Logits (elements per device) that are worth holding at once; and the most that are ever held on a CPU.

An accelerator holds five times as many: each chunk reads and writes the gradient of the whole head, and there that
would take as long as the products.
"""


def chunk_length(batch: int, length: int, vocab: int) -> int:
    """Positions per chunk: a divisor of `length` that keeps a chunk's logits small; of many a sixteenth of all.

    For accelerators half of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.manual_axes else max(1, mesh.size)
    share, largest = (16, LARGE_CHUNK) if platform() == "cpu" else (2, 5 * LARGE_CHUNK)
    wanted = min(max(SMALL_CHUNK, batch * length * vocab // devices // share), largest) * devices
    most = max(1, wanted // (batch * vocab))
    return max(size for size in range(1, min(most, length) + 1) if length % size == 0)
