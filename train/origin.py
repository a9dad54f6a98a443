"""Where the first weights of a run come from, when that is another model.

    weights of the source, list form -> [experts cut from dense layers] -> [rows of new tokens] -> [layers stacked]

Each array is read straight into the layout of training.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.override import fields_of
from configs.run import Run
from errors import UserError
from model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig
from model.hf.placing import Keep
from model.load import Source, layout, open_model
from model.lora import BASE, SCALE, VALUES, narrowed
from model.quantization import Quantized, quantize
from model.tokenizer import Tokenizer
from model.tree import Arrays, Skeleton, list_names, make_skeleton, stack, unstack
from sharding.rules import TRAIN
from train.state import TrainState, is_stacked
from train.upcycle import upcycle

NewRows = Mapping[int, tuple[int, ...]]
"""For each new token the old tokens whose mean its rows begin as."""


@dataclass
class Origin:
    """An open model that a run starts from."""

    name: str
    source: Source
    tokenizer: Tokenizer | None
    """The source's own; None where it has none."""
    problem: str
    """Why it has none."""

    @classmethod
    def open(cls, name: str) -> Origin:
        """The MODEL `name`. UserError where it is none, or damaged."""
        try:
            source = open_model(name)
        except UserError as exc:
            raise UserError(f"init_from: {exc}") from exc
        try:
            tokenizer, problem = source.tokenizer(), ""
        except UserError as exc:
            tokenizer, problem = None, str(exc)
        if tokenizer is not None and tokenizer.vocab_size > source.config.vocab_size:
            raise UserError(
                f"init_from={name} has a tokenizer of {tokenizer.vocab_size} tokens and a model of "
                f"{source.config.vocab_size}; they do not belong together"
            )
        return cls(name, source, tokenizer, problem)

    def new_rows(self, tokenizer: Tokenizer) -> NewRows:
        """The tokens that `tokenizer` has beyond the source's, each with the old ones that spell it.

        Raises:
            UserError: it is no extension of the source's tokenizer.
        """
        old = self.tokenizer
        if old is None or old.fingerprint == tokenizer.fingerprint:
            return {}
        if any(old.token_bytes(i) != tokenizer.token_bytes(i) for i in range(old.vocab_size)):
            raise UserError(
                f"the tokens of {tokenizer.source} are not those that init_from={self.name} was trained with; leave "
                "data.tokenizer empty to take its tokenizer, or extend that with `qmax tokenizer --extend`"
            )
        if tokenizer.vocab_size == old.vocab_size:
            return {}
        from model.tokenizer_extension import spelled_before

        return spelled_before(old, tokenizer)

    # ---- what is refused ----------------------------------------------------
    def check(self, run: Run) -> list[str]:
        """Refuses a source whose weights `run` cannot take; returns what differs without changing a shape.

        Raises:
            UserError: naming the first field and the first array that differ.
        """
        theirs, own = self.source.config, run.model
        if run.init_how == "upcycle":
            if theirs.moe.num_experts:
                raise UserError(
                    f"init_from={self.name} is a mixture of experts already; init_how=upcycle wants a dense one"
                )
            dense_width = theirs.intermediate_size if own.num_moe_layers == own.num_layers else own.intermediate_size
            own = replace(own, moe=MoEConfig(), intermediate_size=dense_width)
        if theirs.vocab_size > own.vocab_size:
            raise UserError(
                f"init_from={self.name} has {theirs.vocab_size} rows of vocabulary and model.vocab_size is "
                f"{own.vocab_size}; take at least as many, or 0 to take the source's"
            )
        head = ""
        if own.num_labels and not theirs.num_labels:
            head = f"its head is left out, and one of model.num_labels={own.num_labels} begins at random"
            theirs = replace(theirs, num_labels=own.num_labels, mtp_layers=0)
        different = differences(theirs, own)
        theirs = replace(theirs, vocab_size=own.vocab_size)
        there, here = (make_skeleton(config, stacked=False) for config in (theirs, own))
        # Selection biases that the source has not begin at zero.
        names = [n for n in sorted(there.shapes.keys() | here.weights) if there.shapes.get(n) != here.shapes.get(n)]
        if names:
            shapes = [list(form.shapes[names[0]]) if names[0] in form.shapes else "missing" for form in (there, here)]
            field = f" ({different[0]})" if different else ""
            raise UserError(
                f"{self.name} is of another architecture than the config{field}: {len(names)} arrays differ, the first "
                f"is {names[0]}, {shapes[0]} there and {shapes[1]} here"
            )
        return [head, *different] if head else different

    # ---- weights ------------------------------------------------------------
    def weights(self, run: Run, skeleton: Skeleton, initial: Arrays, mesh: jax.sharding.Mesh, new: NewRows) -> Arrays:
        """All weights and selection biases that `run` starts with, laid out as `initial`.

        Args:
            skeleton, initial: the run's structure, and what it begins with at random; the dictionary is emptied.
            new: as `new_rows` gives it.
        """
        theirs = self.source.config
        shardings = {name: array.sharding for name, array in initial.items()}
        # Rows that do not divide over the mesh are whole until there are more of them.
        table = dict(TRAIN) | ({"vocab": None} if theirs.vocab_size % run.mesh.tensor else {})
        form = make_skeleton(theirs, stacked=False)
        keep = None
        if run.lora.base == "int8":
            grows = bool(new) or theirs.vocab_size != run.model.vocab_size
            keep = keeping(run, vocabulary_axes(form).keys() if grows else ())
        found = self.source.weights(layout(form, mesh, table), "float32", keep=keep)
        if run.init_how == "upcycle":
            random = unstack(initial, run.model) if is_stacked(run) else initial
            vocabulary = {name: found.pop(name) for name in vocabulary_axes(form)}
            found = upcycle(found, random, run.upcycle_fresh, run.seed) | vocabulary
        if theirs.num_labels != run.model.num_labels:
            found.pop("head_DV", None)
        if new or theirs.vocab_size != run.model.vocab_size:
            for name, axis in vocabulary_axes(make_skeleton(run.model, stacked=False)).items():
                found[name] = grow(found[name], whole(initial, name), new, axis)
        stacked = is_stacked(run)
        if run.lora.rank:
            found = beside_adapters(run, skeleton, found)
        first = {name: list_names(name, run.model)[0] if stacked else name for name in initial}
        left = {name: array for name, array in initial.items() if first[name] not in found}
        initial.clear()
        wanted = {name: sharding for name, sharding in shardings.items() if name not in left}
        if stacked:
            return left | stack(found, run.model, wanted)
        return left | {name: jax.device_put(found.pop(name), sharding) for name, sharding in wanted.items()}

    def begin(
        self, run: Run, skeleton: Skeleton, state: TrainState, mesh: jax.sharding.Mesh, new: NewRows
    ) -> TrainState:
        """`state` with the source's weights and selection biases in place of its own."""
        initial = {**state.params, **state.extra}
        dtypes, trained = {name: array.dtype for name, array in initial.items()}, state.params.keys()
        state = replace(state, params={}, extra={})
        found = self.weights(run, skeleton, initial, mesh, new)
        # One by one: no more than one weight is there in float32 and as it is stored.
        arrays = {name: found.pop(name).astype(dtype) for name, dtype in dtypes.items()}
        params = {name: arrays.pop(name) for name in trained}
        return replace(state, params=params, extra=arrays)


