"""A run's adapters as a directory of PEFT's (https://github.com/huggingface/peft): the inverse of `read_adapter`.

Of our weights that are one matrix of theirs each has factors A_i, B_i of its own, and theirs has one pair:

    A = [A_1; A_2]    B = [B_1 0; 0 B_2], in the order of its rows    B A = [B_1 A_1; B_2 A_2]

so that the rank of such a matrix is the sum of ours, which `rank_pattern` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from model.adapters import PREFIX, SETTINGS, TENSORS, A, B
from model.config import ModelConfig
from model.hf.families import family_of_config
from model.hf.rules import Matrix, Shapes
from model.hf.safetensors import header_of, write_tensor
from model.hf.tables import model_rules
from model.hf.writing import TYPES, new_directory, to_json
from model.load import RunSource, Source, open_model, read_origin
from model.lora_config import LoraConfig
from model.model_card import CARD, adapter_card
from model.tree import make_skeleton

Pair = tuple[np.ndarray, np.ndarray]
"""Both factors: from the rank `[R, *I]` and to the outputs `[R, *O]`, or PEFT's `[R, columns]` and `[rows, R]`."""


def convert_adapter(source: Source, target: Path, dtype: str = "") -> dict[str, Any]:
    """Writes the adapters of a run to `target`, in float32 if not as `dtype`. Returns what was written, for a table.

    Raises:
        UserError: `source` is no run with adapters, what they are added to is not a model that another can load, or
            PEFT cannot hold them.
    """
    if not isinstance(source, RunSource) or not source.lora.rank:
        raise UserError(f"{source.path} is no run with adapters (lora.rank); leave --adapter away to convert a model")
    if source.config.num_labels:
        raise UserError(
            f"{source.path} has trained a head beside its adapters; leave --adapter away to convert all of it"
        )
    base, how = read_origin(source.path)
    if not base or how != "same":
        made = "cut from a dense model (init_how=upcycle)" if base else "drawn at random (no init_from)"
        raise UserError(
            f"{source.path} adapts weights that were {made} and are nowhere else; leave --adapter away to convert the "
            "model with its adapters added"
        )
    rows = _vocabulary(base)
    if rows and rows != source.config.vocab_size:
        raise UserError(
            f"{source.path} has {source.config.vocab_size} rows of vocabulary and {base} has {rows}; leave --adapter "
            "away to convert the model with its adapters added"
        )
    parts = {name: (np.asarray(a), np.asarray(b)) for name, (a, b) in source.adapter().items()}
    modules = modules_of(parts, source.config, source.path)
    settings = settings_of(modules, source.config, source.lora, base)
    parameters = sum(factor.size for pair in modules.values() for factor in pair)
    card = adapter_card(source, target.absolute().name, base, parameters)
    size = write_adapter(target, modules, settings, np.dtype(TYPES[dtype or "float32"]), card)
    return {
        "architecture": f"adapters of {family_of_config(source.config).architecture}",
        "parameters": parameters,
        "bytes": size,
    }


def _vocabulary(base: str) -> int:
    """Rows of vocabulary of the model `base`; 0 where it is not there any more."""
    try:
        return open_model(base).config.vocab_size
    except UserError:
        return 0


def write_adapter(
    target: Path, modules: Mapping[str, Pair], settings: Mapping[str, Any], dtype: np.dtype, card: bytes = b""
) -> int:
    """Writes a directory that PEFT loads, visible when it is whole; returns the bytes of its tensors.

    card: its README.md; empty for none.

    Raises:
        UserError: the directory is taken.
    """
    tensors = {
        f"{PREFIX}{name}{end}": factor.astype(dtype)
        for name, pair in modules.items()
        for end, factor in zip((A, B), pair, strict=True)
    }
    with new_directory(target) as partial:
        (partial / SETTINGS).write_bytes(to_json(settings))
        if card:
            (partial / CARD).write_bytes(card)
        with (partial / TENSORS).open("wb") as stream:
            stream.write(header_of({name: (array.dtype, array.shape) for name, array in tensors.items()}))
            for array in tensors.values():
                write_tensor(stream, array)
    return sum(array.nbytes for array in tensors.values())


def modules_of(parts: Mapping[str, tuple[Any, Any]], config: ModelConfig, path: Path) -> dict[str, Pair]:
    """PEFT's pair of each module that has an adapter, by its name, in the order of the family's table.

    Args:
        parts: as in `Adapter`.
        path: where they are from.

    Raises:
        UserError: a weight is part of what PEFT has no module for.
    """
    shapes, found, left = make_skeleton(config, stacked=False).shapes, {}, set(parts)
    for rule in model_rules(config, family_of_config(config)):
        if isinstance(rule, Matrix) and left & set(rule.ours):
            found[rule.theirs.removesuffix(".weight")] = _joined(rule, parts, shapes)
            left -= set(rule.ours)
    if left:
        raise UserError(
            f"{path} adapts experts ({min(left)}), which PEFT does not hold by the names of modules; leave --adapter "
            "away to convert the model with its adapters added"
        )
    return found


def _joined(rule: Matrix, parts: Mapping[str, tuple[Any, Any]], shapes: Shapes) -> Pair:
    """The pair of one matrix of theirs from those of its parts that have one."""
    narrow = replace(rule, parts=tuple(replace(part, inputs=1) for part in rule.parts))
    above, beside = [], []
    for own in rule.ours:
        if own not in parts:
            continue
        a, b = (np.asarray(factor) for factor in parts[own])
        outputs = {part.ours: (len(b), *shapes[part.ours][part.inputs :]) for part in rule.parts}
        each = {name: b if name == own else np.zeros(shape, b.dtype) for name, shape in outputs.items()}
        above.append(a.reshape(len(a), -1))
        beside.append(np.asarray(narrow.write(each, outputs)[rule.theirs]))
    return np.concatenate(above), np.concatenate(beside, axis=1)


def settings_of(modules: Mapping[str, Pair], config: ModelConfig, lora: LoraConfig, base: str) -> dict[str, Any]:
    """adapter_config.json. Where ranks differ, `alpha_pattern` keeps what every product is multiplied by."""
    rules = [rule for rule in model_rules(config, family_of_config(config)) if isinstance(rule, Matrix)]
    every = [rule.theirs.removesuffix(".weight") for rule in rules]
    ranks = {name: len(a) for name, (a, _) in modules.items() if len(a) != lora.rank}
    stabilized = lora.rank_stabilized and not ranks
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha if stabilized else lora.scale * lora.rank,
        "use_rslora": stabilized,
        "rank_pattern": ranks,
        "alpha_pattern": {name: lora.scale * rank for name, rank in ranks.items()},
        "target_modules": _targets(set(modules), every),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _targets(adapted: set[str], every: list[str]) -> list[str]:
    """Names of modules as PEFT compares them: the last part where that means no others, else the whole."""

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    partly = {last(name) for name in every if name not in adapted}
    return sorted({name if last(name) in partly else last(name) for name in adapted})
