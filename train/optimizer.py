"""Optimizers and schedules, from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from configs.run import OptimizerConfig
from model.tree import Arrays, Skeleton


def schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """The learning rate at each step, counted from 0.

    cosine: to `final_fraction` of the peak at the last step. wsd: flat, then linear over the last
    `decay_fraction` of the steps (MiniCPM, arXiv 2404.06395). constant: flat.
    """
    warmup = min(config.warmup_steps, steps)
    final = peak * config.final_fraction
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "wsd":
        decay = max(int(steps * config.decay_fraction), 1)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [max(rest - decay, 0)]
        )
    else:
        after = optax.constant_schedule(peak)
    # The first update is worth something: step 0 has 1/warmup of the peak, not 0.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def is_matrix(axes: tuple[str | None, ...]) -> bool:
    """Whether a weight with these logical axes multiplies (and is decayed): no norm, gate vector or bias."""
    return len(axes) >= 2 and axes not in (("heads", "head_dim"), ("kv_heads", "head_dim"))


def muon_dimensions(name: str, axes: tuple[str | None, ...], ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
    """How Muon sees a weight as a matrix: inputs, outputs, and everything before them as a batch.

    None (left to AdamW) for norms and biases, for the embedding and head, and for the router.
    """
    if not is_matrix(axes) or "vocab" in axes or "router" in axes or name == "head_DV":
        return None
    dims = [ndim - len(axes) + i for i, axis in enumerate(axes) if axis != "expert"]
    if name.endswith("down_EDF"):  # the one weight with outputs before inputs
        return optax.contrib.MuonDimensionNumbers((dims[1],), (dims[0],))
    outputs = 1 if axes[-1] == "embed" else len(dims) - 1
    return optax.contrib.MuonDimensionNumbers(tuple(dims[:-outputs]), tuple(dims[-outputs:]))


def stored_as(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`inner`, whose moments are kept in `dtype` and computed in float32.

    optax's own `mu_dtype` is of the first moment alone, and multiplies it in the type that it is stored in. Both in
    bfloat16: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2). Moments are dictionaries by path; what else a state holds
    (counters, coefficients) stays as it is.
    """

    def cast(state: optax.OptState, kind: jnp.dtype) -> optax.OptState:
        def one(part: Any) -> Any:
            return optax.tree.cast(part, kind) if isinstance(part, dict) else part

        return jax.tree.map(one, state, is_leaf=lambda part: isinstance(part, dict))

    def init(params: optax.Params) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = inner.update(updates, cast(state, jnp.dtype("float32")), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def clipped(limit: float) -> optax.GradientTransformationExtraArgs:
    """Gradients made shorter than `limit`, by their norm, which may be given, as `norm`.

    optax's own clipping would take the norm of whatever part of the gradients it sees.
    """

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        norm: Array | None = None,
        **more: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(config: OptimizerConfig, steps: int, skeleton: Skeleton) -> optax.GradientTransformationExtraArgs:
    """Clipping, then AdamW (arXiv 1711.05101) or Muon (Jordan et al. 2024) with AdamW for what is no matrix."""
    axes, shapes = skeleton.axes, skeleton.shapes

    def decayed(params: Arrays) -> dict[str, bool]:
        return {name: not isinstance(leaf, optax.MaskedNode) and is_matrix(axes[name]) for name, leaf in params.items()}

    moment_dtype = jnp.dtype(config.moment_dtype)
    adamw = optax.adamw(
        schedule(config, steps, config.learning_rate),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    core = adamw = stored_as(adamw, moment_dtype)
    if config.name == "muon":
        dimensions = {name: muon_dimensions(name, axes[name], len(shapes[name])) for name in shapes}

        def of_matrices(params: Arrays) -> dict[str, object]:
            return {name: dimensions[name] or optax.MaskedNode() for name in params}

        muon = optax.chain(
            optax.contrib.scale_by_muon(
                beta=config.muon_momentum,
                weight_dimension_numbers=of_matrices,  # pyright: ignore[reportArgumentType]
            ),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule(config, steps, config.muon_learning_rate)),
        )
        labels = {name: "muon" if dimensions[name] else "adamw" for name in shapes}
        core = optax.partition(
            {"muon": stored_as(muon, moment_dtype), "adamw": adamw},
            lambda params: {name: labels[name] for name in params},
        )
    return optax.with_extra_args_support(optax.chain(clipped(config.clip_norm), core) if config.clip_norm else core)
