"""Law: training in 8 bits errs by no more than its rounding, learns alike, and changes nothing else."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kill_campaign import hashes, records, write_project
from test_mesh import HYBRID, LATENT

import qmax
from configs.run import OptimizerConfig
from errors import UserError
from model.expert_weights import Experts
from model.experts import run_experts
from model.forward import Batch, forward
from model.linear import Matmul, linear, merge_heads
from model.ragged_experts import ragged
from model.tree import unstack
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import batch_sharding
from tests.tiny import DENSE, MOE, Trainer, make_rows, make_run
from train.step import accumulate, make_validation_step

ONE = make_mesh(MeshConfig())
EIGHT = MeshConfig(fsdp=2, expert=2, tensor=2)
KINDS: tuple[Matmul, ...] = ("int8", "fp8")
MODELS = {"dense": DENSE, "moe": MOE, "latent": LATENT, "hybrid": HYBRID}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def cosine(a: Any, b: Any) -> float:
    a, b = np.ravel(np.asarray(a, np.float64)), np.ravel(np.asarray(b, np.float64))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_products_are_the_einsums_that_they_stand_for(dtype: Any) -> None:
    x_BTD, w_DNH, w_DF, o_NHD = normal(0, 2, 7, 12), normal(1, 12, 3, 4), normal(2, 12, 10), normal(3, 3, 4, 12)
    x_BTD = x_BTD.astype(dtype)
    y_BTNH = linear(x_BTD, w_DNH)
    np.testing.assert_array_equal(y_BTNH, jnp.einsum("btd,dnh->btnh", x_BTD, w_DNH.astype(dtype)))
    np.testing.assert_array_equal(linear(x_BTD, w_DF), x_BTD @ w_DF.astype(dtype))
    merged_BTD = y_BTNH.reshape(2, 7, 12) @ o_NHD.astype(dtype).reshape(12, 12)
    np.testing.assert_array_equal(merge_heads(y_BTNH, o_NHD), merged_BTD)
    assert y_BTNH.dtype == dtype


def test_int8_errs_by_no_more_than_half_a_step_of_each_factor() -> None:
    """x = s q + e with |e| <= s / 2, where q is an integer up to 127 and s = max|x| / 127.5; w alike, with t and f.

    x w - s q t p = e w + (x - e) f, and the sum over D of its magnitude is at most
    s/2 sum|w| + t/2 (sum|x| + D s/2).
    """
    x_MD, w_DF = np.asarray(normal(0, 40, 64), np.float64), np.asarray(normal(1, 64, 24), np.float64)
    x_MD[3] *= 1e4  # a scale of its own for each token
    w_DF[:, 5] *= 1e-3  # and for each channel
    s_M1, t_F = np.abs(x_MD).max(1, keepdims=True) / 127.5, np.abs(w_DF).max(0) / 127.5
    bound_MF = s_M1 / 2 * np.abs(w_DF).sum(0) + t_F / 2 * (np.abs(x_MD).sum(1, keepdims=True) + 64 * s_M1 / 2)
    found_MF = np.asarray(linear(jnp.float32(x_MD), jnp.float32(w_DF), "int8"), np.float64)
    difference_MF = np.abs(found_MF - x_MD @ w_DF)
    assert (difference_MF <= bound_MF * (1 + 1e-5)).all()
    assert difference_MF.max() > 0


def test_fp8_errs_by_no_more_than_its_rounding() -> None:
    """Of e4m3 half a step is 2^-4 of a number or, near zero, 2^-10 of the scale max|x| / 240."""
    x_MD, w_DF = np.asarray(normal(0, 40, 64), np.float64), np.asarray(normal(1, 64, 24), np.float64)
    x_MD[3] *= 1e4
    e_MD = np.maximum(np.abs(x_MD) / 16, np.abs(x_MD).max(1, keepdims=True) / 240 / 1024)
    f_DF = np.maximum(np.abs(w_DF) / 16, np.abs(w_DF).max(0) / 240 / 1024)
    bound_MF = e_MD @ np.abs(w_DF) + (np.abs(x_MD) + e_MD) @ f_DF
    found_MF = np.asarray(linear(jnp.float32(x_MD), jnp.float32(w_DF), "fp8"), np.float64)
    difference_MF = np.abs(found_MF - x_MD @ w_DF)
    assert (difference_MF <= bound_MF * (1 + 1e-5)).all()
    assert difference_MF.max() > 0


@pytest.mark.parametrize("matmul", ["int8", pytest.param("fp8", marks=pytest.mark.full)])
@pytest.mark.parametrize("path", ["grouped", "ragged"])
def test_experts_are_close_in_every_backend(path: str, matmul: Matmul) -> None:
    tokens, experts, width, hidden = 48, 4, 16, 24
    shapes = ((experts, width, hidden), (experts, width, hidden), (experts, width, hidden))
    params = Experts(*(normal(i, *shape) / 4 for i, shape in enumerate(shapes)))
    x_MD, dy_MD = normal(3, tokens, width), normal(4, tokens, width)
    ids_MC = jnp.asarray(np.random.default_rng(0).choice(experts, (tokens, 2), p=[0.7, 0.1, 0.1, 0.1]), jnp.int32)
    weights_MC = jax.nn.softmax(normal(5, tokens, 2))

    def of(matmul: Matmul) -> list[jax.Array]:
        def run(x_MD: jax.Array, weights_MC: jax.Array, params: Experts) -> jax.Array:
            if path == "ragged":
                return ragged(x_MD, ids_MC, weights_MC, params, 32, "swiglu", matmul)
            return run_experts(x_MD, ids_MC, weights_MC, params, training=True, matmul=matmul)

        y_MD, pull = jax.vjp(run, x_MD, weights_MC, params)
        return jax.tree.leaves((y_MD, pull(dy_MD)))

    for found, wanted in zip(of(matmul), of("plain"), strict=True):
        assert 0.99 < cosine(found, wanted) < 1


def gradients(trainer: Trainer) -> tuple[dict[str, np.ndarray], float]:
    """Gradients and loss of the first step."""

    def of(state: Any, rows: Any) -> Any:
        return accumulate(1, trainer.skeleton, trainer.loss, state, rows)

    with jax.set_mesh(trainer.mesh):
        rows = jax.device_put(make_rows(trainer.run), batch_sharding(trainer.mesh))
        found, parts = jax.jit(of)(trainer.state, rows)
    return jax.tree.map(np.asarray, found), float(parts.loss)


@cache
def plain(kind: str) -> tuple[Trainer, dict[str, np.ndarray], float]:
    """A run in plain arithmetic before its first step, and what that gives."""
    trainer = Trainer(make_run(MODELS[kind]), ONE)
    return trainer, *gradients(trainer)


def check_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], least: float = 0.99) -> None:
    assert all(np.isfinite(value).all() for value in found.values())
    assert any((found[name] != value).any() for name, value in wanted.items())
    names = sorted(wanted)
    flat = (np.concatenate([np.ravel(side[name]) for name in names]) for side in (found, wanted))
    assert cosine(*flat) > least


@pytest.mark.parametrize(
    ("kind", "matmul", "form", "least"),
    [
        ("dense", "int8", {}, 0.999),
        ("dense", "fp8", {}, 0.99),
        ("moe", "int8", {"layers": "stacked", "remat": "dots"}, 0.99),
        ("moe", "fp8", {"layers": "stacked", "remat": "block"}, 0.99),
        pytest.param("latent", "int8", {}, 0.99, marks=pytest.mark.full),
        # So small a memory is sensitive: its weights times 1 +- 0.004 give plain gradients at a cosine of 0.92.
        pytest.param("hybrid", "int8", {}, 0.95, marks=pytest.mark.full),
    ],
)
def test_gradients_are_close_to_plain_ones(kind: str, matmul: Matmul, form: dict[str, Any], least: float) -> None:
    trainer, wanted, loss = plain(kind)
    if form:
        found, own = gradients(Trainer(replace(trainer.run, matmul=matmul, **form), ONE))
        found = unstack(found, trainer.run.model)
    else:
        found, own = gradients(Trainer(replace(trainer.run, matmul=matmul), ONE, trainer.state))
    assert own == pytest.approx(loss, rel=0.01) and own != loss
    check_close(found, wanted, least)


@pytest.mark.parametrize("matmul", ["int8", pytest.param("fp8", marks=pytest.mark.full)])
def test_many_devices_are_close_too(matmul: Matmul) -> None:
    """Layers run under `shard_map` there, with weights that are gathered before they are rounded."""
    trainer, wanted, loss = plain("moe")
    run = replace(trainer.run, matmul=matmul, mesh=EIGHT)
    found, own = gradients(Trainer(run, make_mesh(EIGHT), trainer.state))
    assert own == pytest.approx(loss, rel=0.01)
    check_close(found, wanted)


@cache
def losses(matmul: Matmul) -> list[float]:
    """Of thirty steps on three batches."""
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    trainer = Trainer(make_run(MOE, matmul=matmul, optimizer=optimizer), ONE)
    return [float(trainer(make_rows(trainer.run, step % 3))["loss"]) for step in range(30)]


@pytest.mark.full
@pytest.mark.parametrize("matmul", ["int8", "fp8"])
def test_training_follows_plain_training(matmul: Matmul) -> None:
    wanted, found = losses("plain"), losses(matmul)
    assert wanted[-1] < 0.2 * wanted[0]
    # Two paths of fast learning part and meet again: they are compared as a whole, and at their ends.
    assert np.mean(np.abs(np.subtract(found, wanted)) / wanted) < 0.03
    assert abs(found[-1] - wanted[-1]) < 0.05 * wanted[-1] + 0.03
    assert found != wanted


def test_only_training_is_in_8_bits() -> None:
    trainer, *_ = plain("moe")
    rows = make_rows(trainer.run)
    other = Trainer(replace(trainer.run, matmul="int8"), ONE, trainer.state)
    a, b = (jax.jit(make_validation_step(t.run, t.skeleton, t.loss))(t.state, rows)["loss"] for t in (trainer, other))
    np.testing.assert_array_equal(a, b)
    batch = Batch(*(jnp.asarray(rows[name]) for name in ("tokens", "positions", "segments")))
    text = {
        t.run.matmul: str(jax.make_jaxpr(lambda s, t=t: forward(t.skeleton.merge(s.params, s.extra), batch))(t.state))
        for t in (trainer, other)
    }
    assert "i8[" in text["int8"] and "i8[" not in text["plain"]


@pytest.mark.full
def test_a_run_saves_resumes_and_generates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_project(tmp_path / "project")
    words = ["train", str(config), "--steps", "6", "--checkpoint.every", "3", "--validate-every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert qmax.main([*words, "--matmul", "int8", "--out", str(whole)]) == 0
    assert qmax.main([*words, "--matmul", "int8", "--out", str(cut), "--checkpoint.keep", "9"]) == 0
    last = max((cut / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    last.rename(tmp_path / "gone")
    assert qmax.main([*words, "--matmul", "int8", "--out", str(cut), "--resume"]) == 0
    assert hashes(cut) == hashes(whole)
    assert [record["loss"] for record in records(cut)] == [record["loss"] for record in records(whole)]
    capfd.readouterr()
    assert qmax.main(["generate", str(whole), "--prompt", "the", "--max-tokens", "4", "--temperature", "0"]) == 0
    assert capfd.readouterr().out


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from model import linear as module

    module.dense_config.cache_clear()
    monkeypatch.setitem(sys.modules, "qwix._src.core.dot_general_qt", None)
    with pytest.raises(UserError, match=r"matmul=fp8 needs qwix .*pip install 'qmax\[quantized\]'"):
        Trainer(make_run(DENSE, matmul="fp8"), ONE)
