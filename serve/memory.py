"""How many pages of keys and values, and snapshots of linear layers, there is memory for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.experimental import multihost_utils

from model.cache import KVType, empty_layer
from model.config import ModelConfig

PAGE_SHARE, SNAPSHOT_SHARE = 0.5, 0.1
"""Of the memory that is free, what pages and snapshots may take unless it is said."""
SNAPSHOTS_PER_SLOT = 4
"""Ends of prompts worth keeping: more are seldom asked for again."""


def free_memory() -> int:
    """Free bytes of all devices together, or of the machine where devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in one for one in stats):
        return sum(one["bytes_limit"] - one["bytes_in_use"] for one in stats)
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class Room:
    """What a model keeps of prompts and replies. page: positions of one. drafts: its own block makes guesses."""

    config: ModelConfig
    dtype: jnp.dtype
    page: int
    kv_type: KVType
    drafts: bool = False

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self._bytes(linear=False)

    @functools.cached_property
    def snapshot_bytes(self) -> int:
        """Bytes of what the linear layers of one row remember; 0 for a model that has none."""
        return self._bytes(linear=True)

    def _bytes(self, *, linear: bool) -> int:
        config = self.config
        own = [i for i in range(config.num_layers) if (config.attention_kind(i) == "linear") == linear]
        own += [config.mtp_layer] if self.drafts and not linear else []
        slots, pages = (1, 0) if linear else (0, 1)
        layers = jax.eval_shape(
            lambda: [empty_layer(config, layer, slots, pages, self.page, self.dtype, self.kv_type) for layer in own]
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))

    def share(
        self, width: int, slots: int, shards: int, pages: int | None, snapshot_memory: int | None, to_come: int = 0
    ) -> tuple[int, int]:
        """Pages and snapshots on all devices together, `shards` groups of which have equally many.

        Args:
            width: pages of a full row. pages: None is enough for all slots to be full, or as many as fit, but not fewer
                than one full row. snapshot_memory: bytes; None is some snapshots for each slot, or as many as fit.
            to_come: bytes of weights that are still to be read into what is free now.
        """
        free = max(0, free_memory() - to_come)
        if pages is None:
            fitting = int(PAGE_SHARE * free) // max(1, self.page_bytes)
            pages = max(width, min(slots * width, fitting))
        if not self.snapshot_bytes:
            snapshots = 0
        elif snapshot_memory is None:
            fitting = int(SNAPSHOT_SHARE * free) // self.snapshot_bytes
            snapshots = max(shards, min(SNAPSHOTS_PER_SLOT * slots, fitting))
        else:
            snapshots = snapshot_memory // self.snapshot_bytes
        found = [pages, snapshots]
        if jax.process_count() > 1:  # each has found its own memory; they have to agree
            found = np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(found, np.int32))).tolist()
        return max(found[0] // shards, 1) * shards, found[1] // shards * shards
