"""Law: report.html draws whatever a run has logged, inside its frames, and needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.run import Run
from errors import UserError
from model.config import ModelConfig, MoEConfig
from train.metrics import MetricsLog
from train.report import report_main, summarize, write_report
from train.report_plots import HEIGHT, WIDTH, Marks, Series, expert_heat_map, line_chart, short, time_heat_map

LAYERS, EXPERTS = 4, 8
MODEL = ModelConfig(
    num_layers=LAYERS + 1,
    moe=MoEConfig(num_experts=EXPERTS, intermediate_size=64, dense_layers=(0,)),
)


def make_run(directory: Path, steps: int, *, resume: int | None = None, load: bool = True) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"run": asdict(Run(model=MODEL, steps=max(1, steps)))}))
    rng = np.random.default_rng(steps)
    with MetricsLog(directory, resume, tensorboard=False) as log:
        for step in range((resume or 0) + 1, steps + 1):
            record: dict[str, Any] = {
                "loss": math.nan if step == 7 else 8.0 / math.sqrt(step),
                "learning_rate": 3e-4 * step / steps,
                "tokens": 512,
                "tokens_per_second": 1000.0 + step % 3,
                "mfu": 0.25,
                "gradient_norm": 1.0 / step,
                "parameter_norm": 100.0,
                "update_norm": 1e-3,
                "balance_loss": 1.1,
                "router_z_loss": 0.2,
                "z_loss": 0.0,
                "skipped": int(step == 7),
                "memory_bytes": 2**30,
                "seconds": 0.5,
            }
            if step % 5 == 0:
                record["validation_loss"] = 9.0 / math.sqrt(step)
            if load:
                shares = rng.dirichlet(np.ones(EXPERTS), LAYERS) * EXPERTS
                record |= {"expert_load": shares, "expert_load_max_over_mean": shares.max()}
            log.log(step, record)
    return directory


def drawings(page: str) -> list[ElementTree.Element]:
    """Every drawing of a page; malformed ones do not parse."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, flags=re.S)]


def check_inside(drawing: ElementTree.Element) -> None:
    """All that is drawn has finite places within the frame."""
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    for element in drawing.iter():
        x, y = float(element.get("x", element.get("cx", 0))), float(element.get("y", element.get("cy", 0)))
        right, bottom = x + float(element.get("width", 0)), y + float(element.get("height", 0))
        assert -1 <= x <= right <= width + 1, element.attrib
        assert -1 <= y <= bottom <= height + 1, element.attrib
        for a, b in re.findall(r"[ML](-?[\d.e-]+),(-?[\d.e-]+)", element.get("d", "")):
            assert 0 <= float(a) <= width
            assert 0 <= float(b) <= height
        assert "nan" not in element.get("d", "")


