"""Our weights to a Hugging Face directory: streamed, in the family's own layout, visible only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from errors import UserError
from model.config import ModelConfig
from model.hf.families import family_of_config, settings_of
from model.hf.placing import expected_tensors
from model.hf.rules import Rule, Shapes
from model.hf.safetensors import INDEX, SINGLE, header_of, shards, sync, write_tensor
from model.hf.tables import Experts, model_rules

SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as transformers writes them."""

EXACT = ("e_score_correction_bias",)
"""Tensors that transformers keeps in float32 whatever the rest is."""

TYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}
"""What weights can be written as."""


def tensor_bytes(
    config: ModelConfig, shapes: Shapes, *, dtype: str, kept: Mapping[str, np.dtype], experts: Experts | None
) -> dict[str, int]:
    """The size of each tensor that `write_checkpoint` writes with these arguments."""
    rules = model_rules(config, family_of_config(config), experts)
    types = _types(rules, shapes, dtype, kept)
    return {name: prod(shape) * types[name].itemsize for name, shape in expected_tensors(rules, shapes).items()}


def common_type(
    config: ModelConfig, shapes: Shapes, *, dtype: str, kept: Mapping[str, np.dtype], experts: Experts | None
) -> str:
    """What most tensors that `write_checkpoint` writes with these arguments are stored as."""
    types = _types(model_rules(config, family_of_config(config), experts), shapes, dtype, kept)
    return Counter(types.values()).most_common(1)[0][0].name


def _types(rules: list[Rule], shapes: Shapes, dtype: str, kept: Mapping[str, np.dtype]) -> dict[str, np.dtype]:
    """The type of each tensor: what it was where that is known, else `dtype`."""
    names = expected_tensors(rules, shapes)
    asked = {name: np.dtype(np.float32 if name.endswith(EXACT) else TYPES[dtype]) for name in names}
    return {name: kept.get(name, own) for name, own in asked.items()}


def write_checkpoint(
    target: Path,
    config: ModelConfig,
    shapes: Shapes,
    weights: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    dtype: str = "bfloat16",
    kept: Mapping[str, np.dtype] | None = None,
    experts: Experts | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model directory that transformers loads.

    Args:
        target: the directory; it must not exist, or be empty.
        config, shapes: of the model, and of its weights in list form.
        weights: our weights by name; each is asked for once, in the order of the table.
        files: further files, such as the tokenizer's.
        dtype: of the tensors. kept: types that single tensors have instead.
        experts: how experts lie, if not as the family usually has them.
        settings: keys of config.json beside those that follow from `config`.
        progress: told the bytes of each tensor.

    Raises:
        UserError: no family has this architecture, or the directory is taken.
    """
    family = family_of_config(config)
    rules = model_rules(config, family, experts)
    types = _types(rules, shapes, dtype, kept or {})
    expected = expected_tensors(rules, shapes)
    sizes = tensor_bytes(config, shapes, dtype=dtype, kept=kept or {}, experts=experts)
    common = Counter(types.values()).most_common(1)[0][0].name
    header = {**settings_of(config, family), "dtype": common, "torch_dtype": common, **(settings or {})}
    with new_directory(target) as partial:
        for name, content in {**files, "config.json": to_json(header)}.items():
            (partial / name).write_bytes(content)
        _write_tensors(partial, shards(sizes, shard_bytes), expected, types, _tensors(rules, weights, shapes), progress)


def _tensors(rules: list[Rule], weights: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, Any]]:
    """Every tensor of theirs in the order of the table."""
    for rule in rules:
        needed = rule.ours or [copied(rule)]
        yield from rule.write({name: weights[name] for name in needed}, shapes).items()


def copied(rule: Any) -> str:
    """The weight of ours that a copy repeats."""
    (name,) = rule.rule.ours
    return name


def _write_tensors(
    folder: Path,
    files: list[list[str]],
    shapes: Shapes,
    types: Mapping[str, np.dtype],
    tensors: Iterator[tuple[str, Any]],
    progress: Callable[[int], None] | None,
) -> None:
    """The files of weights, and their index where there are several."""
    where: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(header_of({name: (types[name], shapes[name]) for name in names}))
            for name in names:
                _write_one(stream, name, next(tensors), shapes[name], types[name], progress)
                where[name] = file
    if len(files) > 1:
        total = sum(prod(shape) * types[name].itemsize for name, shape in shapes.items())
        (folder / INDEX).write_bytes(to_json({"metadata": {"total_size": total}, "weight_map": where}))


def _write_one(
    stream: BinaryIO,
    name: str,
    tensor: tuple[str, Any],
    shape: tuple[int, ...],
    dtype: np.dtype,
    progress: Callable[[int], None] | None,
) -> None:
    found, array = tensor
    assert found == name and tuple(array.shape) == shape, f"{found} {array.shape} comes where {name} {shape} is due"
    array = np.asarray(array if array.dtype == dtype else array.astype(dtype))
    write_tensor(stream, array)
    if progress is not None:
        progress(array.nbytes)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the name `target` when the block ends well and is removed when it does not.

    Raises:
        UserError: `target` is there and not an empty directory, or cannot be made.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already; choose another directory, or remove it first")
    partial = target.absolute().parent / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as exc:
        raise UserError(f"cannot make {target}: {exc.strerror}") from exc
    try:
        yield partial
        sync([*partial.iterdir(), partial])
        with suppress(FileNotFoundError):
            target.rmdir()
        partial.rename(target)
        sync([target.absolute().parent])
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_json(value: Any, indent: int | None = 2) -> bytes:
    """JSON as people read it; with `indent` None as programs do."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()
