"""The model that a run trains, as others use it: drawing replies, grading them, writing samples. Nothing is copied that
is right already."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from configs.run import Run
from errors import UserError
from model.forward import Batch, forward
from model.load import layout, open_model
from model.lora import merge
from model.transformer import Transformer
from model.tree import Arrays, Skeleton, make_skeleton, unstack
from sharding.rules import TRAIN
from train.logprobs import score_targets
from train.state import TrainState, compute_dtype

Rows = dict[str, Array]


def model_of(run: Run, skeleton: Skeleton, state: TrainState) -> Transformer:
    """The weights of `state` as a model; with adapters, as one to which they are added."""
    if not run.lora.rank:
        return skeleton.merge(state.params, state.extra)
    plain = make_skeleton(run.model, stacked=False, dtype=compute_dtype(run))
    listed = unstack({**state.params, **state.extra}, run.model)
    merged = jax.jit(partial(merge, sums=plain.sums, config=run.lora))(listed)
    weights = {name: leaf for name, leaf in merged.items() if name in plain.weights}
    return plain.merge(weights, {name: leaf for name, leaf in merged.items() if name not in plain.weights})


def logprobs_of(model: Transformer, rows: Rows, temperature: float = 1.0) -> tuple[Array, Array]:
    """Log-probabilities of the targets of a batch, and those at a temperature; float32 `[B, T]`."""
    replay = jax.numpy.moveaxis(rows["experts"].astype("int32"), 2, 0) if "experts" in rows else None
    hidden_BTD = forward(model, Batch(rows["tokens"], rows["positions"], rows["segments"]), replay=replay).hidden_BTD
    scores = score_targets(model, hidden_BTD, rows["targets"], temperature)
    return scores.logprob_BT, scores.tempered_BT


class Reference:
    """The model that a run must not go too far from: its log-probabilities of the targets of a batch.

    Where adapters are trained it is the model without them, and takes no memory of its own.

    Raises:
        UserError: there is none, or it is of other sizes.
    """

    def __init__(self, run: Run, skeleton: Skeleton, mesh: jax.sharding.Mesh, path: str, field: str):
        everywhere = NamedSharding(mesh, P())
        self._model: Transformer | None = None
        if run.lora.rank and not path:
            self._score: Callable[..., Any] = jax.jit(partial(_without_adapters, skeleton), out_shardings=everywhere)
            return
        name = path or run.init_from
        if not name:
            raise UserError(f"{field} names no model, and the run starts from none; name one, or set init_from")
        source = open_model(name)
        if source.config.vocab_size > run.model.vocab_size:
            raise UserError(f"the reference {name} has more tokens than the model that is trained; use one of its kin")
        form = make_skeleton(source.config, stacked=False, dtype=compute_dtype(run))
        found = source.weights(layout(form, mesh, dict(TRAIN)), compute_dtype(run))
        weights = {own: leaf for own, leaf in found.items() if own in form.weights}
        self._model = form.merge(weights, {own: leaf for own, leaf in found.items() if own not in form.weights})
        self._score = jax.jit(lambda model, rows: logprobs_of(model, rows)[0], out_shardings=everywhere)

    def __call__(self, state: TrainState, rows: Rows) -> Array:
        """float32 `[B, T]`, on all devices."""
        rows = {name: rows[name] for name in ("tokens", "positions", "segments", "targets")}
        return self._score(self._model if self._model is not None else (state.params, state.extra), rows)


def _without_adapters(skeleton: Skeleton, arrays: tuple[Arrays, Arrays], rows: Rows) -> Array:
    params, extra = arrays
    silent = {name: leaf * 0 if name.endswith(".b") else leaf for name, leaf in params.items()}
    return logprobs_of(skeleton.merge(silent, extra), rows)[0]
