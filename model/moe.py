"""Mixture of experts: route, compute, combine; and what is counted for balance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from model.config import ModelConfig, MoEConfig
from model.expert_weights import Experts
from model.experts import on_received_rows, run_experts
from model.layers import FeedForward, Keys, weight
from model.linear import Matmul
from model.quantization import Quantized
from sharding.expert_parallel import left_out, spread_experts
from sharding.mesh import Exchange, platform
from sharding.rules import DECODE, TRAIN, constrain


class SelectionBias(nnx.Variable):
    """Added to scores for choosing only; moved by the train step, never by a gradient (arXiv 2408.15664)."""


@struct.dataclass
class RouterStats:
    """What balance needs of one layer's routing, summed over the tokens that are not padding.

    counts_E: tokens that chose each expert (sums to C times the tokens).
    scores_E: sum of each expert's share of a token's scores (sums to the tokens).
    z: sum of the squared log-partition of the router's logits (ST-MoE, arXiv 2202.08906, equation 5).
    dropped: pairs of token and expert that were left out, see `sharding.expert_parallel`.
    """

    counts_E: Float[Array, " E"]
    scores_E: Float[Array, " E"]
    z: Float[Array, ""]
    dropped: Float[Array, ""]


def best_groups(choice_ME: Array, moe: MoEConfig) -> Array:
    """`choice` with the experts outside the best groups at minus infinity.

    A group's score is the sum of its two best experts (DeepSeek-V3, arXiv 2412.19437).
    """
    tokens = choice_ME.shape[0]
    grouped = choice_ME.reshape(tokens, moe.num_groups, -1)
    top2, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, kept = jax.lax.top_k(top2.sum(-1), moe.groups_per_token)
    keep = jnp.zeros((tokens, moe.num_groups), bool).at[jnp.arange(tokens)[:, None], kept].set(True)
    return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(choice_ME.shape)


def route(
    logits_ME: Float[Array, "M E"],
    valid_M: Array,
    moe: MoEConfig,
    bias_E: Array | None = None,
    replay_MC: Int[Array, "M C"] | None = None,
) -> tuple[Int[Array, "M C"], Float[Array, "M C"], RouterStats]:
    """Which experts each token goes to, and with what weight; everything in float32.

    Padding is sent to expert E, which does not exist, with weight 0. With `replay` the choice is given
    (routing replay, arXiv 2507.18071) and only the weights are computed.
    """
    logits_ME = logits_ME.astype(jnp.float32)
    if moe.score == "softmax":
        scores_ME = jax.nn.softmax(logits_ME, axis=-1)
        shares_ME = scores_ME
    else:
        scores_ME = jax.nn.sigmoid(logits_ME)
        shares_ME = scores_ME / (scores_ME.sum(-1, keepdims=True) + 1e-20)
    if replay_MC is None:
        choice_ME = scores_ME if bias_E is None else scores_ME + bias_E
        if moe.num_groups > 1:
            choice_ME = best_groups(choice_ME, moe)
        _, ids_MC = jax.lax.top_k(jax.lax.stop_gradient(choice_ME), moe.experts_per_token)
    else:
        ids_MC = replay_MC
    weights_MC = jnp.take_along_axis(scores_ME, jnp.minimum(ids_MC, moe.num_experts - 1), axis=-1)
    if moe.normalize:
        weights_MC = weights_MC / (weights_MC.sum(-1, keepdims=True) + 1e-20)
    weights_MC = jnp.where(valid_M[:, None], weights_MC * moe.scale, 0.0)
    ids_MC = jnp.where(valid_M[:, None], ids_MC, moe.num_experts).astype(jnp.int32)
    counts_E = jnp.bincount(ids_MC.reshape(-1), length=moe.num_experts).astype(jnp.float32)
    log_partition_M = jax.nn.logsumexp(logits_ME, axis=-1)
    stats = RouterStats(
        counts_E=counts_E,
        scores_E=jnp.sum(jnp.where(valid_M[:, None], shares_ME, 0.0), axis=0),
        z=jnp.sum(jnp.where(valid_M, jnp.square(log_partition_M), 0.0)),
        dropped=jnp.zeros((), jnp.float32),
    )
    return ids_MC, weights_MC, stats


def axes_of(leaf: Any) -> Any:
    """The logical axes of a weight; of one that is made of several arrays, in their places."""
    axes: Any = leaf.get_metadata()["axes"]
    value = leaf[...]
    if isinstance(value, Quantized) and not isinstance(axes, Quantized):
        return Quantized(axes, axes, value.outputs)
    return axes


class MoE(nnx.Module):
    """A routed SwiGLU, with an optional shared expert that every token passes through."""

    def __init__(self, config: ModelConfig, keys: Keys):
        moe, D, layers = config.moe, config.hidden_size, config.num_layers
        E, F = moe.num_experts, moe.intermediate_size
        self.router_DE = weight(keys, (D, E), ("router", None), D)
        self.router_bias_E = nnx.Param(jnp.zeros(E, jnp.float32), axes=(None,)) if moe.bias else None
        axes = ("expert", "embed", "mlp")
        self.gate_EDF = weight(keys, (E, D, F), axes, D, sums=(1,))
        self.up_EDF: Any = weight(keys, (E, D, F), axes, D, sums=(1,))
        self.down_EDF = weight(keys, (E, D, F), axes, F, residual_layers=layers, sums=(2,))
        for name, size, axis in (("gate_bias_EF", F, "mlp"), ("up_bias_EF", F, "mlp"), ("down_bias_ED", D, "embed")):
            bias = nnx.Param(jnp.zeros((E, size), jnp.float32), axes=("expert", axis)) if moe.bias else None
            setattr(self, name, bias)
        shared = moe.shared_intermediate_size
        self.shared = FeedForward(D, shared, layers, keys) if shared else None
        self.shared_gate_D = weight(keys, (D,), ("router",), D) if shared and moe.shared_gate else None
        self.bias_E = SelectionBias(jnp.zeros(E, jnp.float32), axes=(None,)) if moe.selection_bias else None
        self.config = moe

    def join(self) -> None:
        """Puts gate and up side by side, where that is next to nothing: in the part that this device stores of them.

        On TPUs one grouped product then reads the rows once, and their gradient is one product, not a sum of two.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if not (isinstance(self.gate_EDF, nnx.Variable) and isinstance(self.up_EDF, nnx.Variable)):
            return
        if platform() == "cpu" or "fsdp" not in mesh.manual_axes or mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1:
            return
        both_EDX = jnp.concatenate([self.gate_EDF[...], self.up_EDF[...]], axis=-1)
        self.gate_EDF, self.up_EDF = self.gate_EDF.replace(both_EDX), None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        valid_BT: Array,
        *,
        training: bool,
        exchange: Exchange = "auto",
        matmul: Matmul = "plain",
        replay_BTC: Int[Array, "B T C"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats, Int[Array, "B T C"]]:
        """Output, statistics and the experts chosen (E for padding)."""
        dtype, shape = x_BTD.dtype, x_BTD.shape
        x_MD = x_BTD.reshape(-1, shape[-1])
        with jax.named_scope("route"):
            logits_ME = x_MD.astype(jnp.float32) @ self.router_DE[...].astype(jnp.float32)
            if self.router_bias_E is not None:
                logits_ME += self.router_bias_E[...].astype(jnp.float32)
            bias_E = None if self.bias_E is None else self.bias_E[...]
            replay_MC = None if replay_BTC is None else replay_BTC.reshape(-1, replay_BTC.shape[-1])
            ids_MC, weights_MC, stats = route(logits_ME, valid_BT.reshape(-1), self.config, bias_E, replay_MC)
        stats = replace(stats, dropped=left_out(exchange, stats.counts_E, ids_MC.shape))
        leaves = {name: leaf for name in Experts._fields if (leaf := getattr(self, name)) is not None}
        unset = dict.fromkeys(Experts._fields)
        kind = self.config.activation
        with jax.named_scope("experts"):
            y_MD = spread_experts(
                x_MD,
                ids_MC,
                weights_MC.astype(dtype),
                {name: leaf[...].astype(dtype) for name, leaf in leaves.items()},
                axes={name: axes_of(leaf) for name, leaf in leaves.items()},
                table=TRAIN if training else DECODE,
                exchange=exchange,
                compute=lambda x, ids, weights, params, shards: run_experts(
                    x,
                    ids,
                    weights,
                    Experts(**{**unset, **params}),
                    training=training,
                    activation=kind,
                    shards=shards,
                    matmul=matmul,
                ),
                apply=lambda rows, share, counts, params: on_received_rows(
                    rows, share, counts, Experts(**{**unset, **params}), kind, matmul
                ),
            )
        y_BTD = constrain(y_MD.reshape(shape), "batch", "length", "embed")
        if self.shared is not None:
            shared_BTD = self.shared(x_BTD, matmul)
            if self.shared_gate_D is not None:
                logit_BT = x_BTD @ self.shared_gate_D[...].astype(dtype)
                shared_BTD = shared_BTD * jax.nn.sigmoid(logit_BT)[..., None]
            y_BTD = y_BTD + shared_BTD
        return y_BTD, stats, ids_MC.reshape(*shape[:-1], -1)
