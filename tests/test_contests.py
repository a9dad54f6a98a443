"""Law: a program passes a contest's problem when it gives what each test wants, and tests are data alone."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from errors import UserError
from train.tasks.catalogue import open_task
from train.tasks.contests import LiveCodeBench, cases_of, same_output, unpacked
from train.tasks.programs import pass_at_k
from train.tasks.task import grade_safely

Case = tuple[str, str]
SUM = [("1 2\n", "3\n"), ("5\n6", "11")]
PAIRS = [("[3, 4, 5]\n7", "[0, 1]"), ("[1, 2]\n3", "[0, 1]")]


def packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def cases(tests: list[Case], kind: str) -> str:
    return json.dumps([{"input": given, "output": wanted, "testtype": kind} for given, wanted in tests])


def row(tests: list[Case], function: str = "", **changes: Any) -> dict[str, Any]:
    kind = "functional" if function else "stdin"
    starter = f"class Solution:\n    def {function}(self, numbers, target):\n        " if function else ""
    return {
        "question_title": "A",
        "question_content": "Add what is given.",
        "platform": "leetcode" if function else "atcoder",
        "question_id": "abc_1",
        "contest_id": "abc",
        "contest_date": "2024-08-03T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": cases(tests[:1], kind),
        "private_test_cases": packed(cases(tests[1:], kind)),
        "metadata": json.dumps({"func_name": function} if function else {}),
    } | changes


def opened(folder: Path, *rows: dict[str, Any], options: str = "") -> Any:
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(value) + "\n" for value in rows), encoding="utf-8")
    task = open_task(f"livecodebench:{file}{options}")
    assert isinstance(task, LiveCodeBench)
    return task


def block(code: str) -> str:
    return f"Here:\n```python\n{code}\n```\n"


@pytest.mark.parametrize(
    ("code", "note"),
    [
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "passed 2 tests"),
        ("if __name__ == '__main__':\n    print(sum(map(int, stdin.read().split())))\n    exit()", "passed 2 tests"),
        ("from __future__ import annotations\nprint(f'{sum(map(int, open(0).read().split()))}.0')", "passed 2 tests"),
        ("print(3)", "test 2: printed '3\\n', wanted '11'"),
        ("a, b = map(int, input().split())\nprint(a + b)", "test 2: failed: ValueError"),
        ("print(3); print()\nprint(0)", "test 1: printed"),
        ("while True: pass", "test 1: timeout"),
        ("print(", "test 1: failed: SyntaxError"),
        ("", "test 1: printed ''"),
    ],
)
def test_programs_read_stdin_and_are_judged_by_what_they_print(code: str, note: str, tmp_path: Path) -> None:
    task = opened(tmp_path, row(SUM), options="?seconds=2")
    grade = grade_safely(task, task.problems("test")[0], block(code))
    assert grade.note.startswith(note) and grade.score == float("passed" in note) and not grade.failed


LOOP = "class Solution:\n    def pair(self, numbers: List[int], target: int) -> List[int]:\n"
RIGHT = f"""{LOOP}        for i, j in combinations(range(len(numbers)), 2):
            if numbers[i] + numbers[j] == target:
                return [i, j]"""


@pytest.mark.parametrize(
    ("code", "note"),
    [
        (RIGHT, "passed 2 tests"),
        (f"print('{{}}')\n{RIGHT}\nprint(Solution().pair([1, 2], 3))", "passed 2 tests"),
        ("def pair(numbers, target):\n    print([9])\n    return (0, 1)", "passed 2 tests"),
        (f"{RIGHT}\nif __name__ == '__main__':\n    print(int(input()))", "passed 2 tests"),
        (f"NAME = MARK = SOURCE = 1\n{RIGHT}", "passed 2 tests"),
        (f"{LOOP}        return [1, 0]", "test 1: returned [1, 0], wanted [0, 1]"),
        (f"{LOOP}        return {{0, 1}}", "test 1: failed: TypeError"),
        (f"{LOOP}        return [0, 1] if target == 7 else None", "test 2: returned null"),
        (f"{LOOP}        while target == 3: pass\n        return [0, 1]", "test 2: killed"),
        ("import os\nos._exit(0)", "test 1: finished"),
        ("def other(): ...", "test 1: failed: KeyError"),
    ],
)
def test_functions_are_called_and_judged_by_what_they_return(code: str, note: str, tmp_path: Path) -> None:
    task = opened(tmp_path, row(PAIRS, "pair"), options="?seconds=2")
    problem = task.problems("test")[0]
    assert "class Solution:" in problem.prompt[0]["content"] and "stdin" not in problem.prompt[0]["content"]
    grade = grade_safely(task, problem, block(code))
    assert grade.note.startswith(note) and grade.score == float("passed" in note)


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("  1 2  \n 3", "1 2\n3\n\n", True),
        ("1.0 2e0", "1 2", True),
        ("50000000000000001", "50000000000000000", False),
        ("0.1", "0.10000000001", False),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("Yes", "YES", False),
        ("1\n\n2", "1\n2", False),
        ("", "", True),
        ("1", "", False),
        ("1e999999999", "2e999999999", False),
        ("nan", "nan ", True),
        ("sNaN 1", "sNaN 2", False),
    ],
)
def test_outputs_are_compared_as_the_official_checker_has_it(printed: str, wanted: str, same: bool) -> None:
    assert same_output(printed, wanted) == same


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_packed_tests_are_texts_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cases_of(cases(SUM, "stdin")) == cases_of(packed(cases(SUM, "stdin"))) == SUM
    for value, message in (
        (Harm(), "in what should be a text"),
        (["a"], "packed as list"),
        ({"input": "a"}, "packed as dict"),
    ):
        with pytest.raises(ValueError, match=message):
            unpacked(packed(value))
    for text in ("%", "", "aGVsbG8=", packed("x")[:20], base64.b64encode(zlib.compress(b"\x80\x04.")).decode()):
        with pytest.raises(ValueError):
            cases_of(text)
    with pytest.raises(ValueError, match="without input and output"):
        cases_of('[{"input": "1"}]')
    assert not list(tmp_path.iterdir())
    task = opened(tmp_path, row(SUM, private_test_cases=packed(Harm())))
    grade = grade_safely(task, task.problems("test")[0], block("print(3)"))
    assert grade.failed and grade.score == 0 and not (tmp_path / "harm").exists()


def test_contests_are_chosen_by_their_day(tmp_path: Path) -> None:
    days = ("2024-07-31T23:00:00", "2024-08-01T00:00:00", "2024-09-30T10:00:00", "2024-10-01T00:00:00")
    rows = [row(SUM, contest_date=day, question_id=day[:10]) for day in days]

    def ids(options: str) -> list[str]:
        return [p.id for p in opened(tmp_path, *rows, options=options).problems("test")]

    assert ids("?since=2024-08-01") == ["2024-08-01", "2024-09-30", "2024-10-01"]
    assert ids("?since=2024-08-01&until=2024-09-30") == ["2024-08-01", "2024-09-30"]
    task = opened(tmp_path, *rows, options="?since=2024-08-01&until=2024-09-30")
    assert task.left_out == {"since": 1, "until": 1}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, "?since=august", "since=august of task 'livecodebench' is no day"),
        ({}, "?since=2025-01-01", "has no contest from 2025-01-01 to today"),
        ({"contest_date": "soon"}, "", "test.jsonl:1: 'contest_date' is 'soon'"),
        ({"public_test_cases": "[1]"}, "", "test.jsonl:1: the row's tests or 'metadata' are not as published"),
        ({"metadata": "{"}, "", "test.jsonl:1: the row's tests or 'metadata' are not as published"),
        ({"metadata": "[]"}, "", "test.jsonl:1: the row's tests or 'metadata' are not as published"),
    ],
)
def test_what_a_user_can_mend_is_said(changes: dict[str, Any], options: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        opened(tmp_path, row(SUM, **changes), options=options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("n", "c", "k", "chance"),
    [
        (5, 0, 1, 0.0),
        (5, 5, 3, 1.0),
        (5, 2, 1, 2 / 5),
        (5, 2, 2, 1 - 3 / 10),  # C(3, 2) = 3 of C(5, 2) = 10 pairs have none
        (10, 3, 5, 1 - 21 / 252),
        (10, 6, 5, 1.0),  # any five have one
        (200, 100, 100, 1.0),  # 1 - 1 / C(200, 100), about 1e-59 below
    ],
)
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one(n: int, c: int, k: int, chance: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(chance, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, 1, 6), (5, 1, 0), (0, 0, 1), (5, -1, 1)])
def test_pass_at_k_needs_enough_replies(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)
