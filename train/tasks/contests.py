"""LiveCodeBench: problems of programming contests, newer than a model's data."""

from __future__ import annotations

import base64
import binascii
import functools
import io
import json
import pickle
import secrets
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

from errors import UserError
from train.sandbox import MIB, Outcome, last_line, run_python
from train.tasks.programs import ProgramTask, code_of
from train.tasks.rows import take
from train.tasks.task import Grade, Problem, ask

MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
"""What the official script imports before a reply's code, name by name: replies count on `List` and `defaultdict`."""
PREAMBLE = "".join([*(f"from {m} import *\n" for m in MODULES), *(f"import {m}\n" for m in MODULES)])
PREAMBLE += "sys.setrecursionlimit(50000)\n"
FROM_STDIN = """
try:
    exec(compile(SOURCE, "reply.py", "exec"), globals())
except SystemExit:
    pass
"""
CALLED = """
def __run():
    import io, json, os, signal, sys
    write, dumps, mark, seconds, source, name = os.write, json.dumps, MARK, SECONDS, SOURCE, NAME
    calls = [[json.loads(line) for line in text.split("\\n")] for text in json.load(sys.stdin)]
    sys.stdout = io.StringIO()
    sys.modules["reply"], globals()["__name__"] = sys.modules["__main__"], "reply"  # it is not run but called
    exec(compile(source, "reply.py", "exec"), globals())
    function = getattr(Solution(), name) if "class Solution" in source else globals()[name]
    for arguments in calls:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process
        line = mark + dumps(function(*arguments)) + "\\n"
        signal.setitimer(signal.ITIMER_REAL, 0)
        data = line.encode()
        while data:
            data = data[write(1, data):]
__run()
"""
MEMORY = 1024 * MIB
SPARE_BYTES = 64 << 10
"""Of output, beyond twice what is expected."""
UNPACKED_BYTES = 1 << 30
"""Of one problem's tests."""


@dataclass(frozen=True)
class LiveCodeBench(ProgramTask):
    """LiveCodeBench's code generation (Jain et al. 2024, arXiv 2403.07974).

    Rows of the released files test.jsonl, test2.jsonl and so on (livecodebench/code_generation_lite): {"question_id",
    "question_content", "platform", "contest_date", "starter_code", "difficulty", "public_test_cases" (JSON as a text),
    "private_test_cases" (the same, or pickled, compressed and in base64), "metadata" (JSON as a text; "func_name" for
    problems of LeetCode)}. All tests must pass, public and private, in a fresh process for each input (or one for all
    calls of a function). What is expected never enters the sandbox.

    Attributes:
        seconds: for each test, as in the official script. since, until: days, such as 2024-08-01, both included; rows
            of contests on other days are left out and counted in `left_out`.
    """

    seconds: float = 6.0
    since: str = ""
    until: str = ""

    name: ClassVar[str] = "livecodebench"

    def __post_init__(self) -> None:
        for key in ("since", "until"):
            if (value := getattr(self, key)) and as_day(value) is None:
                raise UserError(f"{key}={value} of task {self.name!r} is no day; write it as 2024-08-01")
        if self.path and not self.all_problems and self.left_out:
            between = f"from {self.since or 'the beginning'} to {self.until or 'today'}"
            raise UserError(f"{self.path} has no contest {between} in it; choose other days")
        super().__post_init__()

    @functools.cached_property
    def left_out(self) -> Counter[str]:
        """How many rows are of contests before `since` and after `until`."""
        return Counter()

    def problem(self, row: dict[str, Any], where: str) -> Problem | None:
        """As `FileTask` has it."""
        day = as_day(take(row, where, "contest_date")[:10])
        if day is None:
            raise UserError(f"{where}: 'contest_date' is {row['contest_date']!r}, no date such as 2024-08-01T00:00:00")
        for key, outside in (("since", lambda limit: day < limit), ("until", lambda limit: day > limit)):
            limit = as_day(getattr(self, key))
            if limit and outside(limit):
                self.left_out[key] += 1
                return None
        starter = take(row, where, "starter_code")
        answer = {key: take(row, where, key) for key in ("public_test_cases", "private_test_cases")}
        try:
            answer["function"] = json.loads(take(row, where, "metadata") or "{}").get("func_name")
            cases_of(answer["public_test_cases"])
        except (ValueError, AttributeError) as error:
            raise UserError(f"{where}: the row's tests or 'metadata' are not as published ({error})") from error
        if starter:
            how = f"Complete this code; answer with all of it in a ```python block.\n\n```python\n{starter}\n```"
        else:
            how = "The program reads stdin and writes the answer to stdout. Answer with it in a ```python block."
        text = f"Write a Python program that solves this problem.\n\n{take(row, where, 'question_content')}\n\n{how}"
        return Problem(take(row, where, "question_id"), ask(text), answer)

    def grade(self, problem: Problem, reply: str) -> Grade:
        """All tests pass; the note says which does not."""
        function = problem.answer["function"]
        code = code_of(reply, [function, "Solution"] if function else [])
        tests = [t for key in ("public_test_cases", "private_test_cases") for t in cases_of(problem.answer[key])]
        if not tests:
            raise ValueError("the problem has no tests")
        failure = called(code, function, tests, self.seconds) if function else from_stdin(code, tests, self.seconds)
        return Grade(0.0, failure[:300]) if failure else Grade(1.0, f"passed {len(tests)} tests")


