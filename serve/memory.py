"""How many pages of keys and values there is memory for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import psutil

from model.config import ModelConfig

SHARE = 0.5
"""Of the memory that is free, what pages may take unless a number is given."""


def page_bytes(config: ModelConfig, dtype: jnp.dtype, page: int) -> int:
    """Bytes of one page over all layers."""
    return config.kv_bytes_per_token(dtype.itemsize) * page


def free_memory() -> int:
    """Free bytes of all devices together, or of the machine where devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in one for one in stats):
        return sum(one["bytes_limit"] - one["bytes_in_use"] for one in stats)
    return psutil.virtual_memory().available


def default_pages(config: ModelConfig, dtype: jnp.dtype, page: int, width: int, slots: int) -> int:
    """Enough for all slots to be full, or as many as fit, but not fewer than one full row."""
    fitting = int(SHARE * free_memory()) // max(1, page_bytes(config, dtype, page))
    return max(width, min(slots * width, fitting))
