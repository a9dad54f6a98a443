"""Law: the report draws what alignment measures, and shows replies as text and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from configs.alignment import RLConfig
from configs.run import Run
from tests.test_report import check_inside, drawings
from train.metrics import MetricsLog
from train.report import summarize, write_report
from train.report_alignment import STEPS_SHOWN, rebinned, sample_cards
from train.samples_file import SAMPLES, read_samples, write_samples

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PAIRS = {
    "loss": 0.7,
    "accuracy": 0.5,
    "chosen_reward": 0.1,
    "rejected_reward": -0.2,
    "reward_margin": 0.3,
    "validation_accuracy": 0.75,
    "validation_chosen_reward": 0.05,
    "validation_reward_margin": 0.15,
}
REPLIES = {
    "loss": 0.0,
    "reward": 0.4,
    "reward_deviation": 0.5,
    "reply_tokens": 3.5,
    "entropy": 0.3,
    "clip_fraction": 0.0,
    "ratio_max": 1.5,
    "logprob_gap": 1e-7,
    "logprob_gap_max": 1e-4,
    "equal_groups": 0.25,
    "cut_replies": 0.5,
    "seconds_rollout": 0.5,
    "seconds_scoring": 1e-5,
    "seconds_update": 2.0,
    "seconds_handover": 0.02,
    "reward_histogram": [3, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    "reward_range": [0.0, 1.0],
    "length_histogram": [0, 0, 2, 2, 0, 0, 0, 0, 0, 0],
    "validation_reward": 0.6,
}


def make_run(directory: Path, record: dict[str, Any], steps: int = 4, **more: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"run": asdict(Run(**more))}))
    with MetricsLog(directory, None, tensorboard=False) as log:
        for step in range(1, steps + 1):
            log.log(step, {name: value + step / 100 if name == "loss" else value for name, value in record.items()})
    return directory


def titles(page: str) -> list[str]:
    """Of the page's figures."""
    return re.findall(r"<figure><figcaption><h2>(.*?)</h2>", page)


def test_preferences_are_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", PAIRS, objective="dpo")
    page = write_report(run).read_text()
    assert titles(page) == [
        *("Preferred rightly", "Reward of chosen and rejected replies", "Margin between rewards", "Loss"),
    ]
    assert "chosen, held out <b>0.05</b>" in page
    assert "held out <b>75%</b>" in page
    for drawing in drawings(page):
        check_inside(drawing)
    summary = summarize(run)
    assert (summary["accuracy"], summary["validation_accuracy"], summary["reward_margin"]) == (0.5, 0.75, 0.3)
    assert "reward" not in summary


def test_reinforcement_learning_is_drawn(tmp_path: Path) -> None:
    rl = RLConfig(tasks=("arithmetic",), max_new_tokens=20)
    run = make_run(tmp_path / "run", REPLIES, objective="rl", rl=rl)
    page = write_report(run).read_text()
    assert titles(page) == [
        *("Reward", "Tokens of a reply", "Replies that teach little", "Rewards", "Tokens of replies"),
        *("Entropy of the next token, nats", "Tokens whose ratio is clipped", "Largest ratio of probabilities"),
        *("Trainer and sampler: gap of log-probabilities, log scale", "Seconds of a step, log scale", "Loss"),
    ]
    for words in ("handover <b>0.02 s</b>", "replies cut at their longest <b>50%</b>", "deviation <b>0.5</b>"):
        assert words in page
    assert "scoring" not in page, "what takes no time is left out"
    for words in ("≥ 0.9, step 1: 25.0%", "≥ 0, step 4: 75.0%", "≥ 4, step 2: 50.0%", "≥ 18, step 1: 0.0%"):
        assert words in page, words
    for drawing in drawings(page):
        check_inside(drawing)


def test_histograms_of_different_ranges_are_laid_over_each_other() -> None:
    assert rebinned([3, 0, 0, 1], (0, 1), (0, 1)) == [0, 0.75, 0, 0, 0, 0, 0, 0, 0.25, 0]
    assert rebinned([2, 2], (0, 2), (-10, 10)) == [0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0]
    assert rebinned([0, 4], (5, 5), (0, 10)) == [0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0]
    assert rebinned([0, 4], (5, 5), (5, 5)) == [1.0]
    assert sum(rebinned([0, 0], (0, 1), (0, 1))) == 0


def test_replies_are_text_and_the_latest_are_open() -> None:
    talk = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "1+1=", "more": 1}]
    samples = [
        {"step": 5, "prompt": "Once & again", "reply": ""},
        {"step": 10, "prompt": talk, "reply": "<script>alert(1)</script>\n\u2028two", "reward": 0.5},
        {"step": 10, "prompt": [{"role": "user", "content": None}], "reply": "x" * 9000, "reward": float("nan")},
    ]
    page = sample_cards(samples)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "system: Be &lt;b&gt;brief&lt;/b&gt;.\nuser: 1+1=" in page
    assert page.index("<details open><summary>step 10") < page.index("<details><summary>step 5")
    assert page.count("<b>0.5</b>") == page.count("<b>") == 1
    assert "<em>nothing</em>" in page
    assert len(page) < 4000
    assert sample_cards([]) == ""
    many = sample_cards([{"step": step, "prompt": "a", "reply": "b"} for step in range(STEPS_SHOWN + 3)])
    assert "3 earlier steps" in many


def test_a_step_is_written_once_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    write_samples(tmp_path, 1, [{"prompt": "a", "reply": "b\u2028c"}])
    write_samples(tmp_path, 2, [{"prompt": "a", "reply": "c"}, {"prompt": "b", "reply": "d"}])
    write_samples(tmp_path, 2, [{"prompt": "a", "reply": "again"}])
    assert [(one["step"], one["reply"]) for one in read_samples(tmp_path)] == [(1, "b\u2028c"), (2, "again")]
    with open(tmp_path / SAMPLES, "a") as file:
        file.write('{"step": 3, "prom')
    assert len(read_samples(tmp_path)) == 2
    assert read_samples(tmp_path / "none") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_a_phone(tmp_path: Path, browser: Browser, theme: Any) -> None:
    run = make_run(tmp_path / "run", REPLIES, objective="rl", rl=RLConfig(tasks=("arithmetic",)))
    write_samples(run, 4, [{"prompt": "word_" * 60, "reply": "long_" * 60, "reward": 1.0}])
    context = browser.new_context(color_scheme=theme, viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(write_report(run).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("article p.prompt").is_visible()
    page.locator("summary").click()
    assert not page.locator("article p.prompt").is_visible()
    card = page.evaluate("getComputedStyle(document.querySelector('article')).backgroundColor")
    assert (card == "rgb(255, 255, 255)") == (theme == "light")
    context.close()
