"""Law: every step stands once in metrics.jsonl, whatever was killed when, and every line is valid JSON."""

from __future__ import annotations

import importlib
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from train.metrics import MetricsLog, Throughput, device_peak_flops, memory_in_use, read_metrics
from train.progress import TrainProgress


def strict(text: str) -> Any:
    """JSON as every reader takes it: no NaN, no Infinity."""
    return json.loads(text, parse_constant=pytest.fail)


def test_a_line_is_there_when_log_returns(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in (1, 2, 5):
            log.log(step, {"loss": jnp.float32(0.1), "skipped": np.int32(0), "tokens": 10**13, "good": True})
            line = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
            assert strict(line)["step"] == step
    record = read_metrics(tmp_path)[-1]
    assert record.pop("time") > 1.7e9
    assert record == {"step": 5, "loss": 0.1, "skipped": 0, "tokens": 10**13, "good": 1}


def test_float32_is_kept_exactly(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step, value in enumerate(values):
            log.log(step, {"loss": jnp.asarray(value)})
    assert [np.float32(record["loss"]) for record in read_metrics(tmp_path)] == list(values)


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        load = np.array([[1.0, math.inf], [0.25, 2.0]])
        log.log(1, {"loss": math.nan, "z_loss": jnp.float32(-math.inf), "expert_load": load, "tokens": 3})
    record = strict((tmp_path / "metrics.jsonl").read_text())
    assert record["loss"] is None
    assert record["z_loss"] is None
    assert record["expert_load"] == [[1, None], [0.25, 2]]
    assert record["nonfinite"] == ["loss", "z_loss", "expert_load"]


def test_each_step_is_logged_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log(3, {})
        with pytest.raises(ValueError, match="each is logged once"):
            log.log(3, {})
    with (
        MetricsLog(tmp_path, resume_step=3, tensorboard=False) as log,
        pytest.raises(ValueError, match="each is logged once"),
    ):
        log.log(2, {})


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(0, 12), resume=st.integers(0, 14), cut=st.integers(0, 200))
def test_resume_cuts_back_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, steps: int, resume: int, cut: int
) -> None:
    """A file torn at any byte and resumed at any step goes on: steps ascend, each once, and none is lost."""
    run = tmp_path_factory.mktemp("run")
    with MetricsLog(run, tensorboard=False) as log:
        for step in range(1, steps + 1):
            log.log(step, {"loss": step / 3})
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    intact = path.read_bytes().count(b"\n")
    with MetricsLog(run, resume_step=resume, tensorboard=False) as log:
        assert [record["step"] for record in read_metrics(run)] == list(range(1, min(intact, resume) + 1))
        for step in range(resume + 1, resume + 4):
            log.log(step, {"loss": step / 3})
    records = read_metrics(run)
    numbers = [record["step"] for record in records]
    assert numbers == [*range(1, min(intact, resume) + 1), *range(resume + 1, resume + 4)]
    assert all(record["loss"] == record["step"] / 3 for record in records)
    assert [record["step"] for record in records if "resumed_from" in record] == [resume + 1]


def test_a_fresh_run_forgets_an_older_one(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path, tensorboard=False) as log:
            log.log(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path / "elsewhere")


def test_large_arrays_are_written_now_and_then(tmp_path: Path) -> None:
    load = np.full((94, 128), 1 / 3)
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 101):
            log.log(step, {"expert_load": load, "small": load[:2, :4]})
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records if "expert_load" in record] == [1, 24, 48, 72, 96]
    assert all(record["small"] == [[0.3333] * 4] * 2 for record in records)
    assert (tmp_path / "metrics.jsonl").stat().st_size < 100 * 6_000


def test_tensorboard_purges_what_was_taken_back(tmp_path: Path) -> None:
    messages = importlib.import_module("tensorboardX.proto.event_pb2")
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": 2.0})
        log.log(2, {"loss": 1.5})
    with MetricsLog(tmp_path, resume_step=1) as log:
        log.log(2, {"loss": 1.25})
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(messages.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    values = [(event.step, event.summary.value[0].simple_value) for event in events if event.summary.value]
    assert sorted(values) == [(1, 2.0), (2, 1.25), (2, 1.5)]
    assert [event.step for event in events if event.session_log.status == messages.SessionLog.START] == [0, 2]


def test_a_refusing_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        MetricsLog(tmp_path / "file" / "run", tensorboard=False)
    if Path("/dev/full").exists():
        log = MetricsLog(tmp_path, tensorboard=False)
        log._file.close()
        log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with log, pytest.raises(UserError, match="No space left on device"):
            log.log(1, {"loss": 1.0})


def test_throughput_leaves_out_the_first_step_and_pauses() -> None:
    now = 0.0
    meter = Throughput(window=3, clock=lambda: now)
    now = 50.0  # compiling
    assert meter.step(100) is None
    assert meter.rate is None
    for seconds in (1.0, 2.0, 3.0, 4.0):
        now += seconds
        with meter.pause():
            now += 100.0
        assert meter.step(100) == pytest.approx(seconds)
    assert meter.rate == pytest.approx(300 / 9.0)


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v6 lite", "float32", 918e12),
        ("TPU7x", "bfloat16", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float32", 67e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", None),
        ("Tesla T4", "float16", 65e12),
        ("Quantum 9000", "bfloat16", None),
    ],
)
def test_peaks_of_devices(kind: str, dtype: str, peak: float | None) -> None:
    assert device_peak_flops(SimpleNamespace(platform="tpu", device_kind=kind), dtype) == peak


def test_a_cpu_is_measured_once_and_shared() -> None:
    peaks = {device_peak_flops(device) for device in jax.devices()}
    assert len(peaks) == 1
    [peak] = peaks
    assert peak is not None
    assert 1e7 < peak * len(jax.devices()) < 1e14
    memory = memory_in_use()
    assert memory is not None
    assert 10**7 < memory < 10**12


def test_progress_in_a_log_file_is_a_line_now_and_then() -> None:
    now, stream = 0.0, io.StringIO()
    with TrainProgress(1000, 100, "pretraining", stream=stream, clock=lambda: now) as progress:
        for step in range(101, 141):
            now += 1.0
            progress.update(step, loss=2.0 + 1 / step, tokens_per_second=12345.6)
        progress.print("checkpoint 140 saved")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "pretraining: 110/1,000  loss 2.009  12.3k tokens/s  14:50 left",
        "pretraining: 120/1,000  loss 2.008  12.3k tokens/s  14:40 left",
        "pretraining: 130/1,000  loss 2.008  12.3k tokens/s  14:30 left",
        "pretraining: 140/1,000  loss 2.007  12.3k tokens/s  14:20 left",
        "checkpoint 140 saved",
        "pretraining: 140/1,000  loss 2.007  12.3k tokens/s  14:20 left",
    ]
    progress.close()
    assert stream.getvalue().splitlines() == lines


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with TrainProgress(4, description="training", stream=stream) as progress:
        for step in range(1, 5):
            progress.update(step, loss=1.5, tokens_per_second=900)
        progress.print("said [in] between")
    shown = stream.getvalue()
    assert "4/4" in shown
    assert "loss 1.5" in shown
    assert "said [in] between" in shown
