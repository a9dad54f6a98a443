"""Law: adapters beside weights in 8 bits are trained as beside what these stand for, in a quarter of the bytes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qmax
from errors import UserError
from model.checkpoint.checkpoints import Checkpoints
from model.config import ModelConfig
from model.expert_weights import Experts
from model.experts import grouped
from model.load import open_model, read_model
from model.lora import BASE, SCALE, VALUES, merge, widen
from model.lora_config import LoraConfig
from model.quantization import quantize
from model.ragged_experts import ragged
from model.tree import make_skeleton as plain_skeleton
from model.tree import unstack
from sharding.mesh import MeshConfig, make_mesh
from tests.test_lora import LORA, ONE, adapted
from tests.test_mesh import gradients
from tests.tiny import MOE, Trainer, make_rows, make_run
from train.origin import keeping

SMALL = replace(LORA, base="int8", targets=("q", "o", "up", "down", "kv_down"))
"""Of attention, feed-forwards and experts some weights have adapters and others are in 8 bits alone."""
FULL = pytest.mark.full


def listed(arrays: dict[str, Any], config: ModelConfig, layers: str) -> dict[str, Any]:
    return unstack(arrays, config) if layers == "stacked" else arrays


def whole(trainer: Trainer) -> Trainer:
    """The same adapters beside what the weights in 8 bits stand for, in float32 on one device."""
    run = trainer.run
    plain = replace(run, lora=replace(run.lora, base="same"), layers="list", remat="none", mesh=MeshConfig())
    other = Trainer(plain, ONE)
    shapes = plain_skeleton(run.model, stacked=False).shapes
    params, extra = (listed(part, run.model, run.layers) for part in (trainer.state.params, trainer.state.extra))
    arrays = widen(jax.device_get(extra), shapes)
    assert arrays.keys() == other.state.extra.keys()
    extra = {name: jnp.asarray(leaf) for name, leaf in arrays.items()}
    params = {name: jnp.asarray(np.asarray(leaf)) for name, leaf in params.items()}
    other.state = replace(other.state, params=params, extra=extra)
    return other


@pytest.mark.parametrize(
    ("kind", "layers", "remat", "mesh"),
    [
        ("dense", "stacked", "block", MeshConfig()),
        pytest.param("moe", "list", "none", MeshConfig(data=2, expert=4, exchange="all_to_all"), marks=FULL),
        ("moe", "stacked", "dots", MeshConfig(fsdp=2, expert=2, tensor=2)),
        pytest.param("latent", "list", "block", MeshConfig(data=2, fsdp=2, tensor=2), marks=FULL),
        pytest.param("hybrid", "list", "none", MeshConfig(), marks=FULL),
        pytest.param("moe", "list", "none", MeshConfig(), marks=FULL),
    ],
    ids=str,
)
def test_gradients_are_those_beside_what_is_stood_for(kind: str, layers: Any, remat: Any, mesh: MeshConfig) -> None:
    trainer = adapted(kind, layers=layers, mesh=mesh, lora=SMALL, remat=remat)
    assert any(leaf.dtype == np.int8 for leaf in trainer.state.extra.values())
    found, loss = gradients(trainer)
    wanted, plain_loss = gradients(whole(trainer))
    assert abs(loss - plain_loss) <= 1e-5 * plain_loss
    found = listed(found, trainer.run.model, layers)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(np.asarray(found[name]) - value).max() <= 1e-5 * np.abs(value).max(), name


@pytest.mark.parametrize("backend", ["ragged", "grouped"])
def test_experts_in_8_bits_pass_gradients_on(backend: str) -> None:
    """Also through buffers that overflow."""
    draw = np.random.default_rng(0)
    x_MD, ids_MC = draw.normal(size=(24, 6)), np.minimum(draw.integers(0, 9, (24, 2)), 4)
    share_MC = draw.uniform(size=(24, 2))
    shapes = {"gate_EDF": ((1,), (5, 6, 8)), "up_EDF": ((1,), (5, 6, 8)), "down_EDF": ((2,), (5, 6, 8))}
    small = {
        name: quantize(jnp.asarray(draw.normal(size=shape), jnp.float32), sums)
        for name, (sums, shape) in shapes.items()
    }

    def loss(x_MD: Any, share_MC: Any, weights: dict[str, Any]) -> Any:
        params = Experts(**weights)
        if backend == "ragged":
            return jnp.sum(jnp.sin(ragged(x_MD, jnp.asarray(ids_MC), share_MC, params, 16)))
        return jnp.sum(jnp.sin(grouped(x_MD, jnp.asarray(ids_MC), share_MC, params, 4, 8)))

    given = jnp.asarray(x_MD, jnp.float32), jnp.asarray(share_MC, jnp.float32)
    plain = {name: weight.dense() for name, weight in small.items()}
    found, wanted = (
        jax.jit(jax.grad(lambda x, share, weights=weights: loss(x, share, weights), (0, 1)))(*given)
        for weights in (small, plain)
    )
    for own, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(own, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.full
def test_what_is_kept_and_what_is_trained() -> None:
    run = make_run(MOE, lora=SMALL)
    trainer, plain = Trainer(run, ONE), Trainer(replace(run, lora=replace(SMALL, base="same")), ONE)
    sums = plain_skeleton(MOE, stacked=False).sums
    narrow, wide = trainer.state.extra, plain.state.extra
    for name, leaf in wide.items():
        own = sums.get(name.removesuffix(BASE))
        if own is None:
            np.testing.assert_array_equal(narrow[name], leaf)
        else:
            nearest = quantize(leaf, own)
            np.testing.assert_allclose(narrow[name + SCALE], nearest.scale, rtol=1e-6)
            assert np.abs(np.asarray(narrow[name + VALUES], int) - nearest.values).max() <= 1, name
    in_products = sum(leaf.nbytes for name, leaf in wide.items() if name.removesuffix(BASE) in sums)
    stored = sum(leaf.nbytes for name, leaf in narrow.items() if name.endswith((VALUES, SCALE)))
    scales = sum(leaf.nbytes for name, leaf in narrow.items() if name.endswith(SCALE))
    assert stored - scales == in_products / 4
    before = jax.device_get(narrow)
    metrics = [trainer(make_rows(run, step)) for step in range(2)]
    assert all(np.isfinite(one["loss"]) for one in metrics) and metrics[1]["skipped"] == 0
    for name, leaf in before.items():
        np.testing.assert_array_equal(trainer.state.extra[name], leaf)
    bfloat16 = Trainer(replace(run, parameter_dtype="bfloat16", dtype="bfloat16"), ONE)
    assert {leaf.dtype for name, leaf in bfloat16.state.extra.items() if name.endswith(VALUES)} == {np.dtype("int8")}
    assert np.isfinite(bfloat16(make_rows(run))["loss"])


def test_through_the_front_door(tmp_path: Path) -> None:
    """Rounded as it is read, from a run and from a directory; resumed to the same bits; read as a plain model."""
    base, hf, tuned, cut = (tmp_path / name for name in ("base", "hf", "tuned", "cut"))
    assert qmax.main(["train", "configs/tiny.py", "--steps", "1", "--out", str(base)]) == 0
    lora = ["--lora.rank", "2", "--lora.base", "int8", "--lora.targets", "q", "up"]
    words = ["train", "configs/tiny.py", *lora, "--optimizer.learning-rate", "0.1", "--checkpoint.every", "1"]
    words += ["--validate-every", "0", "--steps", "2", "--init-from", str(base)]
    assert qmax.main([*words, "--out", str(tuned)]) == 0
    stored, nearest = saved(tuned, 2), jax.jit(quantize, static_argnums=1)
    skeleton = plain_skeleton(open_model(base).config, stacked=False)
    one = dict.fromkeys(skeleton.shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    weights = open_model(base).weights(one, "float32")
    rounded = {name: nearest(weights[name], over) for name, over in skeleton.sums.items()}
    for name, wanted in rounded.items():
        path = next(p for p in (f"extra.{name}{BASE}", f"extra.{name}") if p + VALUES in stored)
        np.testing.assert_array_equal(stored[path + VALUES], wanted.values)
        np.testing.assert_array_equal(stored[path + SCALE], wanted.scale)

    assert qmax.main(["convert", str(base), str(hf), "--dtype", "float32"]) == 0
    run = make_run(open_model(hf).config, lora=LoraConfig(rank=2, base="int8"))
    for name, own in open_model(hf).weights(one, "float32", keep=keeping(run)).items():
        jax.tree.map(np.testing.assert_array_equal, own, rounded.get(name, weights[name]))

    shutil.copytree(tuned, cut)
    shutil.rmtree(cut / "checkpoints" / "2")
    assert qmax.main([*words, "--out", str(cut), "--resume"]) == 0
    for name, leaf in saved(cut, 2).items():
        np.testing.assert_array_equal(leaf, stored[name])

    found = read_model(open_model(tuned), ONE, dtype="float32")
    parts = {name.partition(".")[2]: leaf for name, leaf in stored.items() if name.startswith(("params.", "extra."))}
    by_hand = merge(widen(parts, skeleton.shapes), skeleton.sums, LoraConfig(rank=2, base="int8"))
    for own, hand in zip(jax.tree.leaves(found), jax.tree.leaves(skeleton.merge(by_hand, by_hand)), strict=True):
        np.testing.assert_array_equal(own, hand)
    mesh = make_mesh(MeshConfig(tensor=2))
    for own, many in zip(jax.tree.leaves(found), jax.tree.leaves(read_model(open_model(tuned), mesh)), strict=True):
        np.testing.assert_allclose(own, many, atol=1e-6)


def saved(run: Path, step: int) -> dict[str, Any]:
    checkpoints = Checkpoints(run / "checkpoints", keep=9)
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in checkpoints.leaves(step).items()}
    return checkpoints.restore(step, wanted)


def test_impossible_bases_are_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.base=int8 is of weights beside adapters"):
        LoraConfig(base="int8")
    with pytest.raises(UserError, match="matmul=int8 would round again"):
        make_run(MOE, lora=SMALL, matmul="int8")