def keeping(run: Run, skip: Collection[str] = ()) -> Keep:
    """What `run` keeps of a weight that it does not train, where that is 8 bits.

    Args:
        skip: weights that are needed as they are.
    """
    sums = make_skeleton(run.model, stacked=False).sums
    narrow = jax.jit(quantize, static_argnums=1)

    def keep(name: str, array: jax.Array) -> Any:
        return array if name in skip or name not in sums else narrow(array, sums[name])

    return keep


def whole(arrays: Arrays, name: str) -> jax.Array:
    """A matrix at `name`, or in 8 bits below it."""
    return arrays[name] if name in arrays else Quantized(arrays[name + VALUES], arrays[name + SCALE], ()).dense()


def beside_adapters(run: Run, skeleton: Skeleton, found: dict[str, Any]) -> dict[str, Any]:
    """Weights by the paths that they have beside adapters, in list form; `found` is emptied."""
    stacked, last = is_stacked(run), ".a"
    adapted = {name.removesuffix(last) for name in skeleton.weights if name.endswith(last)}
    adapted = {own for name in adapted for own in (list_names(name, run.model) if stacked else [name])}
    keep, placed = keeping(run) if run.lora.base == "int8" else None, {}
    for name in list(found):
        leaf = found.pop(name)
        leaf = leaf if keep is None or isinstance(leaf, Quantized) else keep(name, leaf)
        path = name + BASE if name in adapted else name
        placed |= narrowed(path, leaf) if isinstance(leaf, Quantized) else {path: leaf}
    return placed


