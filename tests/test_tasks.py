"""Law: a task's grader accepts the data's own answers, rejects others, never raises, and its splits share nothing."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from train import sandbox
from train.sandbox import check_sandbox
from train.tasks.catalogue import open_task
from train.tasks.countdown import value_of
from train.tasks.graders import GRADERS, chrf_score
from train.tasks.task import Grade, Problem, Task, grade_many, grade_safely, spoken
from train.tools import tools_named

DATA = Path(__file__).parent / "data" / "tasks"
FILES = {
    "gsm8k": "gsm8k.jsonl",
    "math": "math.jsonl",
    "countdown": "countdown.jsonl",
    "mbpp": "mbpp.jsonl",
    "humaneval": "humaneval.jsonl",
    "ifeval": "ifbench.jsonl",
    "bfcl": "bfcl_simple_python.jsonl",
    "translation": "tatoeba.jsonl",
}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def scores(task: Task, replies: list[str]) -> list[float]:
    return [grade.score for grade in grade_many(task, task.problems("test"), replies)]


def write(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_tasks_import_no_jax() -> None:
    code = "import sys, train.tasks.catalogue, train.tools; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_gsm8k_accepts_its_answers_in_any_dress_and_no_others() -> None:
    task = open_task(f"gsm8k:{DATA / 'gsm8k.jsonl'}")
    gold = [row["answer"] for row in rows("gsm8k.jsonl")]
    numbers = [answer.split("####")[1].strip() for answer in gold]
    assert scores(task, gold) == [1, 1, 1]
    assert scores(task, [f"So it is \\boxed{{{n}}}. I used 7 steps." for n in numbers]) == [1, 1, 1]
    assert scores(task, [f"<think>maybe 1</think>It is ${n}.00." for n in numbers]) == [1, 1, 1]
    assert scores(task, [f"It is {int(n) + 1}." for n in numbers]) == [0, 0, 0]
    assert scores(task, [f"<think>It is {n}." for n in numbers]) == [0, 0, 0]


def test_math_accepts_its_answers_and_no_others() -> None:
    task = open_task(f"math:{DATA / 'math.jsonl'}")
    gold = [row["answer"] for row in rows("math.jsonl")]
    assert scores(task, [f"Hence $\\boxed{{{a}}}$." for a in gold]) == [1, 1, 1]
    assert scores(task, [f"\\boxed{{{a}}}" for a in [*gold[1:], gold[0]]]) == [0, 0, 0]
    plain = ["\\begin{bmatrix} 0.2 \\\\ -\\frac{18}5 \\end{bmatrix}", "3+2\\sqrt2,\\ 3-\\sqrt{8}", "9/5"]
    assert scores(task, [f"\\boxed{{{a}}}" for a in plain]) == [1, 1, 1]


def test_aime_reads_a_whole_number(tmp_path: Path) -> None:
    task = open_task(f"aime:{write(tmp_path / 'a.jsonl', {'problem': 'What is 10 + 20?', 'answer': '030'})}")
    assert [grade_safely(task, task.problems("test")[0], r).score for r in ("\\boxed{30}", "It is 030.", "31")] == [
        1,
        1,
        0,
    ]
    with pytest.raises(UserError, match=r"a\.jsonl:1: 'answer' is 1000"):
        open_task(f"aime:{write(tmp_path / 'a.jsonl', {'problem': 'What?', 'answer': 1000})}")


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_programs_pass_with_the_solutions_and_fail_without(name: str) -> None:
    task = open_task(f"{name}:{DATA / FILES[name]}")
    whole = [
        row.get("prompt", "") * (name == "humaneval") + row.get("canonical_solution", row.get("code"))
        for row in rows(FILES[name])
    ]
    fenced = [f"Like this:\n```python\n{code}\n```\nand use it:\n```python\nprint(1)\n```" for code in whole]
    assert scores(task, fenced) == scores(task, whole) == [1] * len(whole)
    leaving = ["```python\nimport sys; sys.exit(0)\n```", "    raise SystemExit", "", "    pass", "return"]
    assert max(scores(task, leaving[: len(whole)])) == 0
    if name == "humaneval":
        solutions = [row["canonical_solution"] for row in rows(FILES[name])]
        assert scores(task, solutions) == [1] * len(solutions)
        right = ["elem - elem2", "== 0", "return a", "False", "n - 2"]
        wrong = ["elem + elem2", "== 1", "return b", "True", "n - 3"]
        assert max(scores(task, list(map(str.replace, solutions, right, wrong)))) == 0


def test_programs_need_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: str) -> None:
        raise UserError("no sandbox")

    check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "run_python", refuse)
    for spec in (f"mbpp:{DATA / 'mbpp.jsonl'}", f"humaneval:{DATA / 'humaneval.jsonl'}"):
        with pytest.raises(UserError, match="no sandbox"):
            open_task(spec)
    with pytest.raises(UserError, match="no sandbox"):
        tools_named(["python"])


def called(*calls: tuple[str, dict[str, Any]]) -> str:
    texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "Let me see.\n" + "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def test_calls_are_right_as_the_leaderboard_has_it() -> None:
    task = open_task(f"bfcl:{DATA / 'bfcl_simple_python.jsonl'}")
    triangle = task.problems("test")[0]  # base [10], height [5], unit ["units", ""]
    assert triangle.tools and triangle.tools[0]["function"]["parameters"]["type"] == "object"
    name = "calculate_triangle_area"

    def score(*calls: tuple[str, dict[str, Any]]) -> float:
        return grade_safely(task, triangle, called(*calls)).score

    assert score((name, {"base": 10, "height": 5})) == 1
    assert score((name, {"base": 10, "height": 5, "unit": "Units"})) == 1
    assert score((name, {"base": 10, "height": 5, "unit": "metres"})) == 0
    assert score((name, {"base": 10})) == 0
    assert score((name, {"base": 10, "height": 5, "colour": "red"})) == 0
    assert score((name, {"base": "10", "height": 5})) == 0
    assert score((name, {"base": 5, "height": 10})) == 0
    assert score(("area", {"base": 10, "height": 5})) == 0
    assert score((name, {"base": 10, "height": 5}), (name, {"base": 10, "height": 5})) == 0
    assert score() == 0
    factorial = task.problems("test")[1]
    assert grade_safely(task, factorial, called(("math_factorial", {"number": 5}))).score == 1


def test_several_calls_match_in_any_order_and_each_once() -> None:
    task = open_task(f"bfcl:{DATA / 'bfcl_parallel.jsonl'}")
    swift = ("spotify.play", {"artist": "Taylor Swift", "duration": 20})
    maroon = ("spotify.play", {"artist": "maroon 5", "duration": 15})
    problem = task.problems("test")[0]
    assert [
        grade_safely(task, problem, called(*c)).score for c in ((swift, maroon), (maroon, swift), (swift, swift))
    ] == [1, 1, 0]


def test_answers_lie_beside_the_questions_or_are_named(tmp_path: Path) -> None:
    questions = (DATA / "bfcl_parallel.jsonl").read_text(encoding="utf-8")
    (tmp_path / "q.jsonl").write_text(questions, encoding="utf-8")
    with pytest.raises(UserError, match="where are the answers"):
        open_task(f"bfcl:{tmp_path / 'q.jsonl'}")
    with pytest.raises(UserError, match="the answers have none for 'parallel_0'"):
        open_task(f"bfcl:{tmp_path / 'q.jsonl'}?answers={DATA / 'bfcl_answer_multiple.jsonl'}")
    assert open_task(f"bfcl:{tmp_path / 'q.jsonl'}?answers={DATA / 'bfcl_answer_parallel.jsonl'}").problems("test")


def test_where_no_function_helps_none_is_to_be_called() -> None:
    task = open_task(f"bfcl:{DATA / 'bfcl_irrelevance.jsonl'}")
    assert scores(task, ["I have no tool for that."]) == [1]
    assert scores(task, [called(("determine_body_mass_index", {"weight": 1.0, "height": 1.0}))]) == [0]


@pytest.mark.parametrize(
    ("hypothesis", "reference", "score"),
    [
        ("abc", "abd", (2 / 3 + 1 / 2 + 0) / 3),  # by hand: P = R for n = 1, 2, 3
        ("hello", "hello", 1.0),
        ("x", "y", 0.0),
        ("", "y", 0.0),
        # From here on: sacrebleu 2.6.0, CHRF().sentence_score, its defaults (nc:6, nw:0, space:no, beta 2).
        ("The cat sat on the mat.", "The cat is on the mat.", 0.6717273492330233),
        ("我喜欢猫。", "我爱猫。", 0.25673791821561338),
        ("hello", "hello world again", 0.26232340203989875),
        (
            "Die Beziehung zwischen Obama und Netanjahu ist nicht gerade freundlich.",
            "Das Verhältnis zwischen Obama und Netanyahu ist nicht gerade freundschaftlich.",
            0.64818123726097,
        ),
    ],
)
def test_chrf_is_the_published_measure(hypothesis: str, reference: str, score: float) -> None:
    assert math.isclose(chrf_score(hypothesis, reference), score, abs_tol=1e-9)


def test_translation_takes_languages_or_source_and_target(tmp_path: Path) -> None:
    task = open_task(f"translation:{DATA / 'tatoeba.jsonl'}")
    gold = [row["zh"] for row in rows("tatoeba.jsonl")]
    assert scores(task, gold) == [1, 1, 1] and max(scores(task, ["nothing like it"] * 3)) == 0
    other = open_task(f"translation:{write(tmp_path / 't.jsonl', {'source': 'yes', 'target': 'oui'})}?target=fr")
    assert "French" in other.problems("test")[0].prompt[0]["content"] and scores(other, ["oui"]) == [1]


@pytest.mark.parametrize(
    ("grader", "answer", "right", "wrong"),
    [
        ("exact", "Paris", ["Paris", " Paris\n", "<think>Rome</think>Paris"], ["paris", "Paris.", ""]),
        ("exact", ["a", "b"], ["a", "b"], ["c"]),
        ("contains", "Paris", ["It is PARIS.", "Paris"], ["Parish", "Rome"]),
        ("contains", "猫", ["我喜欢猫。"], ["我喜欢狗。"]),
        ("number", "1234.5", ["It is 1,234.50", "\\boxed{1234.5} of 2"], ["12345", "none"]),
        ("number", -3, ["x = -3", "#### -3"], ["3", "5-3=2"]),
        ("math", "1/2", ["\\boxed{0.5}", "The answer is \\frac12.", "so\n0.5"], ["\\boxed{2}", ""]),
        ("regex", "^a+b$", ["aaab"], ["aac"]),
        (
            "choice",
            "B",
            ["B", "(B)", "**B**", "B. A is wrong.", "The answer is (B).", "A? No: \\boxed{B}"],
            ["A", "Bob", ""],
        ),
        ("choice", 1, ["The answer is B"], ["The answer is A"]),
    ],
)
def test_named_graders(grader: str, answer: object, right: list[str], wrong: list[str], tmp_path: Path) -> None:
    task = open_task(f"jsonl:{write(tmp_path / 'q.jsonl', {'prompt': 'Well?', 'answer': answer})}?grader={grader}")
    problem = task.problems("test")[0]
    assert [grade_safely(task, problem, reply).score for reply in right] == [1] * len(right)
    assert [grade_safely(task, problem, reply).score for reply in wrong] == [0] * len(wrong)


def test_a_pattern_that_never_ends_is_no_match() -> None:
    assert "timeout" in GRADERS["regex"]("(a+)+$", "a" * 40 + "b").note


def test_questions_with_choices_become_letters(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", {"question": "Which?", "choices": ["one", "two"], "answer": 1})
    prompt = open_task(f"jsonl:{file}?grader=choice").problems("test")[0].prompt[0]["content"]
    assert prompt == "Which?\nA. one\nB. two\nEnd with: The answer is LETTER."


@given(st.integers(1, 4), st.sampled_from(["+", "-", "*", "+-", "+-*"]))
@settings(max_examples=15, deadline=None)
def test_arithmetic_splits_share_no_pair_of_operands(digits: int, operations: str) -> None:
    task = open_task(f"arithmetic?digits={digits}&operations={operations}&size=300")
    pairs = []
    for split in ("train", "test"):
        problems = task.problems(split)
        found = [p.prompt[0]["content"].removeprefix("What is ").removesuffix("?").split() for p in problems]
        for (a, sign, b), problem in zip(found, problems, strict=True):
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert problem.answer == value and grade_safely(task, problem, f"It is {value:,}.").score == 1
            assert grade_safely(task, problem, f"It is {value + 1}.").score == 0
        assert len({p.id for p in problems}) == len(problems)
        pairs.append({frozenset((a, b)) for a, _, b in found})
    assert not pairs[0] & pairs[1] and pairs[0] and pairs[1]


def test_arithmetic_is_the_same_for_ever() -> None:
    first = [p.id for p in open_task("arithmetic").problems("test")]
    assert first == [p.id for p in open_task("arithmetic").problems("test")] and len(first) == 2000
    assert first[:3] == ["82*42", "92+60", "92+20"]


def test_the_short_form_reads_the_first_line() -> None:
    task = open_task("arithmetic?form=short&operations=-")
    problem = Problem("23-45", [{"role": "user", "content": "23-45="}], -22)
    assert [task.grade(problem, r).score for r in ("-22", " -22\n1-1=0", "22", "x\n-22", "")] == [1, 1, 0, 0, 0]


def test_countdown_splits_share_no_numbers_and_solutions_are_right() -> None:
    task = open_task("countdown?size=200&numbers=4")
    sets = [{tuple(sorted(p.answer["nums"])) for p in task.problems(split)} for split in ("train", "test")]
    assert not sets[0] & sets[1] and min(map(len, sets)) > 100
    given_rows = rows("countdown.jsonl")
    solutions = {(tuple(row["nums"]), row["target"]): row["solution"] for row in given_rows}
    task = open_task(f"countdown:{DATA / 'countdown.jsonl'}")
    problems = [*task.problems("train"), *task.problems("test")]
    assert len(problems) == len(given_rows)
    for problem in problems:
        solution = solutions[tuple(problem.answer["nums"]), problem.answer["target"]]
        assert task.grade(problem, f"<answer>{solution}</answer>").score == 1
        assert task.grade(problem, f"I find {solution} = {problem.answer['target']}.").score == 1


@pytest.mark.parametrize(
    ("reply", "score", "some"),
    [
        ("<answer>(14 + 14) - 10</answer>", 1, 1),
        ("14 + 14 - 10 = 18", 1, 1),
        ("\\boxed{14 \\times 10 \\div 14}", 0, 0),
        ("<answer>14 + 14 - 10 + 0</answer>", 0, 0),
        ("<answer>14 + 4</answer>", 0, 0),
        ("<answer>18</answer>", 0, 0),
        ("<answer>14 / (14 - 14)</answer>", 0, 0),
        ("<answer>__import__('os')</answer>", 0, 0),
        ("<answer>((((</answer>", 0, 0),
        ("no idea", 0, 0),
    ],
)
def test_countdown_by_hand(reply: str, score: int, some: int) -> None:
    problem = Problem("p", [], {"nums": [14, 10, 14], "target": 18})
    assert open_task("countdown").grade(problem, reply).score == score
    assert open_task("countdown?all_numbers=false").grade(problem, reply).score == some


def test_countdown_is_exact() -> None:
    assert value_of("8 / (3 - 8 / 3)")[0] == 24  # with floats it is 23.999...


@given(st.sampled_from(sorted({*FILES, "aime", "jsonl", "arithmetic", "countdown"} - {"mbpp", "humaneval"})), st.text())
@settings(max_examples=150, deadline=None)
def test_no_text_makes_a_grader_raise(name: str, reply: str) -> None:
    task = opened(name)
    grade = task.grade(next(iter([*task.problems("test"), *task.problems("train")])), reply)
    assert 0 <= grade.score <= 1


@cache
def opened(name: str) -> Task:
    if name in ("aime", "jsonl"):
        with tempfile.TemporaryDirectory() as folder:
            return open_task(f"{name}:{write(Path(folder) / 'q.jsonl', {'prompt': 'Well?', 'answer': '5'})}")
    return open_task(f"{name}:{DATA / FILES[name]}" if name in FILES else name)


def test_a_grader_that_fails_gives_nothing_and_says_why() -> None:
    class Broken:
        name = "broken"

        def problems(self, split: str) -> list[Problem]:
            return []

        def grade(self, problem: Problem, reply: str) -> Grade:
            return Grade(2.0) if reply else Grade(1 / 0)

    problem = Problem("p", [], None)
    told = "the grader failed: ZeroDivisionError: division by zero"
    assert grade_safely(Broken(), problem, "") == Grade(0.0, told, failed=True)
    assert grade_safely(Broken(), problem, "x") == Grade(0.0, "the grader gave 2.0", failed=True)


def test_thoughts_are_not_spoken() -> None:
    assert spoken("<think>a</think>\n\nb") == "b" and spoken("a</think>b") == "b"
    assert spoken("<think>a") == "" and spoken("a") == "a"


def test_held_out_rows_are_in_one_split(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", *({"prompt": f"{i}?", "answer": i} for i in range(200)))
    task = open_task(f"jsonl:{file}?grader=number&held_out=0.2")
    train, test = ({p.id for p in task.problems(split)} for split in ("train", "test"))
    assert not train & test and len(train | test) == 200 and 20 < len(test) < 60


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("arithmetik", "there is no task 'arithmetik'; did you mean 'arithmetic'"),
        ("arithmetic?digit=2", "no option 'digit'; did you mean 'digits'"),
        ("arithmetic?digits=two", "option 'digits' of task 'arithmetic' is 'two', no int"),
        ("arithmetic?digits=0", "give 1 to 50 digits"),
        ("arithmetic?operations=/", "must be some of"),
        ("arithmetic?form=shrt", "did you mean 'short'"),
        ("arithmetic?digits", "has no value"),
        ("arithmetic:file.jsonl", "takes no file"),
        ("countdown?all_numbers=maybe", "write true or false"),
        ("countdown?numbers=1", "give 2 to 8 numbers"),
        ("gsm8k", "name it as gsm8k:FILE.jsonl"),
        ("gsm8k:nowhere.jsonl", "there is no file nowhere.jsonl"),
        (f"gsm8k:{DATA / 'gsm8c.jsonl'}", "did you mean 'gsm8k.jsonl'"),
        (f"gsm8k:{Path(__file__)}", "is no .jsonl"),
        (f"gsm8k:{DATA / 'gsm8k.jsonl'}?held_out=1", "give a share from 0 to below 1"),
        (f"gsm8k:{DATA / 'math.jsonl'}", "math.jsonl:1: 'answer' does not end with ####"),
        (f"jsonl:{DATA / 'gsm8k.jsonl'}?grader=exakt", "did you mean 'exact'"),
        (f"jsonl:{DATA / 'gsm8k.jsonl'}", "gsm8k.jsonl:1: the row has no 'prompt'"),
        (f"bfcl:{DATA / 'gsm8k.jsonl'}", "gsm8k.jsonl:1: the row has no 'id'"),
        (f"ifeval:{DATA / 'ifbench.jsonl'}?unknown=refuse", "ifbench.jsonl:2: the instruction 'words:start_verb'"),
    ],
)
def test_what_a_user_can_mend_is_said(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_task(spec)
    assert message in str(caught.value)


def test_malformed_rows_are_refused_by_line_and_gzip_is_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        open_task(f"jsonl:{tmp_path / 'bad.jsonl'}")
    (tmp_path / "good.jsonl.gz").write_bytes(
        gzip.compress(b'{"prompt": [{"role": "user", "content": "a"}], "answer": "b"}\n')
    )
    assert open_task(f"jsonl:{tmp_path / 'good.jsonl.gz'}").problems("train")[0].prompt[0]["content"] == "a"
