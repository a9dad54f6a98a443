"""Law: a question of LiveBench gets the score that its published grader gives, worked out by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from train.tasks.catalogue import open_task
from train.tasks.livebench import BY_TASK, OLDER, LiveBench
from train.tasks.livebench_graders import LONGEST, distance
from train.tasks.task import grade_safely

WORDS = "ant,bee,cat,dog,red,blue,green,pink"
QUESTION = r"What? $\textbf{(A) } 6\qquad\textbf{(B) } 3\sqrt{2}\qquad\textbf{(C) } 9$"


def row(task: str, truth: Any, **changes: Any) -> dict[str, Any]:
    return {
        "question_id": f"{task} 1",
        "category": "reasoning",
        "task": task,
        "turns": [QUESTION],
        "ground_truth": truth,
        "livebench_release_date": "2025-04-25",
        "livebench_removal_date": "",
    } | changes


def opened(folder: Path, *rows: dict[str, Any], options: str = "") -> Any:
    file = folder / "question.jsonl"
    file.write_text("".join(json.dumps(value) + "\n" for value in rows), encoding="utf-8")
    task = open_task(f"livebench:{file}{options}")
    assert isinstance(task, LiveBench)
    return task


JOIN = {"a": "x", "b": "y", "c": "z"}
EVENTS = [{"user_id": 1, "max_consecutive_growth_months": 3}, {"user_id": 2, "max_consecutive_growth_months": 5}]
PLOT = "He wakes up. She leaves town. They meet again. All ends well."


@pytest.mark.parametrize(
    ("task", "truth", "reply", "score"),
    [
        ("amc_2023", "B", "So BBBBB.", 1),
        ("amc_2023", "B", "<solution>bb</solution> I think", 1),
        ("amc_2023", "B", "\\boxed{\\text{B}} it is, not another letter", 1),
        ("amc_2023", "B", "hence it is 3\\sqrt{2}.", 1),
        ("amc_2023", "B", "Well\n**B**", 1),
        ("amc_2023", "B", "Well\nthe answer is (B)", 1),
        ("amc_2023", "B", "So CCCCC.", 0),
        ("amc_2023", "B", "BBBB" + " " * LONGEST + "no", 0),  # too far from the end
        ("x_amc_12", "A", "AAAAA", 1),
        ("aime_2024", "073", "It is 073.", 1),
        ("aime_2024", "073", "073" + " " * 48, 0),
        ("imo_2022", "3,1,2,4", "Answer: 3, 1, 2, 4", 1),
        ("imo_2022", "3,1,2,4", "**Answer:**\n3,1,4,2", 0.5),  # two replacements of four
        ("imo_2022", "3,1,2,4", "answer: 3, 1, 2", 0.75),
        ("usamo_2023", "3,1,2,4", "so \\boxed{3, 1, 2, 4}", 1),
        ("usamo_2023", "3,1,2,4", "so\nthe order is 3, 1, 2, 4.", 1),
        ("usamo_2023", "3,1,2,4", "so 3, 1, 2, 4.\nThanks", 1),
        ("usamo_2023", "3,1,2,4", "I cannot", 0),
        ("web_of_lies_v2", "no, yes, yes", "so **no, yes, yes**", 1),
        ("web_of_lies_v2", "no, yes, yes", "**No**, **yes**. and **Yes**", 1),
        ("web_of_lies_v2", "no, yes, yes", "<solution>no, yes, yes</solution>", 1),
        ("web_of_lies_v2", "no, yes, yes", "\\boxed{no, yes, yes}", 1),
        ("web_of_lies_v2", "no, yes, yes", "yes, yes, yes? rather no, yes, yes", 1),
        ("web_of_lies_v2", "no, yes, yes", "**yes, yes, no**", 0),
        ("web_of_lies_v2", "no, yes, yes", "", 0),
        ("web_of_lies_v3", "no, yes, unknown", "<solution>no, yes, unknown</solution>", 1),
        ("web_of_lies_v3", "no, yes, unknown", "<solution>no, yes, yes</solution>", 1 / 3),
        ("web_of_lies_v3", "no, yes, unknown", "it is no, no, unknown", 1 / 3),
        ("web_of_lies_v3", "no, yes, unknown", "who knows", 0),
        ("house_traversal", "Ann Bob", "first **Ann** then **Bob**", 1),
        ("house_traversal", "Ann Bob", "**Ann, then Bob**", 1),
        ("house_traversal", "Ann Bob", "**Bob, then Ann**", 0),
        ("house_traversal", "Ann Bob", "Ann Bob", 0),
        ("zebra_puzzle", "chess,green,2", "<solution>chess, green, position 2</solution>", 1),
        ("zebra_puzzle", "chess,green,2", "<solution>chess, red, 2</solution>", 1 / 3),
        (
            "zebra_puzzle",
            "chess,green,2",
            "<solution>chess</solution><solution>green</solution><solution>2</solution>",
            1,
        ),
        ("zebra_puzzle", "chess,green,2", "so:\nchess, green, 2", 1),
        ("zebra_puzzle", "chess,green,2", "\\boxed{\\text{chess, green, 3}}", 1 / 3),
        ("zebra_puzzle", "chess,green,2", "no idea", 0),
        ("spatial", "3", "**three**", 1),
        ("spatial", "3", "**3** and **a** then **b** and **c**", 0),  # of bold the last three count
        ("spatial", "tetrahedra", "**two tetrahedra**", 1),
        ("spatial", "triangle", "**circle square triangle**", 0),
        ("spatial", "3", "\\boxed{3}", 1),
        ("spatial", "3", "it is 3", 0),
        ("theory_of_mind", "blue_box", "<solution>Blue_box.</solution>", 1),
        ("theory_of_mind", "blue_box", "Hm.\nAnswer: blue_box", 1),
        ("theory_of_mind", "blue_box", "<solution>red_box</solution> blue_box", 0),
        ("logic_with_navigation", [3, -4], "<solution>(3, -4)</solution>", 1),
        ("logic_with_navigation", [3, -4], "<solution>1, 2 and then ( 3,-4 )</solution>", 1),
        ("logic_with_navigation", [3, -4], "<solution>3, 4</solution>", 0),
        ("logic_with_navigation", [3, -4], "(3, -4)", 0),
        ("sudoku", "12 34", "<solution>\n1 2\n3 4\n</solution>", 1),
        ("sudoku", "12 34", "<solution>1243</solution>", 0),
        ("sudoku", "12 34", "1234", 0),
        ("typos", "We have it.", "<solution>We have it.</solution>", 1),
        ("typos", "We have it.", "Here: We have it. Fine.", 1),
        ("typos", "We have it.", "x --- We have it. --- y", 1),
        ("typos", "We have it.", "We hav it.", 0),
        ("connections", WORDS, f"<solution>{WORDS}</solution>", 1),
        ("connections", WORDS, "<solution>bee, ANT, dog, cat, pink, red,\nblue, white</solution>", 0.5),
        ("connections", WORDS, f"\\boxed{{{WORDS}}}", 1),
        ("connections", WORDS, WORDS, 0),
        ("plot_unscrambling", PLOT, f"<PLOT_SUMMARY>{PLOT}</PLOT_SUMMARY>", 1),
        ("plot_unscrambling", PLOT, "She leaves town. He wakes up. They meet again. All ends well.", 0.5),
        ("plot_unscrambling", PLOT, "<PLOT_SUMMARY>He woke up. She leaves the town. They meet. All ends well", 1),
        ("plot_unscrambling", PLOT, "", 0),
        ("cta", "Postal Code", "The column is: postal-code", 1),
        ("cta", "Postal Code", "\\boxed{\\text{PostalCode}}", 1),
        ("cta", "Postal Code", "postal code, I think", 0),
        ("tablejoin", JOIN, str(JOIN), 1),
        ("tablejoin", str(JOIN), "So:\n```python\n{'a': 'x',\n 'b': 'y', 'c': None}\n```", 0.8),  # 2*2 / (2*2 + 0 + 1)
        ("tablejoin", JOIN, '<solution>{"a": "x", "b": "z", "d": "w"}</solution>', 0.33),  # 2 / (2 + 2 + 2)
        ("tablejoin", JOIN, "{'a': __import__('os')}", 0),
        ("tablejoin", JOIN, "none", 0),
        ("consecutive_events", EVENTS, f"<solution>{json.dumps(EVENTS)}</solution>", 1),
        ("consecutive_events", json.dumps(EVENTS), f"<Solution>{json.dumps(EVENTS[:1])}</Solution>", 0.5),
        (
            "consecutive_events",
            EVENTS,
            '<solution>[{"user_id": 1, "max_consecutive_growth_months": 4}, {"user_id": 2}]</solution>',
            0,
        ),
        ("consecutive_events", EVENTS, json.dumps(EVENTS), 0),
    ],
)
def test_scores_by_hand(task: str, truth: Any, reply: str, score: float, tmp_path: Path) -> None:
    opened_task = opened(tmp_path, row(task, truth))
    grade = grade_safely(opened_task, opened_task.problems("test")[0], f"<think>BBBBB 073</think>{reply}")
    assert grade.score == pytest.approx(score) and not grade.failed


@pytest.mark.parametrize(
    ("task", "truth", "reply", "score"),
    [
        ("zebra_puzzle", "three", "so ***3***", 1),
        ("zebra_puzzle", "romance movies", "***Romance***", 1),
        ("zebra_puzzle", "three", "it is three.", 1),
        ("zebra_puzzle", "three", "***four*** not three", 0),
        ("connections", WORDS, f"**{WORDS}**", 1),
        ("connections", WORDS, f"**ant, bee, cat, dog** and **{WORDS.replace('pink', 'white')}**", 0.5),
        ("connections", WORDS, f"<solution>{WORDS}</solution>", 0),
    ],
)
def test_older_questions_have_the_graders_of_their_time(
    task: str, truth: str, reply: str, score: float, tmp_path: Path
) -> None:
    opened_task = opened(tmp_path, row(task, truth, livebench_release_date="2024-06-24"))
    assert grade_safely(opened_task, opened_task.problems("test")[0], reply).score == score


def test_kinds_without_a_grader_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        row("aime_2024", "073"),
        row("tablereformat", "a,b"),
        row("LCB_generation", None),
        row("paraphrase", None, category="instruction_following"),
        row("AMPS_Hard", "x"),
        row("math_comp", "073", subtask="aime_2025", question_id="sub"),
        row("aime", "073", turns=["a", "b"]),
    ]
    task = opened(tmp_path, *rows)
    assert [p.id for p in task.problems("test")] == ["aime_2024 1", "sub"]
    assert task.problems("test")[0].prompt == [{"role": "user", "content": QUESTION}]
    kinds = {"tablereformat", "LCB_generation", "paraphrase", "AMPS_Hard", "several turns"}
    assert task.left_out == dict.fromkeys(kinds, 1)


def test_a_release_has_what_came_before_it_and_was_not_removed(tmp_path: Path) -> None:
    dates = {"old": ("2024-06-24", ""), "gone": ("2024-06-24", "2024-11-25"), "later": ("2025-04-02", "2025-11-25")}
    rows = [
        row("cta", "x", question_id=key, livebench_release_date=a, livebench_removal_date=b)
        for key, (a, b) in dates.items()
    ]
    ids = {
        day: [p.id for p in opened(tmp_path, *rows, options=f"?release={day}").problems("test")]
        for day in ("2024-08-31", "2024-11-25", "2025-04-25")
    }
    assert ids == {"2024-08-31": ["old", "gone"], "2024-11-25": ["old"], "2025-04-25": ["old", "later"]}
    with pytest.raises(UserError, match="but 3 of 'another release'"):
        opened(tmp_path, *rows, options="?release=2024-01-01")


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (row("amc", "F"), "", "question.jsonl:1: 'ground_truth' is none of task 'amc'"),
        (row("imo", "one, two"), "", "question.jsonl:1: 'ground_truth' is none of task 'imo'"),
        (row("spatial", None), "", "question.jsonl:1: 'ground_truth' is none of task 'spatial'"),
        (row("tablejoin", "{"), "", "question.jsonl:1: 'ground_truth' is none of task 'tablejoin'"),
        (row("spatial", "3", turns="What?"), "", "question.jsonl:1: 'turns' is str, not list"),
        (row("coding", "3"), "", "but 1 of 'coding'"),
        (row("spatial", "3"), "?release=soon", "release=soon of task 'livebench' is no day"),
        ({"question_id": "a"}, "", "question.jsonl:1: the row has no 'task'"),
    ],
)
def test_what_a_user_can_mend_is_said(value: dict[str, Any], options: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        opened(tmp_path, value, options=options)
    assert message in str(caught.value)


TRUTHS: dict[str, Any] = {"imo": "1,2", "usamo": "1,2", "logic_with_navigation": [1, 2], "tablejoin": JOIN}
LONG = (
    "*" * 50_000,
    "<solution>" * 5_000,
    "answer:" + "1," * 20_000,
    "a." * 20_000,
    "```" * 20_000,
    "(" * 50_000,
    "**a" * 9_000,
    "***a**" * 5_000,
    "{" * 20_000,
)


def graded(grader: Callable[[Any, str], float], task: str, reply: str) -> float:
    return grader(TRUTHS.get(task, EVENTS if task == "consecutive_events" else "one"), reply[-LONGEST:])


GRADERS = [*BY_TASK.items(), *OLDER.items()]


@pytest.mark.parametrize(("task", "grader"), GRADERS, ids=[grader.__name__ for _, grader in GRADERS])
def test_no_reply_takes_long(task: str, grader: Callable[[Any, str], float]) -> None:
    for reply in LONG:
        start = time.process_time()
        assert 0 <= graded(grader, task, reply) <= 1 and time.process_time() - start < 5


@given(st.sampled_from(GRADERS), st.text())
@settings(max_examples=100, deadline=None)
def test_no_text_makes_a_grader_raise(pair: tuple[str, Callable[[Any, str], float]], reply: str) -> None:
    assert 0 <= graded(pair[1], pair[0], reply) <= 1


def test_distance_is_levenshteins() -> None:
    assert distance("kitten", "sitting") == 3 and distance([], [1, 2]) == 2 and distance("ab", "ab") == 0
