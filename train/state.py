"""What a training run carries from step to step, and how it is made on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from configs.run import Run
from model.transformer import Transformer
from model.tree import Arrays, Skeleton
from sharding.rules import array_sharding, resting_sharding, weights_table
from sharding.runtime import default_dtype
from train.optimizer import is_matrix


@struct.dataclass
class TrainState:
    """Everything that decides the next step, besides the data.

    params: weights that are trained, by path, of the types of `parameter_dtypes`. extra: those that are not, and
    selection biases. opt: the optimizer's
    state. step: steps done. norm_mean: running mean of gradient norms, for the spike guard. bad_steps: steps skipped
    in a row. skipped: steps skipped in all.
    """

    params: Arrays
    extra: Arrays
    opt: Any
    step: Int[Array, ""]
    norm_mean: Float[Array, ""]
    bad_steps: Int[Array, ""]
    skipped: Int[Array, ""]


def compute_dtype(run: Run) -> jnp.dtype:
    """The type of activations: as configured, or what suits the first device."""
    return jnp.dtype(default_dtype(jax.devices()[0]) if run.dtype == "auto" else run.dtype)


def is_stacked(run: Run) -> bool:
    """Whether layers are stacked: as configured, or for more than eight layers off the CPU."""
    if run.layers != "auto":
        return run.layers == "stacked"
    return jax.default_backend() != "cpu" and run.model.num_layers > 8


def build_model(run: Run, key: Array) -> Transformer:
    """The model of `run` with initial weights."""
    return Transformer(
        run.model,
        key,
        dtype=compute_dtype(run),
        remat=run.remat,
        stacked=is_stacked(run),
        exchange=run.mesh.exchange,
        context_exchange=run.mesh.context_exchange,
        cut_over_data=run.mesh.cut_over_data,
        matmul=run.matmul,
        lora=run.lora,
    )


def make_skeleton(run: Run) -> Skeleton:
    """The structure of the model of `run`; allocates nothing."""
    return Skeleton(jax.eval_shape(lambda: build_model(run, jax.random.key(run.seed))))


def parameter_dtypes(skeleton: Skeleton, dtype: Any) -> dict[str, jnp.dtype]:
    """The type of each weight where matrices are of `dtype`: all else is in float32. Those in 8 bits are left out.

    Else are vectors (norms, biases, those of each expert too), the router, whose close scores decide where tokens go,
    and adapters: few numbers, and the most sensitive ones.
    """

    def coarse(axes: tuple[str | None, ...]) -> bool:
        own = tuple(axis for axis in axes if axis != "expert")
        return is_matrix(own) and "router" not in own

    axes = skeleton.axes
    stored, frozen = jnp.dtype(dtype), skeleton.frozen
    return {
        name: stored if coarse(axes[name]) and name in (frozen or skeleton.weights) else jnp.dtype("float32")
        for name in (skeleton.weights | frozen) - skeleton.narrow
    }


def initial_state(run: Run, skeleton: Skeleton, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; call it under `jax.jit` or `jax.eval_shape`."""
    params, extra = skeleton.split(build_model(run, jax.random.key(run.seed)))
    dtypes = parameter_dtypes(skeleton, run.parameter_dtype)
    # One buffer per counter: the state is donated, and a buffer can be given away only once.
    return TrainState(
        {name: array.astype(dtypes[name]) for name, array in params.items()},
        {name: array.astype(dtypes.get(name, array.dtype)) for name, array in extra.items()},
        optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        norm_mean=jnp.zeros((), jnp.float32),
        bad_steps=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )


def flatten(state: TrainState) -> dict[str, Any]:
    """The state as one flat dictionary, by path: the form of a checkpoint."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): leaf for path, leaf in leaves}


def unflatten(template: TrainState, flat: dict[str, Any]) -> TrainState:
    """The inverse of `flatten`, for a state structured like `template`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_name(path)], template)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def state_shardings(state: TrainState, skeleton: Skeleton, mesh: jax.sharding.Mesh, run: Run) -> TrainState:
    """A tree like `state` of shardings: weights and their moments as between steps of `run`; all else everywhere."""
    axes, within = skeleton.axes, weights_table(run.mesh.cut_over_data)

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next((part for part in (_part(key) for key in reversed(path)) if part in axes), None)
        if name is None or leaf.ndim < len(axes[name]):
            return NamedSharding(mesh, P())
        if run.optimizer.shard_over_data:
            return resting_sharding(axes[name], leaf.shape, mesh, within)
        return array_sharding(axes[name], leaf.ndim, mesh, within)

    return jax.tree_util.tree_map_with_path(one, state)


def _part(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))


def abstract_state(
    run: Run, skeleton: Skeleton, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes, types and shardings of the state; allocates nothing."""
    shapes = jax.eval_shape(lambda: initial_state(run, skeleton, optimizer))
    shardings = state_shardings(shapes, skeleton, mesh, run)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def create_state(
    run: Run, skeleton: Skeleton, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state before the first step, each device making its own part."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(run, skeleton, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(lambda: initial_state(run, skeleton, optimizer), out_shardings=shardings)()
