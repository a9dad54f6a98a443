"""Adapters as files, and several of them beside one model, of which each row of a batch has its own or none.

All ranks lie side by side, and what the adapters of others say is multiplied by zero: one product for all rows, of
which none waits for another (as S-LoRA serves them, arXiv 2311.03285, without gathering weights for each row).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from errors import UserError
from model.config import ModelConfig
from model.hf.families import family_of_config
from model.hf.reading import plain_name
from model.hf.rules import Matrix, Shapes
from model.hf.safetensors import Directory
from model.hf.tables import model_rules
from model.load import RunSource
from model.lora import LowRank
from model.lora_config import TARGETS
from model.transformer import Transformer
from model.tree import Skeleton, make_skeleton

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
"""Names of PEFT's files, and of the tensors in them."""


@dataclass(frozen=True)
class Adapter:
    """An adapter of low rank, see `LowRank`.

    parts: `a` and `b` by the path of their weight in a model in list form. scale: what their product is multiplied by.
    """

    parts: Mapping[str, tuple[Any, Any]]
    scale: float

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(len(a) for a, _ in self.parts.values())


@struct.dataclass
class Adapters:
    """Adapters of one model.

    parts: as in `Adapter`, the ranks of all one after the other. scale_AK: of each adapter, 0 for the ranks of others;
    the first is none at all.
    """

    parts: dict[str, tuple[Float[Array, "K *I"], Float[Array, "K *O"]]]
    scale_AK: Float[Array, "A K"]

    @classmethod
    def of(cls, each: Sequence[Adapter], dtype: Any) -> Adapters:
        """These, numbered from 1."""
        ranks = [one.rank for one in each]
        starts = np.cumsum([0, *ranks])
        scale_AK = np.zeros((len(each) + 1, starts[-1]), np.float32)
        parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for number, one in enumerate(each):
            scale_AK[number + 1, starts[number] : starts[number + 1]] = one.scale
            for path, pair in one.parts.items():
                if path not in parts:
                    a, b = (np.zeros((starts[-1], *np.shape(x)[1:]), np.float32) for x in pair)
                    parts[path] = a, b
                for whole, own in zip(parts[path], pair, strict=True):
                    whole[starts[number] : starts[number] + len(own)] = own
        made = {path: (jnp.asarray(a, dtype), jnp.asarray(b, dtype)) for path, (a, b) in parts.items()}
        return cls(made, jnp.asarray(scale_AK))

    def on(self, model: Transformer, adapter_B: Int[Array, " B"]) -> Transformer:
        """`model`, in list form, for a batch whose rows have these adapters."""
        skeleton = Skeleton(model)
        weights, state = skeleton.split(model)
        scale_BK = self.scale_AK[adapter_B]
        adapted: dict[str, Any] = dict(weights)
        for path, (a, b) in self.parts.items():
            adapted[path] = LowRank(adapted[path], a, b, 1.0, scale_BK)
        return skeleton.merge(adapted, state)


def read_adapter(path: Path, config: ModelConfig) -> Adapter:
    """The adapter at `path`: a run that trained one, or a directory of PEFT's.

    Args:
        config: of the model that it is for.

    Raises:
        UserError: there is none, it is damaged or of another model, or it changes weights that are not changed by name.
    """
    if (path / "checkpoints").is_dir():
        source = RunSource(path)
        if not source.lora.rank:
            raise UserError(f"{path} is a run without adapters (lora.rank 0): serve it as a model")
        found = Adapter(source.adapter(), source.lora.scale)
    elif (path / SETTINGS).is_file():
        found = _read_peft(path, config)
    else:
        raise UserError(f"{path} holds no adapter: neither {SETTINGS} nor a run trained with lora.rank")
    skeleton = make_skeleton(config, stacked=False)
    for name, (a, b) in found.parts.items():
        if name not in skeleton.sums or name.rpartition(".")[2].rpartition("_")[0] not in TARGETS:
            raise UserError(f"{path} adapts {name}, which this model has not, or which no adapter can change")
        sums, shape = skeleton.sums[name], skeleton.shapes[name]
        if 0 not in sums:
            raise UserError(
                f"{path} adapts experts ({name}); adapters of these are served merged: `qmax convert` adds them"
            )
        wanted = shape[: len(sums)], shape[len(sums) :]
        if (a.shape[1:], b.shape[1:]) != wanted or len(a) != len(b):
            raise UserError(f"{path}: the adapter of {name} does not fit the model's weight of {shape}")
    return found


