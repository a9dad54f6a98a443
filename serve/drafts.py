"""Guesses by the model's own block for multi-token prediction: what it says of the tokens after the next.

After each step the block reads the positions that the step has read, each with the token that came after it; its keys
and values lie in the pages that the model's have. What it predicts at the last of them is the first guess; with its own
hidden state and that guess it makes the next one (DeepSeek-V3, arXiv 2412.19437, sections 2.2 and 5.4.3). A guess is
drawn with the randomness of its place, and so is the likelier to be what the model itself will draw there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from model.cache import Cache, KVType, Stored, empty_layer
from model.config import ModelConfig
from model.forward import continuation, draft_further, unembed
from model.transformer import Transformer
from serve.rows import Rows
from serve.sampling import sample
from sharding.rules import constrain

DRAFTED = -1
"""In the place of a guess: the one that lies on the device."""


@struct.dataclass
class Drafts:
    """Keys and values of the block, in pages; and of each slot the guesses of what comes after its last token."""

    stored: Stored
    token_SG: Int[Array, "S G"]


def can_draft(config: ModelConfig) -> bool:
    """Whether the model has a block that can make guesses; one that is linear would need its own way back."""
    return config.mtp_layers > 0 and config.attention_kind(config.mtp_layer) != "linear"


def empty_drafts(
    config: ModelConfig, slots: int, pages: int, page: int, dtype: jnp.dtype, kv_type: KVType, guesses: int
) -> Drafts | None:
    """Nothing yet; None where no guesses are wanted."""
    if not guesses:
        return None
    stored = empty_layer(config, config.mtp_layer, slots, pages, page, dtype, kv_type)
    return Drafts(stored, jnp.zeros((slots, guesses), jnp.int32))


def draft(
    model: Transformer,
    drafts: Drafts,
    rows: Rows,
    hidden_RTD: Float[Array, "R T D"],
    following_RT: Int[Array, "R T"],
    kept_R: Int[Array, " R"],
    drawn_R: Int[Array, " R"],
    slot_R: Int[Array, " R"],
    *,
    page: int,
    vocab_limit: int,
) -> Drafts:
    """Guesses of what comes after the tokens that a step has drawn.

    Args:
        hidden_RTD: of the tokens that the step has read. following_RT: the token after each of them.
        kept_R: how many of them stand. drawn_R: tokens that the step has drawn. slot_R: of rows that go on; others are
            out of range.
    """
    guesses_RG: list[Array] = []
    guesses = drafts.token_SG.shape[1]
    cache = Cache((drafts.stored,), constrain(rows.length_R, "batch"), constrain(rows.table_RX, "batch", None), page)
    valid_RT = jnp.arange(hidden_RTD.shape[1]) < kept_R[:, None]
    last_R11 = jnp.maximum(kept_R - 1, 0)[:, None, None]
    for index in range(guesses):
        lay = constrain(following_RT, "batch", None), cache.lengths_B, constrain(valid_RT, "batch", None)
        further_RTD, cache = draft_further(model, continuation(*lay), hidden_RTD, cache)
        last_RD = jnp.take_along_axis(further_RTD, constrain(last_R11, "batch", None, None), axis=1)[:, 0]
        with jax.named_scope("sample"):
            step_R = rows.step_R + drawn_R + index
            token_R, _ = sample(unembed(model, last_RD), rows.sampling, step_R, vocab_limit=vocab_limit)
        guesses_RG.append(constrain(token_R, None))
        hidden_RTD, following_RT, last_R11 = last_RD[:, None], token_R[:, None], jnp.zeros_like(last_R11)
        # A guess's own keys and values are written over when it is known; there may be no page for them.
        valid_RT = ((kept_R > 0) & (cache.lengths_B < rows.room_R))[:, None]
    token_SG = drafts.token_SG.at[slot_R].set(jnp.stack(guesses_RG, axis=1), mode="drop")
    return Drafts(cache.layers[0], token_SG)
