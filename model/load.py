"""A MODEL as every verb takes it: a run directory, read straight into the layout that decoding wants."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from errors import UserError
from model.checkpoint.checkpoints import Checkpoints
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.tree import Skeleton, unstack
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import DECODE, array_sharding
from sharding.runtime import default_dtype


def run_directory(path: str | Path) -> Path:
    """`path` if it is a run directory. Raises UserError otherwise."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; name a run made by `qmax train`")
    if not (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is not a run: it has no config.json with checkpoints/ beside it")
    return path


def read_config(run: Path) -> ModelConfig:
    """The model of a run, from its `config.json`. Raises UserError where that is damaged."""
    try:
        values = json.loads((run / "config.json").read_text())["run"]["model"]
        return ModelConfig.from_dict(values, str(run / "config.json"))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UserError(
            f"{run / 'config.json'} is damaged ({exc}); `qmax train` writes it, and --resume again"
        ) from exc


def warn(sentence: str) -> None:
    """One line on stderr."""
    print(sentence, file=sys.stderr, flush=True)


def read_weights(run: str | Path, mesh: jax.sharding.Mesh) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """Config, weights and selection biases of the newest good checkpoint, in list form, laid out for decoding."""
    path = run_directory(run)
    config = read_config(path)
    checkpoints = Checkpoints(path / "checkpoints", keep=1)
    step = checkpoints.latest_good(warn)
    if step is None:
        raise UserError(f"{run} has no complete checkpoint")
    saved = checkpoints.leaves(step)
    forms = {stacked: make_skeleton(config, stacked=stacked) for stacked in (False, True)}
    fitting = [
        stacked
        for stacked, form in forms.items()
        if all(
            f"params.{name}" in saved and saved[f"params.{name}"].shape == form.shapes[name] for name in form.weights
        )
    ]
    if not fitting:
        raise UserError(f"checkpoint {step} of {run} is of another architecture than its config.json")
    skeleton = forms[fitting[0]]
    asked = {}
    for name, shape in skeleton.shapes.items():
        kind = "params" if name in skeleton.weights else "extra"
        sharding = array_sharding(skeleton.axes[name], len(shape), mesh, DECODE)
        asked[f"{kind}.{name}"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    found = checkpoints.restore(step, asked, part=True)
    parts = [
        {n.removeprefix(kind): a for n, a in found.items() if n.startswith(kind)} for kind in ("params.", "extra.")
    ]
    weights, extra = (unstack(part, config) if fitting[0] else part for part in parts)
    return config, weights, extra


def make_skeleton(config: ModelConfig, *, stacked: bool, dtype: Any = jnp.float32) -> Skeleton:
    """The structure of a model of `config`; allocates nothing."""
    return Skeleton(jax.eval_shape(lambda: Transformer(config, jax.random.key(0), dtype=dtype, stacked=stacked)))


def load_model(path: str | Path, mesh: MeshConfig | None = None) -> tuple[Transformer, Tokenizer]:
    """The model of a run, one array per layer, and its tokenizer.

    Args:
        path: a run directory.
        mesh: devices to lay it over; one by default.

    Raises:
        UserError: not a run, no good checkpoint, or a damaged file; the sentence names it.
    """
    run = run_directory(path)
    tokenizer = Tokenizer.load(run / "tokenizer")
    devices = make_mesh(mesh or MeshConfig())
    config, weights, extra = read_weights(run, devices)
    dtype = jnp.dtype(default_dtype(devices.devices.flat[0]))
    return make_skeleton(config, stacked=False, dtype=dtype).merge(weights, extra), tokenizer
