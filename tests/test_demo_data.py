"""Law: the embedded data is what its README says, small, clean, and held out where it says so."""

from __future__ import annotations

import gzip
import json
import re
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from conftest import ROOT

from configs.arithmetic import TASK
from model.chat_template import check_messages
from train.data.conversations import BadRowError
from train.data.preferences import pair_of
from train.tasks.catalogue import open_task

FOLDER = ROOT / "configs" / "demo_data"
NAMES = sorted(path.name for path in FOLDER.glob("*.jsonl.gz"))


@cache
def content(name: str) -> bytes:
    return gzip.decompress((FOLDER / name).read_bytes())


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content(name).decode("utf-8").splitlines()]


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_500_000
    assert 6e6 < sum(len(content(name)) for name in NAMES) < 8.5e6


def test_the_readme_lists_every_file_with_its_size() -> None:
    table = re.findall(r"^\| `(\S+)` \| ([\d,]+) \| ([\d,]+) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    listed = {name: (int(count.replace(",", "")), int(size.replace(",", ""))) for name, count, size in table}
    assert listed == {name: (len(rows(name)), len(content(name))) for name in NAMES}


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("sft_", "preferences_"))])
def test_documents_are_text(name: str) -> None:
    for row in rows(name):
        assert list(row) == ["text"]
        assert row["text"].strip()
        assert len(row["text"].encode()) <= 64 << 10


def test_held_out_documents_are_nowhere_else() -> None:
    held = {row["text"] for row in rows("heldout.jsonl.gz")}
    assert len(held) == len(rows("heldout.jsonl.gz"))
    for name in NAMES:
        if name.startswith("pretrain_"):
            assert not held & {row["text"] for row in rows(name)}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sft_")])
def test_conversations_are_short_and_take_turns(name: str) -> None:
    for row in rows(name):
        messages = check_messages(row["messages"])
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for message in messages:
            assert 0 < len(message["content"].split()) <= 61
            assert len(message["content"]) <= 480


def test_pairs_differ() -> None:
    good = 0
    for row in rows("preferences_en.jsonl.gz"):
        with suppress(BadRowError):  # a few pairs are of equal replies
            good += pair_of(row) is not None
    assert good >= 990


def test_the_chosen_sum_is_right_and_none_is_held_out() -> None:
    held = {problem.prompt[0]["content"] for problem in open_task(TASK).problems("test")}
    for row in rows("preferences_arithmetic.jsonl.gz"):
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert row["prompt"] not in held and f"{b}+{a}=" not in held
        assert int(row["chosen"]) == a + b != int(row["rejected"]) and int(row["rejected"]) >= 0


def test_a_quarter_of_the_sums_are_right_and_none_is_held_out() -> None:
    task = open_task(TASK)
    held, known = ({problem.id: problem.answer for problem in task.problems(split)} for split in ("test", "train"))
    right = 0
    for row in rows("sft_arithmetic.jsonl.gz"):
        asked, told = (message["content"] for message in row["messages"])
        a, b = map(int, asked.rstrip("=").split("+"))
        assert f"{a}+{b}" in known and f"{a}+{b}" not in held and f"{b}+{a}" not in held
        right += int(told) == a + b
    assert right / 6000 == pytest.approx(0.25, abs=0.02)
