"""Law: translations are scored as sacrebleu scores them, each by itself and all together."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from train.tasks.catalogue import open_task
from train.tasks.graders import chrf_score
from train.tasks.questions import Translation

LETTERS = st.text("abcde 我喜欢猫。.,!é\n\u3000", max_size=30) | st.text(max_size=20)


def opened(folder: Path, target: str, pairs: dict[str, str]) -> Translation:
    file = folder / "t.jsonl"
    rows = [json.dumps({"source": source, "target": wanted}) + "\n" for source, wanted in pairs.items()]
    file.write_text("".join(rows), encoding="utf-8")
    task = open_task(f"translation:{file}?target={target}")
    assert isinstance(task, Translation)
    return task


@given(LETTERS, LETTERS)
@settings(max_examples=300, deadline=None)
def test_chrf_of_a_sentence_is_sacrebleus(hypothesis: str, reference: str) -> None:
    theirs = sacrebleu.sentence_chrf(hypothesis, [reference]).score / 100
    assert math.isclose(chrf_score(hypothesis, reference), theirs, abs_tol=1e-9)


def test_bleu_of_a_corpus_by_hand(tmp_path: Path) -> None:
    task = opened(tmp_path, "en", {"a": "the cat sat on the mat", "b": "a dog ran"})
    scores = task.corpus(task.problems("test"), ["the cat sat on a mat", "<think>hm</think>\na dog ran"])
    # 8 of 9 words, 5 of 7 pairs, 3 of 5 triples and 1 of 3 fours are right; the lengths are the same.
    assert scores["bleu"] == pytest.approx(100 * (8 / 9 * 5 / 7 * 3 / 5 * 1 / 3) ** 0.25)
    short = task.corpus(task.problems("test"), ["the cat sat on", "a dog ran"])["bleu"]
    assert short == pytest.approx(100 * math.exp(1 - 9 / 7))  # all right, two words too few
    assert task.corpus(task.problems("test"), ["<think>the cat", ""]) == {"bleu": 0, "chrf": 0}


@pytest.mark.parametrize(
    ("target", "wanted", "said", "bleu"),
    [
        ("zh", "我喜欢红色的猫。", "我喜欢红色的狗。", (7 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25),
        ("zh", "我用 Python 写程序", "我用 Python 写程序", 1.0),
        ("ja", "猫が好きです。", "猫が好きだ。", None),
        ("fr", "Il est là, oui.", "Il est là , oui .", 1.0),  # 13a parts commas from words
    ],
)
def test_words_are_cut_as_the_language_wants(
    target: str, wanted: str, said: str, bleu: float | None, tmp_path: Path
) -> None:
    task = opened(tmp_path, target, {"x": wanted})
    scores = task.corpus(task.problems("test"), [said])
    if bleu is None:
        assert 30 < scores["bleu"] < 90
    else:
        assert scores["bleu"] == pytest.approx(100 * bleu)
    assert 0 < scores["chrf"] <= 100


def test_every_problem_has_a_reply(tmp_path: Path) -> None:
    task = opened(tmp_path, "fr", {"yes": "oui", "no": "non"})
    assert task.corpus(task.problems("test"), ["oui", "non"])["chrf"] == pytest.approx(100)
    for problems, replies in ((task.problems("test"), ["oui"]), ([], [])):
        with pytest.raises(ValueError, match="replies to"):
            task.corpus(problems, replies)