def vocabulary_axes(skeleton: Skeleton) -> dict[str, int]:
    """Arrays with a row (or column) for every token, and along which axis."""
    return {name: axes.index("vocab") for name, axes in skeleton.axes.items() if "vocab" in axes}


def grow(old: jax.Array, initial: jax.Array, new: NewRows, axis: int) -> jax.Array:
    """`old` with as many rows along `axis` as `initial`, and laid out like it.

    Rows of `new` tokens are means of old rows; further rows are those of `old`, and of `initial` beyond its end.
    """
    known = [(token, parts) for token, parts in new.items() if parts]
    longest = max((len(parts) for _, parts in known), default=0)
    parts_NP = np.zeros((len(known), longest), np.int32)
    for row, (_, parts) in enumerate(known):
        parts_NP[row, : len(parts)] = parts
    tokens_N = np.array([token for token, _ in known], np.int32)
    lengths_N = np.array([len(parts) for _, parts in known], np.int32)

    def build(old: jax.Array, initial: jax.Array) -> jax.Array:
        old_VD, initial_VD = jnp.moveaxis(old, axis, 0), jnp.moveaxis(initial, axis, 0)
        rows_VD = jnp.concatenate([old_VD, initial_VD[old_VD.shape[0] :]])
        if known:

            def add(part: jax.Array, sum_ND: jax.Array) -> jax.Array:
                own_ND = old_VD[jnp.asarray(parts_NP)[:, part]]
                return sum_ND + jnp.where((part < lengths_N)[:, None], own_ND, 0.0)

            zero_ND = jnp.zeros((len(known), old_VD.shape[1]), old.dtype)
            means_ND = jax.lax.fori_loop(0, longest, add, zero_ND) / lengths_N[:, None]
            rows_VD = rows_VD.at[tokens_N].set(means_ND)
        return jnp.moveaxis(rows_VD, 0, axis)

    return jax.jit(build, out_shardings=initial.sharding)(old, initial)


# ---- what two configs differ in ---------------------------------------------
def differences(theirs: ModelConfig, own: ModelConfig) -> list[str]:
    """Fields that make two models compute differently, each as `model.NAME is X there and Y here`."""
    there, here = _in_use(theirs), _in_use(own)
    fields = ((name, attrgetter(name)) for name, _ in fields_of(ModelConfig))
    return [
        f"model.{name} is {json.dumps(value(there))} there and {json.dumps(value(here))} here"
        for name, value in fields
        if value(there) != value(here)
    ]


def _in_use(config: ModelConfig) -> ModelConfig:
    """`config` with one value for what it does not use, and one way to say what can be said in several."""
    layers = range(config.num_layers)
    dense = tuple(layer for layer in layers if not config.is_moe(layer))
    kinds = tuple(config.attention_kind(layer) for layer in layers)
    plain = RopeConfig(theta=config.rope.theta, share=config.rope.share)
    return replace(
        config,
        vocab_size=0,
        max_positions=1,
        layout="",
        tie_embeddings=config.tied_head,
        attention_pattern=kinds,
        intermediate_size=config.intermediate_size if dense else 1,
        moe=replace(config.moe, every=1, dense_layers=dense) if len(dense) < len(layers) else MoEConfig(),
        linear=config.linear if "linear" in kinds else LinearAttentionConfig(),
        latent=config.latent if config.latent.kv_rank else LatentAttentionConfig(),
        sliding_window=config.sliding_window if "sliding" in kinds else 0,
        rope=plain if config.rope.scaling == "none" else config.rope,
    )
