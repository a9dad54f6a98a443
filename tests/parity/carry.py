"""Weights between the Hugging Face layout and ours, in numpy; and our side of the comparison.

Ours is written here in one flat form whatever way the layers are held: `layers.3.attention.q_DNH`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.run import LossConfig
from model.config import ModelConfig
from model.forward import Batch, forward, unembed
from model.transformer import Remat, Transformer, stack_plan
from model.tree import Arrays, Skeleton
from train.losses import next_token, no_parts, totals

Weights = dict[str, np.ndarray]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the transformers model that `config` describes."""
    D, H, moe = config.hidden_size, config.head_dim, config.moe
    query, key_value = config.num_heads * H, config.num_kv_heads * H
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, D),
        "model.norm.weight": (D,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)

    def feed_forward(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (width, D)
        shapes[f"{prefix}.down_proj.weight"] = (D, width)

    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        for name, rows in (("q", query), ("k", key_value), ("v", key_value)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, D)
            if config.qkv_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (D, query)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (H,)
        if not config.is_moe(index):
            feed_forward(f"{layer}.mlp", config.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (moe.num_experts, D)
        shapes[f"{layer}.mlp.experts.gate_up_proj"] = (moe.num_experts, 2 * moe.intermediate_size, D)
        shapes[f"{layer}.mlp.experts.down_proj"] = (moe.num_experts, D, moe.intermediate_size)
        if moe.shared_intermediate_size:
            feed_forward(f"{layer}.mlp.shared_expert", moe.shared_intermediate_size)
            shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, D)
    return shapes


def draw(config: ModelConfig, seed: int, deviation: float = 0.2) -> Weights:
    """Every parameter, norms and biases too, from one normal distribution, in the order of the sorted names."""
    generator = np.random.RandomState(seed)  # numpy promises that this stream never changes; default_rng's may
    shapes = hf_shapes(config)
    return {name: generator.normal(0, deviation, shapes[name]).astype(np.float32) for name in sorted(shapes)}


def to_ours(hf: Mapping[str, np.ndarray], config: ModelConfig) -> Weights:
    """Hugging Face's arrays in our layout; views where possible. Raises on a missing or an unused name."""
    left = dict(hf)
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    ours = {"embedding_VD": left.pop("model.embed_tokens.weight"), "norm.weight": left.pop("model.norm.weight")}
    if not config.tie_embeddings:
        ours["head_DV"] = left.pop("lm_head.weight").T

    def feed_forward(source: str, target: str) -> None:
        for name, suffix in (("gate", "DF"), ("up", "DF"), ("down", "FD")):
            ours[f"{target}.{name}_{suffix}"] = left.pop(f"{source}.{name}_proj.weight").T

    for index in range(config.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        ours[f"{target}.attention_norm.weight"] = left.pop(f"{source}.input_layernorm.weight")
        ours[f"{target}.feed_forward_norm.weight"] = left.pop(f"{source}.post_attention_layernorm.weight")
        for name, letter, heads in (("q", "N", N), ("k", "K", K), ("v", "K", K)):
            projection = left.pop(f"{source}.self_attn.{name}_proj.weight")
            ours[f"{target}.attention.{name}_D{letter}H"] = projection.T.reshape(D, heads, H)
            if config.qkv_bias:
                bias = left.pop(f"{source}.self_attn.{name}_proj.bias")
                ours[f"{target}.attention.{name}_bias_{letter}H"] = bias.reshape(heads, H)
            if config.qk_norm and name != "v":
                ours[f"{target}.attention.{name}_norm.weight"] = left.pop(f"{source}.self_attn.{name}_norm.weight")
        ours[f"{target}.attention.o_NHD"] = left.pop(f"{source}.self_attn.o_proj.weight").T.reshape(N, H, D)
        source, target = f"{source}.mlp", f"{target}.feed_forward"
        if not config.is_moe(index):
            feed_forward(source, target)
            continue
        ours[f"{target}.router_DE"] = left.pop(f"{source}.gate.weight").T
        gate_up = left.pop(f"{source}.experts.gate_up_proj")
        width = config.moe.intermediate_size
        ours[f"{target}.gate_EDF"] = gate_up[:, :width].transpose(0, 2, 1)
        ours[f"{target}.up_EDF"] = gate_up[:, width:].transpose(0, 2, 1)
        ours[f"{target}.down_EDF"] = left.pop(f"{source}.experts.down_proj")
        if config.moe.shared_intermediate_size:
            feed_forward(f"{source}.shared_expert", f"{target}.shared")
            ours[f"{target}.shared_gate_D"] = left.pop(f"{source}.shared_expert_gate.weight")[0]
    if left:
        raise ValueError(f"nothing takes {sorted(left)}")
    return ours


def to_hf(ours: Mapping[str, np.ndarray], config: ModelConfig) -> Weights:
    """The inverse of `to_ours`, found by carrying each entry's number across."""
    shapes = hf_shapes(config)
    sizes = np.cumsum([0] + [int(np.prod(shape)) for shape in shapes.values()])
    starts = dict(zip(shapes, sizes, strict=False))
    numbers = {name: starts[name] + np.arange(np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    flat = np.full(sizes[-1], np.nan, np.float32)
    carried = to_ours(numbers, config)
    if carried.keys() != ours.keys():
        raise ValueError(f"parameters differ: {sorted(carried.keys() ^ ours.keys())}")
    for name, where in carried.items():
        flat[where] = ours[name]
    return {name: flat[starts[name] + np.arange(np.prod(shape))].reshape(shape) for name, shape in shapes.items()}


def flat_names(path: str, config: ModelConfig, stacked: bool) -> list[str]:
    """The flat names of what the model keeps at `path`: one per repeat of its stack, along the first axis."""
    if not path.startswith("stacks."):
        return [path]
    _, stack, _, position, rest = path.split(".", 4)
    pattern, repeats = stack_plan(config, stacked)[int(stack)]
    return [f"layers.{pattern[int(position)] + repeat * len(pattern)}.{rest}" for repeat in range(repeats)]


def flatten(arrays: Mapping[str, Any], config: ModelConfig, stacked: bool) -> Weights:
    """The model's arrays by path (weights, gradients), layer by layer."""
    flat: Weights = {}
    for path, value in arrays.items():
        own, array = flat_names(path, config, stacked), np.asarray(value)
        flat.update(zip(own, array if len(own) > 1 else [array], strict=True))
    return flat


def build(
    config: ModelConfig, hf: Mapping[str, np.ndarray], *, stacked: bool = False, remat: Remat = "none"
) -> Transformer:
    """A Transformer with these weights."""
    # The shapes alone: drawing initial weights that are overwritten would cost most of a test's time.
    empty = jax.eval_shape(lambda key: Transformer(config, key, stacked=stacked, remat=remat), jax.random.key(0))
    skeleton, ours, arrays = Skeleton(empty), to_ours(hf, config), {}
    for path, shape in skeleton.shapes.items():
        parts = [ours.pop(name) for name in flat_names(path, config, stacked)]
        arrays[path] = jnp.asarray(np.stack(parts) if len(parts) > 1 else parts[0], jnp.float32)
        if arrays[path].shape != shape:
            raise ValueError(f"{path} is {shape}, not {arrays[path].shape}")
    if ours:
        raise ValueError(f"the model has no place for {sorted(ours)}")
    return skeleton.merge(arrays, {})


def example(config: ModelConfig, seed: int, lengths: tuple[int, ...] = (12, 7)) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens `[B, T]` and the number of them in each row that are real; the rest is padding."""
    tokens_BT = np.random.RandomState(seed).randint(0, config.vocab_size, (len(lengths), max(lengths)))
    return tokens_BT, np.array(lengths)


def batch_of(tokens_BT: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """A batch row's arrays for sequences of `lengths` tokens, padded on the right."""
    steps = np.arange(tokens_BT.shape[1])
    real_BT = steps < lengths[:, None]
    return {
        "tokens": np.where(real_BT, tokens_BT, 0).astype(np.int32),
        "targets": np.where(real_BT, np.roll(tokens_BT, -1, axis=1), 0).astype(np.int32),
        "weights": (steps < lengths[:, None] - 1).astype(np.float32),
        "positions": np.broadcast_to(steps, tokens_BT.shape).astype(np.int32),
        "segments": real_BT.astype(np.int32),
    }


@jax.jit
def logits(model: Transformer, rows: dict[str, jax.Array]) -> jax.Array:
    """`[B, T, V]`: small here."""
    batch = Batch(rows["tokens"], rows["positions"], rows["segments"])
    return unembed(model, forward(model, batch).hidden_BTD)


def training_step(model: Transformer, rows: dict[str, np.ndarray], balance: float = 0.0) -> tuple[float, Weights]:
    """Loss of one step, and its gradients by Hugging Face's names."""
    skeleton, config = Skeleton(model), LossConfig(balance=balance, router_z_loss=0.0)
    params, extra = skeleton.split(model)

    def function(params: Arrays, rows: dict[str, jax.Array]) -> jax.Array:
        own = skeleton.merge(params, extra)
        return next_token(own, rows, totals(rows), no_parts(own), config)[0]

    loss, gradients = jax.jit(jax.value_and_grad(function))(params, rows)
    return float(loss), to_hf(flatten(gradients, model.config, model.stacked), model.config)
