"""Law: of a reply to an examination the letter counts that the authors' own scripts would read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from train.tasks.catalogue import TASKS, open_task
from train.tasks.exams import CevalChat, Exam, Gpqa, MmluPro
from train.tasks.task import Problem, Task, grade_safely

GPQA = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID")


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def csv_file(path: Path, columns: tuple[str, ...], *rows: tuple[str, ...]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def mmlu_row(**changes: Any) -> dict[str, Any]:
    row = {
        "question_id": 70,
        "question": "Which is a colour?",
        "options": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "red"],
        "answer": "J",
        "answer_index": 9,
        "category": "art",
    }
    return row | changes


def asked(task: Task) -> str:
    return task.problems("test")[0].prompt[0]["content"]


def test_mmlu_pro_asks_with_its_category_and_letters(tmp_path: Path) -> None:
    task = open_task(f"mmlu_pro:{jsonl(tmp_path / 'q.jsonl', mmlu_row())}")
    assert "about art" in asked(task) and '"The answer is (X)"' in asked(task)
    assert "Which is a colour?\nA. one\nB. two\n" in asked(task) and asked(task).endswith("\nJ. red")
    assert task.problems("test")[0].answer == "J" and task.problems("test")[0].id == "70"


def test_choices_that_are_none_are_left_out_and_the_letter_moves(tmp_path: Path) -> None:
    options = ["one", "N/A", "red", "N/A"]
    task = open_task(f"mmlu_pro:{jsonl(tmp_path / 'q.jsonl', mmlu_row(options=options, answer='C', answer_index=2))}")
    assert asked(task).endswith("\nA. one\nB. red") and task.problems("test")[0].answer == "B"


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("The answer is (C).", "C"),
        ("The answer is C", "C"),
        ("**The answer is (C)**", "C"),
        ("the answer is **(C)**", "C"),
        ("The answer is (C). No, the answer is (D).", "C"),  # the first, as the script has it
        ("So:\nAnswer: C\nAnswer: D", "C"),
        ("Answer: A or answer: C", "C"),
        ("B is wrong, so C.", "C"),
        ("It is (C)\nor so", "C"),
        ("<think>The answer is (A).</think>The answer is (C).", "C"),
        ("Bob", None),
        ("the answer is c", None),
        ("", None),
        ("<think>The answer is (C).", None),
    ],
)
def test_mmlu_pro_reads_the_letter_as_its_script_does(reply: str, letter: str | None) -> None:
    assert read(MmluPro, reply, "ABCDEFGHIJ") == letter


def read(kind: type[Exam], reply: str, letters: str) -> str | None:
    """The letter for which a reply is right."""
    task = object.__new__(kind)  # grading needs no file
    right = [letter for letter in letters if task.grade(Problem("p", [], letter), reply).score == 1]
    assert len(right) <= 1
    return right[0] if right else None


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("Of (A) and (B): the correct answer is (B)", "B"),
        ("Answer: (D)", "D"),
        ("(C) fits, (D) does not", "C"),
        ("Answer: C", "C"),
        ("**Answer:** C", "C"),
        ("answer is Benzene", None),
        ("B", None),
        ("The correct answer is (E)", None),
    ],
)
def test_gpqa_reads_the_letter_as_its_script_does(reply: str, letter: str | None) -> None:
    assert read(Gpqa, reply, "ABCD") == letter


def test_gpqa_is_the_authors_table_with_the_same_order_for_ever(tmp_path: Path) -> None:
    rows = [(f'Why {i}?\nSay, "why".', f"right {i}", "wrong 1", "wrong 2", "wrong 3", f"rec{i}") for i in range(20)]
    file = csv_file(tmp_path / "gpqa_diamond.csv", GPQA, *rows)
    problems = open_task(f"gpqa:{file}").problems("test")
    assert [p.id for p in problems] == [f"rec{i}" for i in range(20)]
    assert 'Why 0?\nSay, "why".' in problems[0].prompt[0]["content"]
    for i, problem in enumerate(problems):
        assert f"\n{problem.answer}. right {i}" in problem.prompt[0]["content"]
        assert sorted(line[3:] for line in problem.prompt[0]["content"].splitlines()[-4:])[0] == f"right {i}"
    assert {p.answer for p in problems} == set("ABCD")
    turned = open_task(f"gpqa:{csv_file(tmp_path / 'turned.csv', GPQA, *reversed(rows))}").problems("test")
    assert [p.answer for p in turned][::-1] == [p.answer for p in problems]
    assert "".join(p.answer for p in problems[:8]) == "BCBAACBD"


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("一步一步思考……答案是C。", "C"),
        ("答案：C", "C"),
        ("正确答案应该是选项 C", "C"),
        ("答案为（C）。", "C"),
        ("**答案是C。**", "C"),
        ("答案是A？不，答案是C。", "C"),
        ("正确的一项是C", "C"),
        ("选项C是正确的。", "C"),
        ("C选项符合题意", "C"),
        ("故选：C", "C"),
        ("C", "C"),
        ("A不对。所以答案是C。", "C"),
        ("应当是 C 吧", "C"),
        ("A和C都有道理", "A"),
        ("我不知道", None),
        ("答案是E。", None),
        ("<think>答案是C。", None),
    ],
)
def test_chinese_replies_are_read_by_the_known_wordings(reply: str, letter: str | None) -> None:
    assert read(CevalChat, reply, "ABCD") == letter


def test_ceval_and_cmmlu_are_read_as_published(tmp_path: Path) -> None:
    first = csv_file(
        tmp_path / "val.csv",
        ("id", "question", "A", "B", "C", "D", "answer"),
        ("0", "1+1等于____", "1", "2", "3", "4", "B"),
    )
    second = csv_file(
        tmp_path / "cmmlu.csv",
        ("", "Question", "A", "B", "C", "D", "Answer"),
        ("0", "1+1等于", "1", "2", "3", "4", "B"),
    )
    third = jsonl(
        tmp_path / "q.jsonl", {"id": 0, "question": "1+1等于", "A": 1, "B": "2", "C": "3", "D": "4", "answer": "B"}
    )
    for file in (first, second, third):
        task = open_task(f"ceval_chat:{file}?subject=初等数学")
        assert "关于初等数学的单项选择题" in asked(task) and asked(task).endswith("\nA. 1\nB. 2\nC. 3\nD. 4")
        assert [grade_safely(task, task.problems("test")[0], f"答案是{x}。").score for x in "ABCD"] == [0, 1, 0, 0]
    assert "以下是单项选择题" in asked(open_task(f"ceval_chat:{first}"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mmlu_row(answer="K"), "'answer' is 'K', no letter from A to J"),
        (mmlu_row(answer="A"), "'answer' is A and 'answer_index' is 9; they must agree"),
        (mmlu_row(options=["one"], answer="B", answer_index=1), "the answer is choice 2 of 1, which is none"),
        (mmlu_row(options=["N/A", "a"], answer="A", answer_index=0), "which is none"),
        (mmlu_row(options=["x"] * 11), "must be up to 10 texts"),
        ({"question": "?", "choices": [], "answer": "A"}, "the row has no 'options'"),
    ],
)
def test_rows_of_another_form_are_refused_by_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_task(f"mmlu_pro:{jsonl(tmp_path / 'q.jsonl', row)}")
    assert message in str(caught.value) and "q.jsonl:1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("id,question,A,B,C,D\n0,q,1,2,3,4\n", "ceval_chat", "t.csv:2: the row has no 'answer'"),
        ("id,question,A,B,C,D,answer\n0,q,1,2,3,4,\n", "ceval_chat", "C-Eval's test split has none"),
        ("id,question,A,B,C,D,answer\n0,q,1,2,3,4,A\n1,q,1,2\n", "ceval_chat", "t.csv:3: the row has not 7 cells"),
        ('id,question,A,B,C,D,answer\n0,"q,1,2,3,4,A\n', "ceval_chat", "t.csv:2: no CSV in UTF-8"),
        ("Question,Correct answer\nq,a\n", "gpqa", "did you mean 'Correct answer'"),
        ("id,question,A,B,C,D,answer\n", "ceval_chat", "has no problem of task 'ceval_chat'"),
    ],
)
def test_tables_of_another_form_are_refused_by_line(text: str, spec: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        open_task(f"{spec}:{tmp_path / 't.csv'}")
    assert message in str(caught.value)


@given(st.sampled_from([MmluPro, Gpqa, CevalChat]), st.text() | st.sampled_from(["A " * 50_000, "答案" + " " * 50_000]))
@settings(max_examples=60, deadline=2000)
def test_no_text_makes_a_grader_raise_or_take_long(kind: type[Exam], reply: str) -> None:
    assert object.__new__(kind).grade(Problem("p", [], "A"), reply).score in (0, 1)


@pytest.mark.parametrize(("name", "file"), [("gpqa", "gpqa_diamond.csv"), ("mmlu_pro", "FILE.jsonl")])
def test_a_file_is_asked_for_by_its_kind(name: str, file: str) -> None:
    with pytest.raises(UserError, match=f"name it as {name}:{file}"):
        open_task(name)


def test_every_task_of_the_catalogue_is_in_the_table() -> None:
    page = (Path(__file__).parent.parent / "train" / "tasks" / "README.md").read_text(encoding="utf-8")
    table = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert [name for name in TASKS if f"`{name}`" not in table] == []