def _read_peft(path: Path, config: ModelConfig) -> Adapter:
    scale, scale_of = _scales(path / SETTINGS)
    files = Directory(path, TENSORS)
    tensors = {plain_name(name.removeprefix(PREFIX)): files.view(name) for name in files.entries}
    shapes = make_skeleton(config, stacked=False).shapes
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for rule in model_rules(config, family_of_config(config)):
        name = rule.theirs.removesuffix(".weight") if isinstance(rule, Matrix) else ""
        if isinstance(rule, Matrix) and name + A in tensors:
            if name + B not in tensors:
                raise UserError(f"{path / TENSORS} has {name}{A} and not {name}{B}")
            a, b = (np.asarray(tensors.pop(name + end), np.float32) for end in (A, B))
            try:
                own = _parts(rule, a, b * np.float32(scale_of(name, len(a)) / scale), shapes)
                parts |= own if len(own) == 1 else {ours: _used(*pair) for ours, pair in own.items()}
            except ValueError as error:
                raise UserError(f"{path}: the adapter of {name} does not fit the model's weight: {error}") from error
    if tensors:
        some = ", ".join(sorted(tensors)[:3])
        raise UserError(f"{path / TENSORS} adapts what this model has not, or what is not adapted by name: {some}")
    if not parts:
        raise UserError(f"{path / TENSORS} holds no tensors")
    return Adapter(parts, scale)


def _parts(rule: Matrix, a: np.ndarray, b: np.ndarray, shapes: Shapes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of our weights that are one matrix of theirs: all have its A, and each some rows of its B."""
    narrow = replace(rule, parts=tuple(replace(part, inputs=1) for part in rule.parts))
    narrow_shapes = {part.ours: (len(a), *shapes[part.ours][part.inputs :]) for part in rule.parts}
    rows = dict(narrow.read(lambda _: b, narrow_shapes))
    return {part.ours: (a.reshape(-1, *shapes[part.ours][: part.inputs]), rows[part.ours]) for part in rule.parts}


def _used(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranks that reach this part of a matrix: others are those of the parts beside it."""
    used = b.reshape(len(b), -1).any(axis=1)
    return (a[used], b[used]) if used.any() else (a, b)


def _scales(file: Path) -> tuple[float, Callable[[str, int], float]]:
    """What PEFT multiplies by: in general, and for a module of a name and a rank.

    Raises:
        UserError: settings that mean more than a product of two matrices.
    """
    try:
        settings = json.loads(file.read_text())
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        kind = settings.get("peft_type", "LORA")
        alphas = {str(name): float(own) for name, own in (settings.get("alpha_pattern") or {}).items()}
        patterns = {re.compile(rf"(.*\.)?({name})"): own for name, own in alphas.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if kind != "LORA" or rank < 1 or not alpha:
        raise UserError(
            f"{file} is of peft_type {kind}, r {rank} and lora_alpha {alpha}; LORA of positive ones is read"
        )
    for name in ("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias"):
        if settings.get(name):
            raise UserError(f"{file} has {name}={settings[name]!r}, which is not supported")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{file} has bias={settings['bias']!r}; only 'none' is supported")

    def scale_of(name: str, rank: int) -> float:
        own = next((value for pattern, value in patterns.items() if pattern.fullmatch(name)), alpha)
        return own / (rank**0.5 if settings.get("use_rslora") else rank)

    return scale_of("", rank), scale_of
