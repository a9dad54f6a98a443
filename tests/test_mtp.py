"""Law: the block for multi-token prediction sees one token more than the model, and predicts the one after it."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from tiny import MOE, make_rows, make_run

from configs.run import LossConfig
from model.forward import Batch, embed, forward, predict_further, unembed
from model.transformer import Transformer
from model.tree import Skeleton
from train.losses import next_token, no_parts, totals

CONFIG = replace(MOE, mtp_layers=1)


def model() -> Transformer:
    return jax.jit(lambda: Transformer(CONFIG, jax.random.key(0)))()


def test_the_loss_by_hand() -> None:
    """Of each token whose successor's successor stands in its document, weighted as its successor is."""
    own, run = model(), make_run(CONFIG)
    rows = make_rows(run)
    arrays = {name: jnp.asarray(value) for name, value in rows.items()}
    batch = Batch(arrays["tokens"], arrays["positions"], arrays["segments"])
    logits = unembed(own, predict_further(own, batch, forward(own, batch).hidden_BTD)[0])
    table, total = np.asarray(jax.nn.log_softmax(logits)), 0.0
    for row, column in np.ndindex(rows["tokens"].shape):
        if column + 1 < rows["tokens"].shape[1] and rows["segments"][row, column] == rows["segments"][row, column + 1]:
            weight, target = rows["weights"][row, column + 1], rows["targets"][row, column + 1]
            total -= weight * table[row, column, target]
    sums = totals(arrays)
    plain, _ = next_token(own, arrays, sums, no_parts(own), LossConfig(balance=0, router_z_loss=0, mtp=0))
    both, parts = next_token(own, arrays, sums, no_parts(own), LossConfig(balance=0, router_z_loss=0, mtp=0.5))
    np.testing.assert_allclose(parts.mtp_loss, total / sums.weight, rtol=1e-5)
    np.testing.assert_allclose(both - plain, 0.5 * total / sums.weight, rtol=1e-4)


def test_it_sees_one_token_further_and_no_more() -> None:
    own, length = model(), 9
    tokens = jnp.arange(length)[None]
    batch = Batch(tokens, tokens, jnp.ones_like(tokens))
    weights = jax.random.normal(jax.random.key(1), (CONFIG.hidden_size,))
    skeleton = Skeleton(own)
    params, extra = skeleton.split(own)

    def outputs(embedding_VD: jax.Array) -> jax.Array:
        changed = skeleton.merge({**params, "embedding_VD": embedding_VD}, extra)
        return predict_further(changed, batch, forward(changed, batch).hidden_BTD)[0][0] @ weights

    flows = np.abs(jax.jit(jax.jacrev(outputs))(params["embedding_VD"])[:, :length]).sum(-1) > 0
    # The last token has no successor here: id 0 stands in for it, which is what it then sees.
    np.testing.assert_array_equal(flows[:-1], np.tri(length, length, 1, dtype=bool)[:-1])
    assert embed(own, tokens).shape == (1, length, CONFIG.hidden_size)


def test_its_router_is_counted_and_balanced() -> None:
    run = make_run(replace(CONFIG, moe=replace(CONFIG.moe, selection_bias=True)))
    own = jax.jit(lambda: Transformer(run.model, jax.random.key(0)))()
    rows = {name: jnp.asarray(value) for name, value in make_rows(run).items()}
    _, parts = next_token(own, rows, totals(rows), no_parts(own), run.loss)
    assert parts.counts_LE.shape == (run.model.num_moe_layers + 1, run.model.moe.num_experts)
    assert (parts.counts_LE.sum(-1) == parts.counts_LE[0].sum()).all()
    assert Skeleton(own).bias_layers["mtp.block.feed_forward.bias_E"] == [run.model.num_moe_layers]
