"""Where the time of a training step goes: its parts compiled alone, forward and backward, with the step's sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.ours import Training, make_rows
from bench.shapes import Shape
from bench.timing import Timings, median
from model.attention import Attention, Mask
from model.layers import Keys, rope_tables
from model.moe import MoE
from train.losses import Parts, Totals, cross_entropy


def parts(shape: Shape, repeats: int) -> dict[str, Any]:
    """Seconds of a whole step and of its parts; `rest` is what they leave: norms, embedding, statistics, metrics.

    A part that runs once a layer is timed for one layer and counted for all.
    """
    training = Training(shape)
    layers = shape.model.num_layers
    seconds = {
        "experts": layers * time_of(experts_part(shape), repeats),
        "attention": layers * time_of(attention_part(shape), repeats),
        "head and loss": time_of(loss_part(shape), repeats),
        "optimizer": time_of(optimizer_part(training), repeats),
        "step": time_of(training, repeats),
    }
    seconds["rest"] = seconds["step"] - sum(value for name, value in seconds.items() if name != "step")
    return {"seconds": seconds}


def time_of(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one to compile and one to warm up."""
    timings = Timings()
    for _ in range(2):
        jax.block_until_ready(function())
    return median(timings.take(lambda: jax.block_until_ready(function()), repeats))


def activations(shape: Shape, seed: int) -> jax.Array:
    """Something like a normalised residual stream, `[B, T, D]`."""
    return jax.random.normal(jax.random.key(seed), (shape.batch, shape.seq, shape.model.hidden_size))


def backward(module: nnx.Module, shape: Shape, call: Callable[[Any, jax.Array], jax.Array]) -> Callable[[], Any]:
    """Output of `call(module, x)` and its gradients by weights and `x`, for a gradient that comes from above."""
    graphdef, weights = nnx.split(module)
    x, dy = activations(shape, 1), activations(shape, 2)

    def both(weights: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda weights, x: call(nnx.merge(graphdef, weights), x), weights, x)
        return y, pull(dy)

    compiled = jax.jit(both)
    return lambda: compiled(weights, x, dy)


def experts_part(shape: Shape) -> Callable[[], Any]:
    """Routing and experts of one layer."""
    valid = jnp.ones((shape.batch, shape.seq), jnp.int32)
    module = MoE(shape.model, Keys(jax.random.key(0)))
    return backward(module, shape, lambda moe, x: moe(x, valid, training=True)[0])


def attention_part(shape: Shape) -> Callable[[], Any]:
    """Projections, rotation and attention of one layer."""
    model, rows = shape.model, make_rows(shape)
    rope = rope_tables(model.rope, model.rotary_dim, jnp.asarray(rows["positions"]), jnp.dtype("float32"))
    segments = jnp.asarray(rows["segments"])
    module = Attention(model, 0, Keys(jax.random.key(0)))
    return backward(module, shape, lambda attention, x: attention(x, rope, Mask(segments))[0])


def loss_part(shape: Shape) -> Callable[[], Any]:
    """Output head and cross-entropy."""
    hidden = activations(shape, 1)
    head = jax.random.normal(jax.random.key(2), (shape.model.hidden_size, shape.model.vocab_size)) * 0.02
    rows = {name: jnp.asarray(value) for name, value in make_rows(shape).items()}

    def value(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return cross_entropy(hidden, head, rows["targets"], rows["weights"], 0.0)[0]

    compiled = jax.jit(jax.value_and_grad(value, (0, 1)))
    return lambda: compiled(hidden, head)


def optimizer_part(training: Training) -> Callable[[], Any]:
    """The step around a loss whose gradients are there already: clipping, update, guard and norms.

    The loss is linear in the weights, and its slopes come with the batch.
    """

    def linear(model: Any, rows: dict[str, jax.Array], sums: Totals, before: Parts) -> tuple[jax.Array, Parts]:
        weights, _ = training.skeleton.split(model)
        return sum((jnp.vdot(leaf, rows[name]) for name, leaf in weights.items()), jnp.zeros(())), before

    gradients = {name: jnp.full_like(leaf, 1e-3) for name, leaf in training.state.params.items()}
    batch = {**gradients, **{name: jnp.ones((1, 1)) for name in ("weights", "segments")}}
    compiled = training.compiled(linear)

    def once() -> jax.Array:
        with jax.set_mesh(training.mesh):
            training.state, metrics = compiled(training.state, batch)
        return metrics["update_norm"]

    return once
