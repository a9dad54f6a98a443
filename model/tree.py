"""A model as a flat dictionary of arrays, and back: what optimizer, checkpoint and conversion work on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.lora import Frozen, Narrow
from model.transformer import Transformer, stack_plan

Arrays = dict[str, jax.Array]
"""Arrays by path, such as `stacks.0.blocks.3.attention.q_DNH`."""


class Skeleton:
    """What is left of a model without its arrays: its structure, and each array's kind and logical axes.

    Weights (`nnx.Param`) and other state (selection bias) are kept apart: gradients and the optimizer see
    weights alone.
    """

    def __init__(self, model: Transformer):
        """From a model, real or abstract (`jax.eval_shape`)."""
        self.graphdef, weights, state = nnx.split(model, nnx.Param, ...)
        self._weights = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(weights)}
        self._state = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
        self.bias_layers = _bias_layers(model)
        self.further = model.mtp is not None

    def split(self, model: Transformer) -> tuple[Arrays, Arrays]:
        """The weights and the other state of `model`, which must have this structure."""
        _, weights, state = nnx.split(model, nnx.Param, ...)
        return _values(weights), _values(state)

    def merge(self, weights: Mapping[str, Any], state: Mapping[str, Any]) -> Transformer:
        """The model with these arrays (or shapes, or shardings) in place."""
        filled = [
            nnx.from_flat_state([(path, leaf.replace(values[name])) for name, (path, leaf) in kind.items()])
            for kind, values in ((self._weights, weights), (self._state, state))
        ]
        return nnx.merge(self.graphdef, *filled)

    @property
    def frozen(self) -> set[str]:
        """Paths of weights that are not trained, see `model.lora`."""
        return {name for name, (_, leaf) in self._state.items() if isinstance(leaf, Frozen)}

    @property
    def narrow(self) -> set[str]:
        """Those of them that are parts of weights in 8 bits."""
        return {name for name, (_, leaf) in self._state.items() if isinstance(leaf, Narrow)}

    @property
    def weights(self) -> set[str]:
        """Paths of the weights, without the other state."""
        return set(self._weights)

    @property
    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Each array's logical axes; a stacked array has one dimension more in front."""
        leaves = {**self._weights, **self._state}
        return {name: tuple(leaf.get_metadata().get("axes") or ()) for name, (_, leaf) in leaves.items()}

    @property
    def sums(self) -> dict[str, tuple[int, ...]]:
        """Of each weight that products take in 8 bits, the dimensions that they sum over, its own layer alone."""
        leaves = {**self._weights, **self._state}
        return {name: own for name, (_, leaf) in leaves.items() if (own := leaf.get_metadata().get("sums"))}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each array's shape."""
        return {name: tuple(leaf.shape) for name, (_, leaf) in {**self._weights, **self._state}.items()}


@lru_cache(maxsize=8)
def make_skeleton(config: ModelConfig, *, stacked: bool, dtype: Any = jnp.float32) -> Skeleton:
    """The structure of a model of `config`; allocates nothing."""
    return Skeleton(jax.eval_shape(lambda: Transformer(config, jax.random.key(0), dtype=dtype, stacked=stacked)))


def list_names(name: str, config: ModelConfig) -> list[str]:
    """Paths in the list form of what the stacked form holds at `name`, in the order of its leading axis."""
    kind, *rest = name.split(".")
    if kind != "stacks":
        return [name]
    index, _, position, *path = rest
    pattern, repeats = stack_plan(config, stacked=True)[int(index)]
    layers = (pattern[int(position)] + repeat * len(pattern) for repeat in range(repeats))
    return [".".join(["stacks.0.blocks", str(layer), *path]) for layer in layers]


def unstack(arrays: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Arrays of the stacked form under the paths of the list form, one per layer, on the same devices."""
    flat: dict[str, Any] = {}
    for name, leaf in arrays.items():
        names = list_names(name, config)
        flat |= {names[0]: leaf} if len(names) == 1 else {own: leaf[i] for i, own in enumerate(names)}
    return flat


def stack(arrays: dict[str, Any], config: ModelConfig, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The inverse of `unstack`. `arrays` is emptied on the way, so that no more than one stack is there twice.

    shardings: of the stacked form, by path; what they do not name stays in `arrays`.
    """
    found: dict[str, jax.Array] = {}
    for name, sharding in shardings.items():
        layers = [arrays.pop(own) for own in list_names(name, config)]
        if len(layers) == 1:
            found[name] = jax.device_put(layers[0], sharding)
        else:
            found[name] = jax.jit(lambda *parts: jnp.stack(parts), out_shardings=sharding)(*layers)
    return found


def _bias_layers(model: Transformer) -> dict[str, list[int]]:
    """For each selection bias, by path, the routed layers (counted from 0) that its rows belong to."""
    found: dict[str, list[int]] = {}
    routed = 0
    for index, (pattern, repeats) in enumerate(stack_plan(model.config, model.stacked)):
        positions = [p for p, layer in enumerate(pattern) if model.config.is_moe(layer)]
        for rank, position in enumerate(positions):
            path = f"stacks.{index}.blocks.{position}.feed_forward.bias_E"
            found[path] = [routed + repeat * len(positions) + rank for repeat in range(repeats)]
        routed += len(positions) * repeats
    if model.mtp is not None:
        found["mtp.block.feed_forward.bias_E"] = [routed]
    return found if model.config.moe.selection_bias else {}


def _values(state: nnx.State) -> Arrays:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
