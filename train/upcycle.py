"""A dense model to a mixture of experts, as Qwen2-57B-A14B came from Qwen2-7B (arXiv 2407.10671).

Each dense feed-forward is copied as often as the experts need channels. Every copy is shuffled along its channels, the
copies are cut into experts, and a share of each expert's channels starts at random, as the router does. A channel is a
column of gate and of up with the row of down that belongs to them, and stays together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.tree import Arrays
from train.data.order import derive, permute


class Cut(NamedTuple):
    """Where the channels of one layer's experts come from.

    source_EF: the dense channel that each copies, int64. fresh_EF: whether it starts at random instead, bool.
    """

    source_EF: np.ndarray
    fresh_EF: np.ndarray


def cut(experts: int, width: int, dense_width: int, share: float, key: int) -> Cut:
    """Channels for `experts` experts of `width` from a feed-forward of `dense_width`; decided by `key` alone.

    In each expert `round(share * width)` channels are fresh. Where experts of the full width are asked for, each has
    every dense channel once.
    """
    copies = -(-experts * width // dense_width)
    every = np.arange(dense_width)
    channels = np.concatenate([permute(every, dense_width, derive(key, "copy", copy)) for copy in range(copies)])
    places = [permute(np.arange(width), width, derive(key, "fresh", expert)) for expert in range(experts)]
    return Cut(channels[: experts * width].reshape(experts, width), np.stack(places) < round(share * width))


def upcycle(dense: Mapping[str, jax.Array], initial: Mapping[str, jax.Array], share: float, seed: int) -> Arrays:
    """The weights of a mixture of experts that begins as a dense model; both in list form.

    Args:
        dense: weights of the dense model, by path.
        initial: weights that the mixture has at random, by path: shapes and layout of the result, and the fresh
            channels, routers and gates of shared experts in it.
        share: of each expert's channels that stay as in `initial`, 0 to 1.
        seed: decides which channels go where.
    """
    found = {name: dense.get(name, own) for name, own in initial.items()}
    routed = [name.removesuffix("router_DE") for name in initial if name.endswith(".router_DE")]
    for prefix in routed:
        old = {part: dense[f"{prefix}{part}"] for part in ("gate_DF", "up_DF", "down_FD")}
        dense_width = old["gate_DF"].shape[1]
        experts, _, width = initial[f"{prefix}gate_EDF"].shape
        key = derive("upcycle", seed, prefix)
        plan = cut(experts, width, dense_width, share, key)
        for ours, theirs in (("gate_EDF", "gate_DF"), ("up_EDF", "up_DF"), ("down_EDF", "down_FD")):
            name = prefix + ours
            # Our experts' `down` has its channels in columns too, a dense one's in rows.
            matrix = old[theirs].T if theirs == "down_FD" else old[theirs]
            found[name] = _cut_out(matrix, initial[name], plan, rows=False)
        if f"{prefix}shared.gate_DF" in initial:
            width = initial[f"{prefix}shared.gate_DF"].shape[1]
            plan = cut(1, width, dense_width, share, derive(key, "shared"))
            for part, array in old.items():
                name = f"{prefix}shared.{part}"
                found[name] = _cut_out(array, initial[name], plan, rows=part == "down_FD")
    return found


def _cut_out(dense: jax.Array, initial: jax.Array, plan: Cut, *, rows: bool) -> jax.Array:
    """One matrix of every expert (or the shared expert's own): channels of `dense`, and fresh ones of `initial`.

    rows: channels are the rows of a matrix, as in `down`; otherwise its columns.
    """

    def build(dense: jax.Array, initial: jax.Array) -> jax.Array:
        if rows:
            copied, fresh = dense[plan.source_EF], plan.fresh_EF[:, :, None]
        else:
            copied, fresh = jnp.moveaxis(dense[:, plan.source_EF], 1, 0), plan.fresh_EF[:, None, :]
        return jnp.where(fresh, initial.reshape(copied.shape), copied).reshape(initial.shape)

    return jax.jit(build, out_shardings=initial.sharding)(dense, initial)
