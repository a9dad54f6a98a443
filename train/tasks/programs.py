"""Programs that must pass tests: MBPP and HumanEval, run in the sandbox."""

from __future__ import annotations

import math
import re
import secrets
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errors import UserError
from train.sandbox import check_sandbox, last_line, run_python
from train.tasks.rows import FileTask, take
from train.tasks.task import Grade, Problem, ask, right_or_wrong, spoken

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
OPEN_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python|py)?[ \t]*\n(.*)\Z", re.DOTALL | re.MULTILINE)
DEFINED = re.compile(r"^(?:async\s+)?(?:def|class)\s+(\w+)", re.MULTILINE)


def code_of(reply: str, wanted: Sequence[str] = ()) -> str:
    """The code of a reply: the last Python fence that defines something `wanted`, else the last, else all of it."""
    text = spoken(reply)
    blocks = [body for language, body in FENCE.findall(text) if language.lower() in ("", "python", "py", "python3")]
    if not blocks and (cut := OPEN_FENCE.search(text)):
        return cut.group(1)
    defining = [block for block in blocks if set(wanted) & set(DEFINED.findall(block))]
    return (defining or blocks or [text])[-1]


def passes(program: str, seconds: float) -> Grade:
    """1 if the program comes to its end: one that leaves early, even with exit code 0, fails."""
    mark = secrets.token_hex(8)
    outcome = run_python(f"{program}\n__import__('os').write(1, b'\\n{mark}\\n')\n", seconds=seconds)
    if outcome.ok and outcome.stdout.rstrip().endswith(mark):
        return right_or_wrong(True, "passed")
    if outcome.ok:
        return Grade(0.0, "it left before its tests, or printed too much")
    return Grade(0.0, f"{outcome.reason}: {last_line(outcome.stderr)}"[:300])


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of `k` replies one is right, where `c` of `n` were: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of Chen et al. 2021, arXiv 2107.03374, equation 1, as a product of ratios, none of which is
    large. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right ones among {n} replies")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


@dataclass(frozen=True)
class ProgramTask(FileTask):
    """A task that runs replies; refused when it is opened where there is no sandbox, as each grade would be 0.

    Attributes:
        seconds: that the program and its tests may take.
    """

    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise UserError(f"seconds={self.seconds} of task {self.name!r} is no time from 0 to 3600 seconds")
        super().__post_init__()
        check_sandbox()


@dataclass(frozen=True)
class Mbpp(ProgramTask):
    """Mostly Basic Python Problems, full or sanitized; rows {"text" or "prompt", "test_list"}."""

    name: ClassVar[str] = "mbpp"

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        text = take(row, where, "text" if "text" in row else "prompt")
        tests = take(row, where, "test_list", list)
        if not tests or not all(isinstance(test, str) for test in tests):
            raise UserError(f"{where}: 'test_list' holds no tests")
        imports = "\n".join(row.get("test_imports", []))
        prompt = f"{text}\nYour code should pass these tests:\n\n" + "\n".join(tests)
        prompt += "\n\nAnswer with the code in a ```python block."
        return Problem(
            f"mbpp/{row.get('task_id', where)}",
            ask(prompt),
            {"imports": imports, "setup": row.get("test_setup_code", ""), "tests": tests},
        )

    def grade(self, problem: Problem, reply: str) -> Grade:
        """All tests pass."""
        tests = "\n".join(problem.answer["tests"])
        code = code_of(reply, re.findall(r"\w+", tests))
        answer = problem.answer
        return passes("\n".join([answer["imports"], code, answer["imports"], answer["setup"], tests]), self.seconds)


@dataclass(frozen=True)
class HumanEval(ProgramTask):
    """HumanEval; rows {"prompt", "entry_point", "test"}. A reply is the whole function, or follows the prompt."""

    name: ClassVar[str] = "humaneval"

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        answer = {key: take(row, where, key) for key in ("prompt", "entry_point", "test")}
        text = (
            f"Complete this function. Answer with all of it in a ```python block.\n\n```python\n{answer['prompt']}```"
        )
        return Problem(str(row.get("task_id", where)), ask(text), answer)

    def grade(self, problem: Problem, reply: str) -> Grade:
        """`check` passes."""
        prompt, entry = problem.answer["prompt"], problem.answer["entry_point"]
        code = code_of(reply, [entry])
        if entry in DEFINED.findall(code):
            body = f"\n    pass\n\n{code}"  # the prompt's imports and helpers stay
        elif code.strip() and not code.lstrip("\n").startswith((" ", "\t")):
            body = textwrap.indent(code, "    ")
        else:
            body = code
        return passes(f"{prompt}{body}\n{problem.answer['test']}\ncheck({entry})", self.seconds)
