"""Several tokens in one step: guesses of what comes next are read together, and kept as far as they come true.

The guess is that of the model's own block for multi-token prediction (`serve.drafts`) or, where it has none, what
followed the last time that the same few tokens came (prompt lookup): that costs nothing, and is good where replies
repeat what they were given, as in summaries, code and tools. A guess is kept only if it is the very token that is drawn
in its place, with the randomness of its place, so a reply is the same as without guesses (arXiv 2211.17192 keeps its
distribution; this keeps the reply).
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from model.adapters import Adapters
from model.forward import settle, unembed
from model.transformer import Transformer
from serve.drafts import DRAFTED, draft
from serve.rows import unpack_rows
from serve.steps import NOBODY, State, chosen_experts, draw, laid_out, read
from sharding.rules import constrain


def verify(
    model: Transformer,
    state: State,
    words_RW: Int[Array, "R W"],
    guesses_RT: Int[Array, "R T"],
    *,
    page: int,
    shards: int = 1,
    vocab_limit: int,
    adapters: Adapters | None = None,
    record: bool = False,
) -> tuple[State, tuple[Int[Array, "R T Y"], Int[Array, "R T L C"] | None]]:
    """Reads each row's last token and the guesses after it, and draws the token after each.

    Args:
        words_RW, page, shards, vocab_limit, adapters, record: as `serve.steps.step` has them; `count` is of the last
            token and the guesses. A row with penalties must have no guess: what is drawn would change what comes after.
        guesses_RT: the first column is not looked at; `DRAFTED` is the guess that lies on the device.

    Returns:
        The state, in which guesses that did not come true were never read, and of each row and place what `step` gives;
        places after the first wrong guess have the token -1.
    """
    rows = unpack_rows(words_RW)
    if adapters is not None:
        model = adapters.on(model, constrain(rows.adapter_R, "batch"))
    if state.drafts is not None:
        drafted_RG = state.drafts.token_SG[rows.slot_R]
        guesses_RT = guesses_RT.at[:, 1:].set(jnp.where(guesses_RT[:, 1:] == DRAFTED, drafted_RG, guesses_RT[:, 1:]))
    tokens_RT = guesses_RT.at[:, 0].set(state.last_S[rows.slot_R])
    count, length = tokens_RT.shape
    result = read(model, state, rows, tokens_RT, rows.count_R, page=page, shards=shards, undecided=True)
    logits = unembed(model, result.hidden_BTD.reshape(count * length, -1))
    place_T = jnp.arange(length)
    each = jax.tree.map(lambda x: jnp.repeat(x, length, axis=0), rows)
    each = replace(each, step_R=each.step_R + jnp.tile(place_T, count))
    with jax.named_scope("sample"):
        drawn, output = draw(logits, each, state.tables, vocab_limit)
    drawn_RT, output_RTY = drawn.reshape(count, length), output.reshape(count, length, -1)
    true_RT = (drawn_RT[:, :-1] == tokens_RT[:, 1:]) & (place_T[1:] < rows.count_R[:, None])
    kept_R = 1 + jnp.cumprod(true_RT, axis=1).sum(axis=1)
    read_R = jnp.minimum(kept_R, rows.count_R)
    assert result.cache is not None
    layers = settle(model, state.layers, result.cache, read_R)
    valid_RT = place_T < kept_R[:, None]
    there = (rows.keep_R > 0) & (rows.count_R > 0)
    slot_R = jnp.where(there, rows.slot_R, NOBODY)
    last_R = jnp.take_along_axis(drawn_RT, kept_R[:, None] - 1, axis=1)[:, 0]
    last_S = state.last_S.at[slot_R].set(constrain(last_R, None), mode="drop")
    slot_RT = constrain(jnp.where(valid_RT, slot_R[:, None], NOBODY), None, None)
    seen_SV = state.tables.seen_SV.at[slot_RT, constrain(drawn_RT, None, None)].add(1, mode="drop")
    output_RTY = output_RTY.at[:, :, 0].set(jnp.where(valid_RT, drawn_RT, -1))
    tables, drafts = replace(state.tables, seen_SV=seen_SV), state.drafts
    if drafts is not None:
        read_RT = result.hidden_BTD, drawn_RT, read_R, kept_R, slot_R
        drafts = draft(model, drafts, rows, *read_RT, page=page, vocab_limit=vocab_limit)
    state = laid_out(model.config, State(layers, last_S, tables, drafts))
    return state, (constrain(output_RTY, None, None, None), chosen_experts(result) if record else None)
