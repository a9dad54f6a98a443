"""Adapters of low rank (LoRA, arXiv 2106.09685): `x W + scale (x A) B`, where W stays as it is and A, B are trained.

model ──adapt──► the same model, each target an `Adapted`: W frozen, A at random, B zero (so it begins as the model)
      ◄──merge── weights with their adapters added
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float

from model.lora_config import LoraConfig
from model.quantization import Quantized, quantize, stored_form

BASE = ".base"
"""The end of the path of a weight that has an adapter; without it the path is that of a plain model."""
VALUES, SCALE = ".values", ".scale"
"""The ends of the paths of a weight in 8 bits."""


class Frozen(nnx.Variable):
    """A weight that is not trained."""


class Narrow(Frozen):
    """Part of such a weight in 8 bits; it stays of its type, whatever others are cast to."""


class InEightBits(nnx.Module):
    """A weight in its place in a module that is not trained and kept in 8 bits, see `Quantized`.

    Args:
        axes, sums: as in the metadata of the weight.
    """

    def __init__(self, weight: Array, axes: tuple[str | None, ...], sums: tuple[int, ...]):
        form, stored = stored_form(weight.shape, axes, sums), quantize(weight, sums)
        alone = tuple(axis if size > 1 else None for axis, size in zip(form.axes, form.scale, strict=True))
        self.values = Narrow(stored.values, axes=form.axes)
        self.scale = Narrow(stored.scale, axes=alone)
        self.outputs = stored.outputs

    def __getitem__(self, index: EllipsisType) -> Quantized:
        return Quantized(self.values[...], self.scale[...], self.outputs)

    def get_metadata(self) -> dict[str, Any]:
        """Of the same form as a weight's: the logical axes of each part."""
        values, scale = (part.get_metadata()["axes"] for part in (self.values, self.scale))
        return {"axes": Quantized(values, scale, self.outputs)}


def kept(weight: Array, axes: tuple[str | None, ...], sums: tuple[int, ...], config: LoraConfig) -> Any:
    """A weight that is not trained; in 8 bits where `config` says so and products can take it."""
    if config.base == "int8" and sums:
        return InEightBits(weight, axes, sums)
    return Frozen(weight, axes=axes, sums=sums)


@struct.dataclass
class LowRank:
    """A weight with its adapter; where `linear` and its kin take a weight, they take this too.

    base: the weight. a: from what products sum over to the rank. b: from the rank to the outputs. In both the rank
    comes first, behind the experts: as the last dimension a TPU fills it up to 128. scale_BR: what each row of a batch
    multiplies each rank by besides, see `model.adapters`.
    """

    base: Float[Array, "*S"] | Quantized
    a: Float[Array, "*E R *I"]
    b: Float[Array, "*E R *O"]
    scale: float = struct.field(pytree_node=False)
    scale_BR: Float[Array, "B R"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.base.shape

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: EllipsisType) -> LowRank:
        return self

    def astype(self, dtype: Any) -> LowRank:
        """All parts in another type."""
        return LowRank(self.base.astype(dtype), self.a.astype(dtype), self.b.astype(dtype), self.scale, self.scale_BR)

    def scaled(self, low: Float[Array, "*B R"]) -> Float[Array, "*B R"]:
        """Products with `a`, as each row has them."""
        if self.scale_BR is None:
            return low * self.scale
        rows = low.reshape(len(self.scale_BR), -1, low.shape[-1])
        return (rows * self.scale_BR[:, None].astype(low.dtype)).reshape(low.shape)

    @property
    def mT(self) -> LowRank:  # noqa: N802 (as arrays call it)
        """With the weight's last two dimensions exchanged; the adapter is the same either way."""
        return LowRank(self.base.mT, self.a, self.b, self.scale, self.scale_BR)