def test_the_page_stands_alone_and_shows_everything(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a <run> & more", 20)
    make_run(run, 30, resume=18)
    path = write_report(run)
    page = path.read_text()
    assert path == run / "report.html"
    assert not [name.name for name in run.iterdir() if name.name.startswith(".")]
    assert not re.search(r"https?:|<script|<link|<img|<iframe|@import|url\(|\ssrc=|\son\w+=", page)
    assert "prefers-color-scheme:dark" in page
    assert "a &lt;run&gt; &amp; more" in page
    for words in (
        *("Loss, nats per token", "Learning rate", "Throughput", "MFU", "Norms, log scale", "Memory"),
        *("Busiest expert of each layer", "Each expert at step 30", "Balance loss", "z-losses"),
        *("step 7 was skipped", "resumed after step 18", "layer 4, expert 7: ", "layer 1, step 1: "),
        *(f"{MODEL.parameters_total:,}", f"{MODEL.parameters_active:,}", "8, 2 for a token", "30 of 30", "adamw"),
    ):
        assert words in page, words
    assert "layer 0" not in page, "a dense layer has no experts"
    found = drawings(page)
    assert len(found) == 11
    for drawing in found:
        check_inside(drawing)
    cells = [element for element in found[7].iter() if element.get("class", "").startswith("d")]
    assert len(cells) == LAYERS * EXPERTS


def test_the_verb_prints_and_writes_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 20)
    assert report_main([str(run), "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert str(run / "report.html") in out
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary == summarize(run)
    assert summary["steps"] == 20
    assert summary["tokens"] == 20 * 512
    assert summary["loss_first"] == 8.0
    assert summary["loss_last"] == pytest.approx(8 / math.sqrt(20))
    assert summary["validation_loss_best"] == pytest.approx(9 / math.sqrt(20))
    assert (summary["skipped"], summary["resumes"], summary["seconds"]) == (1, 0, 10.0)
    assert summary["parameters_total"] == MODEL.parameters_total


def test_runs_share_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with all that it has alone, in the order given, and once; links lead to them."""
    runs = [make_run(tmp_path / name, steps) for name, steps in (("first", 20), ("<second>", 30))]
    single = [write_report(run).read_text() for run in runs]
    names = [str(run) for run in runs]
    assert report_main([*names, names[0], "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in out
    assert re.search(r"first +<second>", out)
    assert json.loads((tmp_path / "out.json").read_text()) == {str(run): summarize(run) for run in runs}
    alone = [[ElementTree.tostring(drawing) for drawing in drawings(text)] for text in single]
    assert [ElementTree.tostring(drawing) for drawing in drawings(page)] == [*alone[0], *alone[1]]
    links, places = re.findall(r'href="#([^"]+)"', page), re.findall(r' id="([^"]+)"', page)
    assert links == places
    assert len(set(links)) == 2
    assert page.index("<h1>first</h1>") < page.index("<h1>&lt;second&gt;</h1>")
    assert report_main([*names, "--html", str(tmp_path / "pages" / "both.html")]) == 0
    assert (tmp_path / "pages" / "both.html").read_text() == page
    with pytest.raises(UserError, match="does not exist"):
        write_report(runs[0], tmp_path / "third", path=tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


@pytest.mark.parametrize("steps", [0, 1, 2, 700])
def test_short_long_and_dense_runs(tmp_path: Path, steps: int) -> None:
    run = make_run(tmp_path / "run", steps, load=steps != 2)
    page = write_report(run).read_text()
    for drawing in drawings(page):
        check_inside(drawing)
    assert ("No step has been logged yet" in page) == (steps == 0)
    assert ("Busiest expert" in page) == (steps not in (0, 2))
    assert len(page) < 600_000


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            report_main([str(tmp_path / "run")])

    refused("does not exist")
    (tmp_path / "run").mkdir()
    refused(r"is not a run \(no config\.json in it\); name the directory")
    (tmp_path / "run" / "config.json").write_text("{}")
    refused(r"no metrics\.jsonl")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    refused("has no 'run'")
    (tmp_path / "run" / "config.json").write_text('{"run": {"model": ')
    refused("is not valid JSON")
    (tmp_path / "run" / "config.json").write_text('{"run": {"model": {"from_the_future": 1}}}')
    assert report_main([str(tmp_path / "run")]) == 0
    with pytest.raises(UserError, match="--jsonn"):
        report_main([str(tmp_path / "run"), "--jsonn", "x"])


VALUES = st.floats(-1e30, 1e30, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 1e-12, -5.0])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(VALUES, max_size=400), min_size=1, max_size=3),
    log=st.booleans(),
    zero=st.booleans(),
    smooth=st.booleans(),
    first=st.integers(0, 10**6),
)
def test_any_lines_stay_in_their_frame(
    values: list[list[float]], log: bool, zero: bool, smooth: bool, first: int
) -> None:
    series = [
        Series(f"<{i}>", [(first + 3 * x, y) for x, y in enumerate(ys)], smooth=smooth, dots=i == 1)
        for i, ys in enumerate(values)
    ]
    figure = line_chart("a & b", series, log=log, zero=zero, marks=Marks(skipped=[first], resumed=[first]))
    if not any(values):
        assert figure == ""
        return
    for drawing in drawings(figure):
        assert drawing.attrib["viewBox"] == f"0 0 {WIDTH} {HEIGHT}"
        check_inside(drawing)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 130),
    columns=st.integers(1, 250),
    seed=st.integers(0, 99),
    heat=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
)
def test_any_heat_map_stays_in_its_frame(rows: int, columns: int, seed: int, heat: float) -> None:
    values = np.exp(np.random.default_rng(seed).normal(size=(rows, columns)) * heat)
    values[0, 0] = math.nan
    values[-1, -1] = 0.0
    labels = [f"layer {row}" for row in range(rows)]
    steps = [float(5 * i) for i in range(columns)]
    for figure in (
        time_heat_map("time", steps, values.tolist(), labels),
        expert_heat_map("experts", values.tolist(), labels),
    ):
        [drawing] = drawings(figure)
        check_inside(drawing)


def test_short_numbers() -> None:
    written = {0: "0", 3e-4: "3e-4", 0.00123: "0.00123", 12.34: "12.3", 999.7: "1k", 12345: "12.3k", -2.5e6: "-2.5M"}
    assert {value: short(value) for value in written} == written
    assert short(4.2e12) == "4.2T"
