"""Copies of what linear layers remember at the end of some page, so that prompts can begin where others did.

Keys and values of a beginning lie in pages that all can read; a linear layer has one memory for each row, which goes on
changing, so what it was at that place has to be kept apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.cache import SLOTS, empty_layer, lay_out
from model.config import ModelConfig
from serve.steps import State
from sharding.rules import constrain

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Store:
    """Places for snapshots on the device.

    Args:
        count: how many, on all devices together. on_mesh: has a function called on the engine's mesh.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, count: int, on_mesh: Wrap):
        self.count = count
        linear = [layer for layer in range(config.num_layers) if config.attention_kind(layer) == "linear"]
        self._layers = linear if count else []

        def empty() -> Any:
            return laid_out(tuple(empty_layer(config, layer, count, 0, 1, dtype) for layer in self._layers))

        self._kept = on_mesh(jax.jit(empty))()
        self._load = on_mesh(jax.jit(partial(self._copied_to_slot, config), donate_argnums=0))
        self._save = on_mesh(jax.jit(self._copied_from_slot, donate_argnums=0))

    def load(self, state: State, slot: int, place: int) -> State:
        """`state` with the snapshot at `place` in a slot."""
        return self._load(state, self._kept, np.int32(slot), np.int32(place))

    def save(self, state: State, slot: int, place: int) -> None:
        """Keeps what is in a slot at `place`."""
        self._kept = self._save(self._kept, state.layers, np.int32(slot), np.int32(place))

    def _copied_to_slot(self, config: ModelConfig, state: State, kept: Any, slot: Any, place: Any) -> State:
        layers = list(state.layers)
        for layer, own in zip(self._layers, kept, strict=True):
            layers[layer] = tuple(x.at[slot].set(y[place]) for x, y in zip(layers[layer], own, strict=True))
        return replace(state, layers=lay_out(config, tuple(layers)))

    def _copied_from_slot(self, kept: Any, layers: Any, slot: Any, place: Any) -> Any:
        return laid_out(
            tuple(
                tuple(x.at[place].set(y[slot]) for x, y in zip(own, layers[layer], strict=True))
                for layer, own in zip(self._layers, kept, strict=True)
            )
        )


def laid_out(kept: tuple[tuple[jax.Array, ...], ...]) -> tuple[tuple[jax.Array, ...], ...]:
    """Snapshots spread over the mesh in force as slots are."""
    return tuple(tuple(constrain(x, *axes) for x, axes in zip(own, SLOTS, strict=True)) for own in kept)
