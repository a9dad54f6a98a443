"""Law: adapters are trained as what they add to a weight, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qmax
from errors import UserError
from model.load import open_model, read_model
from model.lora import BASE, merge
from model.lora_config import LoraConfig
from model.tree import make_skeleton as plain_skeleton
from sharding.mesh import MeshConfig, make_mesh
from tests.test_mesh import DENSE, HYBRID, LATENT, MOE, gradients
from tests.tiny import Trainer, make_rows, make_run
from train.optimizer import is_matrix

LORA = LoraConfig(rank=3, alpha=6.0, targets=("q", "k", "v", "o", "gate", "up", "down", "q_down", "kv_down"))
MODELS = {"dense": DENSE, "moe": MOE, "latent": LATENT, "hybrid": HYBRID}
ONE = make_mesh(MeshConfig())


def adapted(
    kind: str, *, layers: Any = "list", mesh: MeshConfig | None = None, lora: LoraConfig = LORA, **changes: Any
) -> Trainer:
    """A run with adapters that add something already."""
    run = make_run(MODELS[kind], layers=layers, lora=lora, mesh=mesh or MeshConfig(), **changes)
    trainer = Trainer(run, make_mesh(run.mesh))
    draw = np.random.default_rng(0)

    def moved(name: str, leaf: jax.Array) -> jax.Array:
        if not name.endswith(".b"):
            return leaf
        return jax.device_put(0.1 * draw.standard_normal(leaf.shape).astype(np.float32), leaf.sharding)

    params = {name: moved(name, leaf) for name, leaf in sorted(trainer.state.params.items())}
    trainer.state = replace(trainer.state, params=params)
    return trainer


def whole(trainer: Trainer) -> Trainer:
    """The same model with its adapters added to its weights, all of which are trained."""
    run = replace(trainer.run, lora=LoraConfig())
    other = Trainer(run, ONE)
    sums = plain_skeleton(run.model, stacked=False).sums
    merged = merge({**trainer.state.params, **trainer.state.extra}, sums, LORA)
    params = {name: merged[name] for name in other.state.params}
    other.state = replace(other.state, params=params, extra={name: merged[name] for name in other.state.extra})
    return other


@pytest.mark.parametrize("kind", [k if k != "hybrid" else pytest.param(k, marks=pytest.mark.full) for k in MODELS])
def test_gradients_are_those_of_the_weights_carried_over(kind: str) -> None:
    """Of `W + s A B`: `dA = s dW B'` and `dB = s A' dW`, for every target, experts' too."""
    trainer = adapted(kind)
    found, loss = gradients(trainer)
    wanted, merged_loss = gradients(whole(trainer))
    assert abs(loss - merged_loss) <= 2e-6 * loss
    sums = plain_skeleton(trainer.run.model, stacked=False).sums
    bases = sorted(name.removesuffix(BASE) for name in trainer.skeleton.frozen if name.endswith(BASE))
    assert len(bases) == sum(
        name.rpartition(".")[2].rpartition("_")[0] in LORA.targets for name in sums if "mtp" not in name
    )
    for name in bases:
        d_weight, rank, over = wanted[name], LORA.rank, sums[name]
        a, b = (np.asarray(trainer.state.params[f"{name}.{part}"]) for part in "ab")
        if 0 in over:
            d_weight = d_weight.reshape(a.size // rank, -1)[None]
        elif over == (2,):
            d_weight = d_weight.swapaxes(1, 2)
        a_XRI, b_XRO = (factor.reshape(len(d_weight), rank, -1) for factor in (a, b))
        d_a, d_b = LORA.scale * b_XRO @ d_weight.swapaxes(1, 2), LORA.scale * a_XRI @ d_weight
        for part, by_hand in (("a", d_a), ("b", d_b)):
            difference = np.abs(found[f"{name}.{part}"].reshape(by_hand.shape) - by_hand).max()
            # The merged weight is rounded, which a gradient magnifies: most of all that of Gated DeltaNet's keys.
            assert difference <= 1e-4 * np.abs(by_hand).max(), (name, part)


def test_a_run_begins_as_its_model_and_trains_adapters_alone() -> None:
    run = make_run(MOE, lora=LORA)
    trainer = Trainer(run, ONE)
    plain = Trainer(replace(run, lora=LoraConfig()), ONE)
    for name, leaf in plain.state.params.items():
        kept = trainer.state.extra.get(name + BASE, trainer.state.extra.get(name))
        np.testing.assert_array_equal(kept, leaf)
    before = jax.tree.map(np.asarray, trainer.state.extra)
    first, second = (trainer(make_rows(run, step)) for step in range(2))
    assert first["loss"] == pytest.approx(plain(make_rows(run, 0))["loss"], rel=1e-6) and second["skipped"] == 0
    for name, leaf in before.items():
        np.testing.assert_array_equal(trainer.state.extra[name], leaf)
    assert all(name.endswith((".a", ".b")) for name in trainer.state.params)
    assert any(np.abs(leaf).max() > 0 for name, leaf in trainer.state.params.items() if name.endswith(".b"))


@pytest.mark.parametrize(
    ("kind", "layers", "mesh"),
    [
        pytest.param("moe", "stacked", MeshConfig(fsdp=2, expert=2, tensor=2), marks=pytest.mark.full),
        ("moe", "list", MeshConfig(data=2, expert=2, context=2, exchange="all_to_all")),
        pytest.param("latent", "list", MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.full),
    ],
    ids=str,
)
@pytest.mark.full
def test_many_devices_give_the_gradients_of_one(kind: str, layers: str, mesh: MeshConfig) -> None:
    one = adapted(kind, layers=layers)
    many = adapted(kind, layers=layers, mesh=mesh)
    wanted, loss = gradients(one)
    found, sharded_loss = gradients(many)
    assert abs(sharded_loss - loss) <= 1e-5 * loss
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def test_stored_types() -> None:
    run = make_run(MOE, lora=LORA, parameter_dtype="bfloat16")
    trainer = Trainer(run, ONE)
    assert {leaf.dtype for leaf in trainer.state.params.values()} == {np.dtype("float32")}
    for name, leaf in trainer.state.extra.items():
        axes = trainer.skeleton.axes[name]
        coarse = is_matrix(tuple(axis for axis in axes if axis != "expert")) and "router" not in axes
        assert leaf.dtype == (jnp.bfloat16 if coarse else jnp.float32), name
    assert np.isfinite(trainer(make_rows(run))["loss"])


@pytest.mark.parametrize("layers", [pytest.param("list", marks=pytest.mark.full), "stacked"])
@pytest.mark.full
def test_a_run_is_read_with_its_adapters_added(layers: str, tmp_path: Path) -> None:
    """From another run, through the front door; and resumed to the same bits."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    words = ["--steps", "2", "--layers", layers]
    assert qmax.main(["train", "configs/tiny.py", *words, "--out", str(base)]) == 0
    lora = [
        "--lora.rank",
        "2",
        "--lora.targets",
        "q",
        "up",
        "down",
        "--init-from",
        str(base),
        "--optimizer.learning-rate",
        "0.1",
    ]
    assert qmax.main(["train", "configs/tiny.py", *words, *lora, "--out", str(tuned)]) == 0
    assert json.loads((tuned / "config.json").read_text())["run"]["lora"]["rank"] == 2
    old, new = (read_model(open_model(path), ONE) for path in (base, tuned))
    leaves = zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True)
    changed = {str(path) for (path, a), b in leaves if np.abs(np.asarray(a) - np.asarray(b)).max() > 0}
    assert changed and all(any(f"{target}_" in name for target in ("q", "up", "down")) for name in changed)


def test_impossible_adapters_are_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"rank": -1}, "lora.rank=-1 must be"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha=0.0 must be positive"),
        ({"rank": 2, "targets": ("dwon",)}, "did you mean down"),
        ({"rank": 2, "targets": ()}, "trains nothing"),
    ]
    for fields, said in refused:
        with pytest.raises(UserError, match=said):
            LoraConfig(**fields)
