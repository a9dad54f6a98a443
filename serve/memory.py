"""How many pages of keys and values there is memory for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import psutil

from model.cache import KVType, empty_layer
from model.config import ModelConfig

SHARE = 0.5
"""Of the memory that is free, what pages may take unless a number is given."""


def page_bytes(config: ModelConfig, dtype: jnp.dtype, page: int, kv_type: KVType) -> int:
    """Bytes of one page over all layers."""
    paged = [layer for layer in range(config.num_layers) if config.attention_kind(layer) != "linear"]
    layers = jax.eval_shape(lambda: [empty_layer(config, layer, 0, 1, page, dtype, kv_type) for layer in paged])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))


def free_memory() -> int:
    """Free bytes of all devices together, or of the machine where devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in one for one in stats):
        return sum(one["bytes_limit"] - one["bytes_in_use"] for one in stats)
    return psutil.virtual_memory().available


def default_pages(config: ModelConfig, dtype: jnp.dtype, page: int, width: int, slots: int, kv_type: KVType) -> int:
    """Enough for all slots to be full, or as many as fit, but not fewer than one full row."""
    fitting = int(SHARE * free_memory()) // max(1, page_bytes(config, dtype, page, kv_type))
    return max(width, min(slots * width, fitting))
