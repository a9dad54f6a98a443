"""Law: the benchmark's arithmetic is the model's own, and each of our measurements runs and compiles nothing late."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as bench
from bench import ours, peer_llama, peer_maxtext, table, timing
from bench.parts import parts
from bench.processes import MeasurementError, run_job, run_llama
from bench.shapes import BYTES, SHAPES, TOY, Limits
from model.load import open_model


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("name", "total", "multiplied", "megaflops", "one", "sixteen"),
    [("T", 9_185_792, 3.42e6, 7.62, 14.5, 44.9), ("S", 190_195_200, 41.7e6, 86.5, 169.9, 674.2)],
)
def test_shapes_cost_what_they_should(
    name: str, total: int, multiplied: float, megaflops: float, one: float, sixteen: float
) -> None:
    shape, model = SHAPES[name], SHAPES[name].model
    assert model.parameters_total == total
    assert model.parameters_active - shape.head_parameters == pytest.approx(multiplied, rel=1e-3)
    assert model.flops_per_token(shape.decode_context) / 1e6 == pytest.approx(megaflops, rel=1e-3)
    assert shape.decode_bytes(1) / 1e6 == pytest.approx(one, rel=4e-3)
    assert shape.decode_bytes(16) / 1e6 == pytest.approx(sixteen, rel=4e-3)


def test_decoding_reads_the_active_weights_and_the_cache() -> None:
    for shape in SHAPES.values():
        model = shape.model
        norms = model.hidden_size + model.num_layers * 2 * (model.hidden_size + model.head_dim)
        weights = model.parameters_active - shape.head_parameters - norms
        cache = shape.decode_context * model.kv_bytes_per_token(BYTES)
        assert shape.decode_bytes(1) == pytest.approx(weights * BYTES + cache)
        assert shape.distinct_experts(10**6) == pytest.approx(model.moe.num_experts)


def test_bounds_scale_with_the_machine() -> None:
    slow, fast = Limits(1e11, 1e10), Limits(2e11, 2e10)
    for shape in SHAPES.values():
        for bound in (shape.train_bound, shape.prefill_bound, lambda limits, s=shape: s.decode_bound(16, limits)):
            assert bound(fast) == pytest.approx(2 * bound(slow))


@pytest.mark.parametrize(
    "job",
    [
        {"what": "train", "shape": "toy", "repeats": 2},
        {"what": "decode", "shape": "toy", "repeats": 2, "rows": 2},
        {"what": "prefill", "shape": "toy", "repeats": 2},
    ],
    ids=lambda job: job["what"],
)
def test_measurements_run_and_compile_nothing_late(job: dict[str, Any]) -> None:
    found = ours.measure(job)
    assert len(found["rates"]) == 2
    assert found["compilations_after_warmup"] == 0
    assert found.get("step_compilations", 1) == 1


def test_loss_is_measured() -> None:
    found = ours.loss(repeats=1, width=16, vocab=2048, tokens=64)
    assert found["temporary_share"] * 64 * 2048 * BYTES == found["temporary_bytes"] > 0
    assert found["rates"][0] > 0 and found["at_once_rates"][0] > 0


@pytest.mark.parametrize("part", ["experts", "attention"])
def test_layers_are_measured(part: str) -> None:
    assert len(ours.measure({"what": "layer", "part": part, "shape": "toy", "repeats": 2})["rates"]) == 2


def test_a_step_of_reward_is_measured_beside_its_parts() -> None:
    found = ours.measure({"what": "reward", "shape": "toy", "repeats": 1, "replay": False})["samples"]
    assert all(len(values) == 1 and values[0] > 0 for values in found.values()), found
    assert found["handover share"][0] < 1


def test_parts_add_up() -> None:
    seconds = parts(TOY, repeats=1)["seconds"]
    assert seconds["step"] == pytest.approx(sum(value for name, value in seconds.items() if name != "step"))


def test_a_child_gives_its_last_line_or_a_reason() -> None:
    command = [sys.executable, "-c"]
    code = "import json, time; t = time.monotonic; b = t(); time.sleep(0.4); print(json.dumps({'spans': [[b, t()]]}))"
    assert run_job([*command, code], {}, {})["other_cpu"] >= 0
    with pytest.raises(MeasurementError, match="no room"):
        run_job([*command, "raise SystemExit('no room')"], {}, {})
    with pytest.raises(MeasurementError, match="does not run"):
        run_job(["/nowhere/python"], {}, {})


def test_llama_cpp_is_given_our_shape_and_understood(tmp_path: Path) -> None:
    """What it is given is what our own reader finds in the file."""
    peer_llama.write(TOY, tmp_path / "toy.gguf", "llama.cpp F32")
    found = open_model(tmp_path / "toy.gguf").config
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "qk_norm"):
        assert getattr(found, name) == getattr(TOY.model, name), name
    assert found.moe == TOY.model.moe
    stored = {name: array for name, array, _ in peer_llama.tensors(SHAPES["T"], peer_llama.KINDS["llama.cpp Q8_0"])}
    expert = stored["blk.3.ffn_down_exps.weight"]
    assert (expert.dtype, expert.size) == (np.uint8, SHAPES["T"].model.moe.num_experts * 256 * 256 // 32 * 34)
    assert peer_llama.find(str(tmp_path)) is None
    for name in peer_llama.PROGRAMS:
        (tmp_path / name).write_text('#!/bin/sh\necho \'{"speed_tg": 81.5, "avg_ts": 900.25}\'\n')
        (tmp_path / name).chmod(0o755)
    folder = peer_llama.find(str(tmp_path))
    assert folder is not None and folder == tmp_path
    assert run_llama(folder, tmp_path / "toy.gguf", TOY, 16, 2)["rates"] == [81.5, 81.5]
    assert (
        run_llama(folder, tmp_path / "toy.gguf", TOY, 0, 1)["rates"]
        == [900.25]
        == run_llama(folder, tmp_path / "x", TOY, 1, 1)["rates"]
    )
    with pytest.raises(ValueError, match="no speed_tg in what it printed"):
        peer_llama.read([(0.0, "a reason")], 2)


def test_the_log_of_maxtext_is_read() -> None:
    log = [(float(i), f"metric_logger.py:265] completed step: {i}, seconds: 2.000, loss: 8.8") for i in range(6)]
    found = peer_maxtext.read(TOY, log)
    assert found["rates"] == [TOY.tokens / 2] * 3
    with pytest.raises(ValueError, match="a reason"):
        peer_maxtext.read(TOY, [(0.0, "a reason"), (1.0, "")])


def test_the_page_names_ratios_and_noise() -> None:
    ours_rounds = [{"rates": [100.0], "other_cpu": 0.01, "compilations_after_warmup": 0}] * 3
    peer = {"name": "peer", "required": 0.8, "rounds": [{"rates": [rate], "other_cpu": 0.5} for rate in (50, 80, 200)]}
    entry = {"what": "train", "shape": "T", "ours": ours_rounds, "peers": [peer], "bound": 400.0}
    limits = {"device": "cpu", "bandwidth": 2e10, "flops": 1e11, "versions": {}}
    machine = table.describe(limits, {"peer": "1.0"})
    page = table.page(
        {
            "machine": machine,
            "measured": [entry],
            "parts": {},
            "loss": [],
            "layers": [],
            "compared": [],
            "notes": ["one: why"],
        }
    )
    assert "| ~ train | T | 100 (0%) | peer | 80 (188%) | 1.25 | 0.80 | 25% | 0.01 / 0.50 |" in page
    assert "- one: why" in page


def test_bad_options_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--shape", "T,U"]) == 2
    assert "'U'" in capsys.readouterr().err
