"""Law: from the same random weights, transformers and we compute the same, in float32, whichever seed is drawn.

Logits of padded, packed and cached sequences; loss and every gradient of a training step; the balance loss; and the
weights after AdamW. `QMAX_PARITY_SEED=N` repeats a run: every test prints the seed it used.
"""

from __future__ import annotations

import functools
import os
import secrets
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.run import DataConfig, LossConfig, OptimizerConfig, Run
from model.cache import empty_cache
from model.forward import continuation, forward, unembed
from model.tree import Skeleton
from train.losses import next_token
from train.optimizer import make_optimizer
from train.state import initial_state
from train.step import make_train_step

from . import carry, hf_models

pytestmark = [
    pytest.mark.skipif(os.environ.get("QMAX_PARITY") != "1", reason="./run.sh test --parity"),
    # What torch and transformers warn of is theirs to mend.
    pytest.mark.filterwarnings("default"),
]

SEED = int(os.environ.get("QMAX_PARITY_SEED") or secrets.randbits(31))
TOLERANCE = 1e-5
GRADIENTS = 1e-4
"""Share of a leaf's largest gradient. Most seeds stay below 2e-6, one in a hundred reaches 7e-6."""
FORMS = [(False, "none"), (True, "none"), (False, "block"), (True, "dots")]
"""Layers stacked or not, and what the backward pass recomputes."""
RICHEST = "qwen2_moe"
"""The case with a stack of each kind and most kinds of leaves: it alone goes through every form."""
CASE_FORMS = [(name, *form) for name in hf_models.CASES for form in (FORMS if name == RICHEST else FORMS[::3])]
ROUTED = [name for name, case in hf_models.CASES.items() if case.config.num_moe_layers]


@pytest.fixture(autouse=True)
def _seed():
    print(f"QMAX_PARITY_SEED={SEED}")


class Example(NamedTuple):
    """One case with random weights, and what transformers makes of it."""

    case: hf_models.Case
    weights: carry.Weights
    tokens_BT: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray
    loss: float
    gradients: carry.Weights


@functools.cache
def example(name: str) -> Example:
    case = hf_models.CASES[name]
    weights = carry.draw(case.config, SEED)
    tokens_BT, lengths = carry.example(case.config, SEED)
    theirs = hf_models.run(hf_models.build(case, weights), tokens_BT, lengths)
    return Example(case, weights, tokens_BT, lengths, *theirs)


def assert_same_gradients(ours: carry.Weights, theirs: carry.Weights) -> None:
    assert ours.keys() == theirs.keys()
    for leaf, gradient in theirs.items():
        difference = np.abs(ours[leaf] - gradient).max() / np.abs(gradient).max()
        assert difference <= GRADIENTS, f"{leaf}: {difference:.1e} of its largest gradient"


@pytest.mark.parametrize("name", hf_models.CASES)
def test_logits_padded_and_packed(name: str):
    """Padding before (theirs) or behind (ours) a sequence, and other documents in its row, change nothing."""
    e = example(name)
    model = carry.build(e.case.config, e.weights)
    rows = carry.batch_of(e.tokens_BT, e.lengths)
    real_BT = rows["segments"] > 0
    assert np.abs(carry.logits(model, rows) - e.logits)[real_BT].max() <= TOLERANCE

    packed = {key: value[real_BT][None] for key, value in rows.items()}
    packed["segments"] = np.repeat(np.arange(len(e.lengths)) + 1, e.lengths)[None].astype(np.int32)
    assert np.abs(carry.logits(model, packed)[0] - e.logits[real_BT]).max() <= TOLERANCE


@pytest.mark.parametrize(("name", "stacked"), [*((name, False) for name in hf_models.CASES), (RICHEST, True)])
def test_prefill_and_decode(name: str, stacked: bool):
    """A prompt of which the rows hold 5 and 3 tokens, then one token at a time, is transformers' whole forward."""
    e = example(name)
    model = carry.build(e.case.config, e.weights, stacked=stacked)

    @jax.jit
    def step(model, batch, cache):
        output = forward(model, batch, cache)
        return unembed(model, output.hidden_BTD), output.cache

    prompt = np.array([5, 3])
    cache = empty_cache(e.case.config, 2, 16, jnp.float32)
    valid_BT = np.arange(5) < prompt[:, None]
    batch = continuation(jnp.asarray(e.tokens_BT[:, :5]), jnp.zeros(2, jnp.int32), jnp.asarray(valid_BT))
    logits, cache = step(model, batch, cache)
    assert np.abs(logits - e.logits[:, :5])[valid_BT].max() <= TOLERANCE
    done = prompt
    while (done < e.lengths).any():
        going_B1 = (done < e.lengths)[:, None]
        column = np.minimum(done, e.lengths - 1)
        batch = continuation(
            jnp.asarray(e.tokens_BT[np.arange(2), column][:, None]), cache.lengths_B, jnp.asarray(going_B1)
        )
        logits, cache = step(model, batch, cache)
        difference = np.abs(logits[:, 0] - e.logits[np.arange(2), column])
        assert difference[going_B1[:, 0]].max() <= TOLERANCE
        done = done + going_B1[:, 0]
    assert (np.asarray(cache.lengths_B) == e.lengths).all()


