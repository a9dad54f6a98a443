"""Law: what is hidden in a long text can be found in it, at its place, and no answer is in both splits."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from train.tasks.catalogue import open_task
from train.tasks.haystacks import Ruler
from train.tasks.task import Problem, Split, Task, grade_safely

KINDS: tuple[str, ...] = get_args(get_type_hints(Ruler)["kind"])
SPLITS: tuple[Split, Split] = ("train", "test")
ALL = ["needle", *(f"ruler?kind={kind}" for kind in KINDS)]


def options(spec: str, more: str) -> str:
    return f"{spec}{'&' if '?' in spec else '?'}{more}"


def text_of(problem: Problem) -> str:
    return problem.prompt[0]["content"]


@pytest.mark.parametrize("spec", ALL)
def test_splits_share_no_answer_and_a_greater_size_begins_alike(spec: str) -> None:
    task, more = (open_task(options(spec, f"length=200&size={size}")) for size in (40, 60))
    answers = [{word for p in task.problems(split) for word in p.answer} for split in SPLITS]
    if "cwe" in spec:  # ten words of 33,060: each may be in both, all ten are not
        answers = [{" ".join(sorted(p.answer)) for p in task.problems(split)} for split in SPLITS]
    assert not answers[0] & answers[1] and all(len(task.problems(split)) == 40 for split in SPLITS)
    assert all(list(more.problems(split))[:40] == list(task.problems(split)) for split in SPLITS)
    other = open_task(options(spec, "length=200&size=40&seed=1"))
    assert other.problems("test") != task.problems("test")


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("length", [300, 5000])
def test_texts_have_their_length_and_right_replies_a_full_score(spec: str, length: int) -> None:
    task = open_task(options(spec, f"length={length}&size=3"))
    for problem in task.problems("test"):
        assert 0.9 * length - 60 <= len(text_of(problem).split()) <= 1.05 * length + 200
        assert all(word in text_of(problem) for word in problem.answer)
        assert grade_safely(task, problem, f"<think>?</think>{', '.join(problem.answer)}".upper()).score == 1
        assert grade_safely(task, problem, "I do not know; 1234567").score == 0
        assert grade_safely(task, problem, f"<think>{', '.join(problem.answer)}").score == 0


def test_problems_are_the_same_for_ever() -> None:
    assert [p.answer for p in open_task("needle?size=2").problems("test")] == [["7448625"], ["2937725"]]
    assert open_task("ruler?kind=vt&size=1").problems("test")[0].answer[:2] == ["ARCLR", "IIFMN"]


def test_the_needle_lies_as_deep_as_is_said() -> None:
    for depth in (0.0, 0.25, 1.0):
        for problem in open_task(f"needle?length=2000&size=3&depth={depth}").problems("train"):
            body = text_of(problem).split("\n\n")[1]
            before = len(body.split("The secret number of")[0].split()) / len(body.split())
            assert before == pytest.approx(depth, abs=0.01)
    spread = open_task("needle?length=2000&size=11").problems("train")
    places = [text_of(p).index("The secret number") / len(text_of(p)) for p in spread]
    assert places == sorted(places) and places[0] < 0.05 and places[-1] > 0.9


def test_a_needle_is_a_whole_number() -> None:
    task = open_task("needle?size=1")
    problem = task.problems("test")[0]
    number = problem.answer[0]
    replies = (f"It is {number}.", f"**{number}**", f"1{number}", number[:-1])
    assert [grade_safely(task, problem, reply).score for reply in replies] == [1, 1, 0, 0]


def test_shares_of_what_is_hidden_are_scored() -> None:
    task = open_task("ruler?kind=niah_multivalue&size=1")
    problem = task.problems("test")[0]
    assert len(problem.answer) == 4
    assert [grade_safely(task, problem, " ".join(problem.answer[:n])).score for n in range(5)] == [
        0,
        0.25,
        0.5,
        0.75,
        1,
    ]


@pytest.mark.parametrize(
    ("kind", "needles", "asked"), [(KINDS[0], 1, 1), (KINDS[1], 4, 1), (KINDS[2], 4, 1), (KINDS[3], 4, 4)]
)
def test_needles_are_those_that_are_asked_for(kind: str, needles: int, asked: int) -> None:
    for problem in open_task(f"ruler?kind={kind}&size=5").problems("test"):
        *body, question = text_of(problem).splitlines()
        found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", "\n".join(body))
        names = re.findall(r"[a-z]+-[a-z]+", question)
        assert len(found) == needles and len(set(names)) == asked
        assert sorted(number for name, number in found if name in names) == sorted(problem.answer)


def test_variables_are_all_those_that_lead_to_the_value() -> None:
    for problem in open_task("ruler?kind=vt&size=5").problems("test"):
        text = text_of(problem)
        value = re.findall(r"assigned the value (\d+) in", text)[0]
        holding = {"": value}
        for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", text, re.MULTILINE):
            holding[name] = holding.get(source, source)  # in the order of the text
        assert sorted(name for name, held in holding.items() if held == value and name) == sorted(problem.answer)
        assert len(problem.answer) == 5


@pytest.mark.parametrize("length", [300, 5000])
def test_common_words_are_the_commonest_of_the_list(length: int) -> None:
    for problem in open_task(f"ruler?kind=cwe&size=3&length={length}").problems("test"):
        entries = re.findall(r"\d+\. (\S+)", text_of(problem).split("\n\n")[1])
        counts = Counter(entries).most_common()
        assert {word for word, _ in counts[:10]} == set(problem.answer)
        assert [counts[0][1], counts[9][1], counts[10][1]] == ([6, 6, 1] if length < 4096 else [30, 30, 3])


@pytest.mark.parametrize("length", [100, 1000])
def test_frequent_words_are_the_three_below_the_dots(length: int) -> None:
    for problem in open_task(f"ruler?kind=fwe&size=3&length={length}").problems("test"):
        counts = Counter(text_of(problem).splitlines()[1].split()).most_common(5)
        assert [word for word, _ in counts[:4]] == ["...", *problem.answer] and counts[3][1] > counts[4][1]


def test_a_file_may_be_the_haystack(tmp_path: Path) -> None:
    file = tmp_path / "essay.txt"
    file.write_text("It began. A day came!\nWhat now? " + "word " * 120, encoding="utf-8")
    for spec in (f"needle:{file}?length=400&size=2", f"ruler:{file}?kind=vt&length=400&size=2"):
        for problem in open_task(spec).problems("test"):
            assert text_of(problem).count("A day came!") >= 2 and 300 < len(text_of(problem).split()) < 450


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("needle?length=10", "needle has length=10"),
        ("needle?depth=2", "depth=2.0 of task 'needle' is no share"),
        ("ruler?kind=vtt", "did you mean 'vt'"),
        ("ruler?kind=cwe&length=1000000", "needs more words than there are"),
        (f"ruler:{__file__}?kind=fwe", "hides nothing in a text"),
        ("needle:nowhere.txt", "there is no file nowhere.txt"),
        ("ruler?size=0", "a size from 1"),
    ],
)
def test_what_a_user_can_mend_is_said(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_task(spec)
    assert message in str(caught.value)


TASKS: dict[str, Task] = {spec: open_task(options(spec, "length=100&size=1")) for spec in ALL}


@given(st.sampled_from(ALL), st.text())
@settings(max_examples=50, deadline=None)
def test_no_text_makes_a_grader_raise(spec: str, reply: str) -> None:
    assert 0 <= TASKS[spec].grade(TASKS[spec].problems("test")[0], reply).score <= 1
