"""One optimizer step: a pure function of the state and a batch, whatever the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from configs.run import Run
from model.transformer import Transformer
from model.tree import Arrays, Skeleton
from sharding.expert_parallel import exact
from sharding.mesh import platform
from sharding.rules import constrain_weights, weights_table
from train.losses import Parts, Totals, no_parts, totals
from train.noise import noise_keys
from train.rounding import cast
from train.state import TrainState, compute_dtype, parameter_dtypes
from train.update import if_good, update

Metrics = dict[str, Array]
Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]

NORM_MEMORY = 0.99
"""Decay of the running mean of gradient norms that the spike guard compares with."""

GUARD_AFTER = 20
"""Steps before the spike guard acts, so that the running mean means something."""


class Loss(Protocol):
    """The loss of one micro-batch, given the step's totals and the parts of the micro-batches before."""

    def __call__(
        self, model: Transformer, rows: dict[str, Array], totals: Totals, before: Parts, /
    ) -> tuple[Array, Parts]: ...


def make_train_step(run: Run, skeleton: Skeleton, loss: Loss, optimizer: optax.GradientTransformationExtraArgs) -> Step:
    """The step of `run`; to be compiled once, with the state donated."""
    axes, within = skeleton.axes, weights_table(run.mesh.cut_over_data)
    elementwise = run.optimizer.name == "adamw"

    def own_part(arrays: Arrays) -> Arrays:
        """What of the weights or gradients this device updates, where copies along `data` share that."""
        return constrain_weights(arrays, axes, within, at_rest=True) if run.optimizer.shard_over_data else arrays

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        start = replace(state, params=working(run, skeleton, state.params))
        if run.loss.neftune:
            batch = {**batch, "noise": noise_keys(run.seed, state.step, len(batch["tokens"]))}
        gradients, parts = accumulate(
            run.accumulate, skeleton, loss, start, batch, dtype=run.accumulate_dtype, own_part=own_part
        )
        with jax.named_scope("optimizer"):
            gradients = cast(gradients, "float32")
            norm = optax.tree.norm(gradients)
            good = jnp.isfinite(norm) & jnp.isfinite(parts.loss)
            if run.spike_factor:
                good &= (state.step < GUARD_AFTER) | (norm <= run.spike_factor * state.norm_mean)
            updated = update(optimizer, elementwise, gradients, norm, state, good, run.seed)

        counts_LE = parts.counts_LE
        extra = update_bias(state.extra, counts_LE, run, skeleton)
        mean = jnp.where(state.step == 0, norm, NORM_MEMORY * state.norm_mean + (1 - NORM_MEMORY) * norm)
        skipped = (~good).astype(jnp.int32)
        new = TrainState(
            params=updated.params,
            extra=if_good(good, extra, state.extra),
            opt=updated.opt,
            step=state.step + 1,
            norm_mean=if_good(good, mean, state.norm_mean),
            bad_steps=(state.bad_steps + 1) * skipped,
            skipped=state.skipped + skipped,
        )
        metrics: Metrics = {
            "loss": parts.loss,
            "tokens": jnp.sum(batch["segments"] > 0),
            "z_loss": parts.z_loss,
            "gradient_norm": norm,
            "parameter_norm": updated.parameter_norm,
            "update_norm": updated.update_norm,
            "skipped": skipped,
            "bad_steps": new.bad_steps,
        }
        metrics |= {**parts.more, **parts.peaks}
        if skeleton.further:
            metrics["mtp_loss"] = parts.mtp_loss
        if counts_LE.size:
            load_LE = counts_LE / jnp.maximum(counts_LE.mean(axis=-1, keepdims=True), 1e-9)
            metrics |= {"balance_loss": parts.balance_loss, "router_z_loss": parts.router_z_loss}
            metrics |= {"expert_load": load_LE, "expert_load_max_over_mean": load_LE.max()}
        if run.mesh.exchange == "dropping":
            metrics["dropped_share"] = parts.dropped / jnp.maximum(counts_LE.sum(), 1)
        return new, metrics

    return step