@pytest.mark.parametrize(("name", "stacked", "remat"), CASE_FORMS)
def test_loss_and_every_gradient(name: str, stacked: bool, remat: carry.Remat):
    e = example(name)
    model = carry.build(e.case.config, e.weights, stacked=stacked, remat=remat)
    loss, gradients = carry.training_step(model, carry.batch_of(e.tokens_BT, e.lengths))
    assert abs(loss - e.loss) <= TOLERANCE
    assert_same_gradients(gradients, e.gradients)


@pytest.mark.parametrize("name", ROUTED)
def test_balance_loss(name: str):
    """Where one layer is routed; with several, transformers pools their statistics and we do not."""
    case = hf_models.CASES[name]
    last = case.config.num_layers
    options = {**case.options, "decoder_sparse_step": last, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    case = replace(case, options=options, config=replace(case.config, moe=replace(case.config.moe, every=last)))
    weights = carry.draw(case.config, SEED)
    tokens_BT, lengths = carry.example(case.config, SEED)
    _, loss, gradients = hf_models.run(hf_models.build(case, weights), tokens_BT, lengths)
    model, batch = carry.build(case.config, weights), carry.batch_of(tokens_BT, lengths)
    ours = carry.training_step(model, batch, balance=0.1)
    assert abs(ours[0] - loss) <= TOLERANCE
    assert ours[0] - carry.training_step(model, batch)[0] > 0.1  # it counts: even load gives 0.1 per choice
    assert_same_gradients(ours[1], gradients)


@pytest.mark.parametrize(("name", "stacked"), [*((name, False) for name in hf_models.CASES), (RICHEST, True)])
def test_adamw(name: str, stacked: bool):
    """Two clipped updates through the real train step: each moves weights by up to 1e-2.

    epsilon is large, so that the update is a smooth function of the gradient: at 1e-8 it is its sign, and
    where a gradient is rounding noise alone two right answers are far apart.
    """
    import torch

    e = example(name)
    hyper = OptimizerConfig(
        learning_rate=1e-2, schedule="constant", warmup_steps=0, eps=1e-4, weight_decay=0.3, clip_norm=0.2
    )
    theirs = hf_models.build(e.case, e.weights)
    # A norm, a bias and the shared expert's gate are no matrices; transformers keeps the last as one of one row.
    decayed = [p for n, p in theirs.named_parameters() if p.ndim > 1 and "shared_expert_gate" not in n]
    others = [p for n, p in theirs.named_parameters() if p.ndim == 1 or "shared_expert_gate" in n]
    groups = [{"params": decayed, "weight_decay": hyper.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=hyper.learning_rate, betas=(hyper.beta1, hyper.beta2), eps=hyper.eps)

    model = carry.build(e.case.config, e.weights, stacked=stacked)
    run = Run(
        model=e.case.config,
        data=DataConfig(batch_size=2, sequence_length=e.tokens_BT.shape[1]),
        optimizer=hyper,
        loss=LossConfig(balance=0.0, router_z_loss=0.0),
        layers="stacked" if stacked else "list",
        dtype="float32",
    )
    skeleton = Skeleton(model)
    ours = make_optimizer(run.optimizer, run.steps, skeleton)
    step = jax.jit(make_train_step(run, skeleton, functools.partial(next_token, config=run.loss), ours))
    state = jax.eval_shape(lambda: initial_state(run, skeleton, ours))
    params, extra = skeleton.split(model)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
    state = zeros.replace(params=params, extra=extra, opt=ours.init(params))
    for seed in (SEED, SEED + 1):
        tokens_BT, lengths = carry.example(e.case.config, seed)
        hf_models.run(theirs, tokens_BT, lengths)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), hyper.clip_norm)
        optimizer.step()
        state, metrics = step(state, carry.batch_of(tokens_BT, lengths))
        assert metrics["gradient_norm"] > hyper.clip_norm  # so clipping counts
    updated = carry.to_hf(carry.flatten(state.params, e.case.config, stacked), e.case.config)
    for leaf, weight in theirs.named_parameters():
        difference = np.abs(updated[leaf] - weight.detach().numpy()).max()
        assert difference <= 1e-2 * hyper.learning_rate, f"{leaf}: {difference:.1e}"