class Adapted(nnx.Module):
    """A weight in its place in a module, with an adapter.

    Args:
        weight: says by its `sums` what products sum over.
        key: decides A, uniform within 1 / sqrt(inputs) as in PEFT.
    """

    def __init__(self, weight: nnx.Param, config: LoraConfig, key: Array):
        metadata = weight.get_metadata()
        axes, sums, shape = metadata["axes"], metadata["sums"], weight.shape
        experts = () if 0 in sums else (0,)
        outputs = tuple(i for i in range(len(shape)) if i not in sums and i not in experts)

        def part(dimensions: tuple[int, ...], of: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(of[i] for i in dimensions)

        bound = prod(part(sums, shape)) ** -0.5
        size = (*part(experts, shape), config.rank, *part(sums, shape))
        drawn = jax.random.uniform(key, size, jnp.float32, -bound, bound)
        empty = jnp.zeros((*part(experts, shape), config.rank, *part(outputs, shape)), jnp.float32)
        self.base = kept(weight[...], axes, sums, config)
        self.a = nnx.Param(drawn, axes=(*part(experts, axes), None, *part(sums, axes)))
        self.b = nnx.Param(empty, axes=(*part(experts, axes), None, *part(outputs, axes)))
        self.scale = config.scale

    def __getitem__(self, index: EllipsisType) -> LowRank:
        return LowRank(self.base[...], self.a[...], self.b[...], self.scale)

    def get_metadata(self) -> dict[str, Any]:
        """Of the same form as a weight's: the logical axes of each part."""
        base, a, b = (part.get_metadata()["axes"] for part in (self.base, self.a, self.b))
        return {"axes": LowRank(base, a, b, self.scale)}


def adapt(module: nnx.Module, config: LoraConfig, key: Array) -> None:
    """Gives the targets within `module` their adapters."""
    found = [
        (owner, name)
        for _, owner in list(nnx.iter_modules(module))
        for name, leaf in sorted(vars(owner).items())
        if isinstance(leaf, nnx.Param) and leaf.get_metadata().get("sums") and name.rpartition("_")[0] in config.targets
    ]
    for index, (owner, name) in enumerate(found):
        setattr(owner, name, Adapted(getattr(owner, name), config, jax.random.fold_in(key, index)))


def freeze(module: nnx.Module, config: LoraConfig) -> None:
    """Makes of all weights within `module`, but adapters, such as are not trained."""
    for _, owner in list(nnx.iter_modules(module)):
        for name, leaf in list(vars(owner).items()):
            if isinstance(leaf, nnx.Param) and not isinstance(owner, Adapted):
                metadata = leaf.get_metadata()
                setattr(owner, name, kept(leaf[...], metadata["axes"], metadata.get("sums") or (), config))


def widen(arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays in list form, those in 8 bits in float32 under the path of the weight.

    Args:
        shapes: of the plain model's weights.
    """
    found: dict[str, Array] = {}
    for name, leaf in arrays.items():
        stem = name.removesuffix(VALUES)
        if name.endswith(VALUES):
            found[stem] = Quantized(leaf, arrays[stem + SCALE], ()).dense().reshape(shapes[stem.removesuffix(BASE)])
        elif not name.endswith(SCALE):
            found[name] = leaf
    return found


def narrowed(name: str, weight: Quantized) -> dict[str, Array]:
    """The arrays of a weight in 8 bits by path, where `name` is that of the weight."""
    return {name + VALUES: weight.values, name + SCALE: weight.scale}


def merge(arrays: Mapping[str, Array], sums: Mapping[str, tuple[int, ...]], config: LoraConfig) -> dict[str, Array]:
    """Weights by the paths of a plain model, their adapters added, from those of an adapted one, in list form.

    Args:
        sums: of the plain model's weights, see `Skeleton.sums`.
    """
    found: dict[str, Array] = {}
    for name, leaf in arrays.items():
        plain = name.removesuffix(BASE)
        if name.endswith(BASE):
            found[plain] = _merged(leaf, arrays[f"{plain}.a"], arrays[f"{plain}.b"], sums[plain], config.scale)
        elif not name.endswith((".a", ".b")):
            found[name] = leaf
    return found


def _merged(base: Array, a: Array, b: Array, sums: tuple[int, ...], scale: float) -> Array:
    dtype = base.dtype
    if 0 in sums:
        product = jnp.tensordot(a, b, ((0,), (0,)))
    else:
        product = jnp.einsum("eri,ero->eio", a, b)
        product = product.mT if sums == (2,) else product
    return (base.astype(jnp.float32) + scale * product).astype(dtype)