def as_day(text: str) -> date | None:
    """A day as 2024-08-01, or None."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None


def cases_of(text: str) -> list[tuple[str, str]]:
    """Inputs and outputs of tests: JSON, or the packed form of it. Raises ValueError for anything else."""
    try:
        cases = json.loads(text)
    except ValueError:
        cases = json.loads(unpacked(text))
    if not isinstance(cases, list):
        raise ValueError("tests that are no list")
    try:
        return [(str(case["input"]), str(case["output"])) for case in cases]
    except (KeyError, TypeError) as error:
        raise ValueError("a test without input and output") from error


class TextUnpickler(pickle.Unpickler):
    """Unpickles a text and nothing else: whatever names a class or a function is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Never."""
        raise pickle.UnpicklingError(f"{module_name}.{global_name} in what should be a text")


def unpacked(text: str) -> str:
    """The text that was pickled, compressed by zlib and put in base64. Raises ValueError."""
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), UNPACKED_BYTES)
        if not stream.eof:
            raise ValueError(f"packed tests that end early or have more than {UNPACKED_BYTES} bytes")
        value = TextUnpickler(io.BytesIO(data)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no tests: {error}") from error
    if not isinstance(value, str):
        raise ValueError(f"tests packed as {type(value).__name__}, not as a text")
    return value


def from_stdin(code: str, tests: list[tuple[str, str]], seconds: float) -> str:
    """Why a program that reads stdin fails, or nothing."""
    program = f"{PREAMBLE}SOURCE = {code!r}\n{FROM_STDIN}"
    for number, (given, wanted) in enumerate(tests, 1):
        room = 2 * len(wanted.encode()) + SPARE_BYTES
        outcome = run_python(program, stdin=given, seconds=seconds, memory_bytes=MEMORY, output_bytes=room)
        if not outcome.ok:
            return f"test {number}: {said(outcome)}"
        if not same_output(outcome.stdout, wanted):
            return f"test {number}: printed {outcome.stdout[:80]!r}, wanted {wanted[:80]!r}"
    return ""


def called(code: str, name: str, tests: list[tuple[str, str]], seconds: float) -> str:
    """Why a function that is called fails, or nothing. An input has an argument in JSON on each line."""
    mark = secrets.token_hex(8)
    named = {"SOURCE": code, "NAME": name, "MARK": mark, "SECONDS": seconds}
    program = PREAMBLE + "".join(f"{key} = {value!r}\n" for key, value in named.items()) + CALLED
    outcome = run_python(
        program,
        stdin=json.dumps([given for given, _ in tests]),
        seconds=min(3600.0, seconds * (len(tests) + 1)),
        memory_bytes=MEMORY,
        output_bytes=2 * sum(len(wanted.encode()) + 100 for _, wanted in tests) + SPARE_BYTES,
    )
    lines = [line.removeprefix(mark) for line in outcome.stdout.split("\n") if line.startswith(mark)]
    for number, (_, wanted) in enumerate(tests, 1):
        if number > len(lines):
            return f"test {number}: {said(outcome)}"
        try:
            right = json.loads(lines[number - 1]) == json.loads(wanted)
        except (ValueError, RecursionError):
            right = False
        if not right:
            return f"test {number}: returned {lines[number - 1][:80]}, wanted {wanted[:80]}"
    return ""


def said(outcome: Outcome) -> str:
    """What ended a program."""
    return f"{outcome.reason}: {last_line(outcome.stderr)}"


def same_output(printed: str, wanted: str) -> bool:
    """As the official checker has it: line by line, without spaces at the ends, as texts or as equal decimals."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, wanted))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        return [Decimal(word) for word in a.split()] == [Decimal(word) for word in b.split()]
    except InvalidOperation:
        return False
