"""The model that a run trains, as others use it: drawing replies, grading them, writing samples. Nothing is copied that
is right already."""

from __future__ import annotations

import jax
from jaxtyping import Array

from configs.run import Run
from model.forward import forward
from model.lora import merge, widen
from model.transformer import Transformer
from model.tree import Skeleton, make_skeleton, unstack
from train.logprobs import score_targets
from train.losses import batch_of, replay_of
from train.state import TrainState, compute_dtype, is_stacked

Rows = dict[str, Array]


def model_of(run: Run, skeleton: Skeleton, state: TrainState) -> Transformer:
    """The weights of `state` as a model; with adapters, as one to which they are added."""
    if not run.lora.rank:
        return skeleton.merge(state.params, state.extra)
    plain = make_skeleton(run.model, stacked=False, dtype=compute_dtype(run))
    arrays = {**state.params, **state.extra}
    listed = unstack(arrays, run.model) if is_stacked(run) else arrays
    merged = jax.jit(lambda arrays: merge(widen(arrays, plain.shapes), plain.sums, run.lora))(listed)
    weights = {name: leaf for name, leaf in merged.items() if name in plain.weights}
    return plain.merge(weights, {name: leaf for name, leaf in merged.items() if name not in plain.weights})


def logprobs_of(model: Transformer, rows: Rows, temperature: float = 1.0) -> tuple[Array, Array]:
    """Log-probabilities of the targets of a batch, and those at a temperature; float32 `[B, T]`."""
    hidden_BTD = forward(model, batch_of(rows), replay=replay_of(rows)).hidden_BTD
    scores = score_targets(model, hidden_BTD, rows["targets"], temperature)
    return scores.logprob_BT, scores.tempered_BT