def working(run: Run, skeleton: Skeleton, params: Arrays) -> Arrays:
    """The weights that a step multiplies with: where they rest cut over `data`, whole along it.

    They are gathered in the type of the activations, half of the bytes between slices; and so their gradients, which
    go back the same way, are of that type.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not run.optimizer.shard_over_data or mesh.empty or mesh.shape["data"] == 1:
        return params
    # On a CPU gradients would be summed over devices in bfloat16, of which its compiler dies.
    coarse = parameter_dtypes(skeleton, "float32" if platform() == "cpu" else compute_dtype(run))
    smaller = {name: x.astype(min(x.dtype, coarse[name], key=lambda d: d.itemsize)) for name, x in params.items()}
    # Behind the barrier, or what is gathered is cast afterwards.
    within = weights_table(run.mesh.cut_over_data)
    smaller = jax.lax.optimization_barrier(constrain_weights(smaller, skeleton.axes, within, at_rest=True))
    return constrain_weights(smaller, skeleton.axes, within, at_rest=False)


def accumulate(
    count: int,
    skeleton: Skeleton,
    loss: Loss,
    state: TrainState,
    batch: dict[str, Array],
    *,
    dtype: str = "float32",
    own_part: Callable[[Arrays], Arrays] = lambda gradients: gradients,
) -> tuple[Arrays, Parts]:
    """Gradients and parts of the loss, summed over `count` micro-batches.

    Every micro-batch divides by the totals of the whole step, so that the sum is the gradient of the whole
    batch whatever its parts weigh.

    Args:
        dtype: of the sums. Gradients come in the type of their weight, and so they leave where nothing is summed.
        own_part: lays gradients out; the sums are no larger on any device than what it leaves there.
    """
    sums = totals(batch)

    def of(params: Arrays, rows: dict[str, Array], before: Parts) -> tuple[Array, Parts]:
        return loss(skeleton.merge(params, state.extra), rows, sums, before)

    gradient = jax.grad(of, has_aux=True)
    before = jax.eval_shape(lambda: no_parts(skeleton.merge(state.params, state.extra)))
    before = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), before)
    if count == 1:
        gradients, parts = gradient(state.params, batch, before)
        return own_part(gradients), parts

    # Row r goes to micro-batch r % count, so that each device keeps its own rows.
    micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 0), batch)

    def body(carry: tuple[Arrays, Parts], rows: dict[str, Array]) -> tuple[tuple[Arrays, Parts], Any]:
        sum_of, before = carry
        part, after = gradient(state.params, rows, before)
        # Added in float32 in any case; the sum alone is stored in `dtype`.
        total = jax.tree.map(jnp.add, cast(sum_of, "float32"), cast(own_part(part), "float32"))
        return (cast(total, dtype), after.sums), (after.more, after.peaks)

    zeros = own_part({name: jnp.zeros(weight.shape, dtype) for name, weight in state.params.items()})
    (gradients, parts), (more, peaks) = jax.lax.scan(body, (zeros, before), micro)
    more = {name: each.sum() for name, each in more.items()}
    return gradients, replace(parts, more=more, peaks={name: each.max() for name, each in peaks.items()})


def update_bias(extra: Arrays, counts_LE: Array, run: Run, skeleton: Skeleton) -> Arrays:
    """Selection biases, each moved by a fixed amount towards even load (arXiv 2408.15664, algorithm 1)."""
    rate = run.loss.bias_update_rate
    if not rate or not extra:
        return extra
    direction_LE = jnp.sign(counts_LE.mean(axis=-1, keepdims=True) - counts_LE)
    moved: Arrays = {}
    for name, layers in skeleton.bias_layers.items():
        change = direction_LE[jnp.asarray(layers)].reshape(extra[name].shape)
        moved[name] = extra[name] + rate * change
    return {**extra, **moved}


def make_validation_step(
    run: Run, skeleton: Skeleton, loss: Loss
) -> Callable[[TrainState, dict[str, Array]], dict[str, Array]]:
    """`(state, batch) ->` sums of the loss and of `Parts.more`, and `weight`: the number of what they are means of."""

    def step(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        model = skeleton.merge(working(run, skeleton, state.params), state.extra)
        model.matmul, model.exchange = "plain", exact(model.exchange)  # as the model is used
        sums = totals(batch)
        _, parts = loss(model, batch, sums, no_parts(model))
        return {name: one * sums.weight for name, one in {"loss": parts.loss, **parts.more}.items()} | {
            "weight": sums.weight
        }

    return step
