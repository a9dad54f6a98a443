"""Calls of tools as the Berkeley Function-Calling Leaderboard grades them: by what is called, nothing is run.

A call is right when it names the function, has every required parameter and none that is unknown, each of the declared
type, and each value is among those that the answer allows. A parameter may be left out where these include "". Texts
are compared without case, spaces and some punctuation. Several calls match in any order.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from errors import UserError
from serve.parsing import ReplyParser
from train.tasks.rows import FileTask, messages_of, rows_of, take
from train.tasks.task import Grade, Problem, right_or_wrong

JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "hashmap": "object", "list": "array"}
PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "object": dict,
}
IGNORED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True)
class Bfcl(FileTask):
    """Rows {"id", "question", "function"}; answers {"id", "ground_truth"} in a file beside, none: no call is right.

    Attributes:
        answers: the file of answers; empty is `bfcl_answer_X` beside `bfcl_X`, if it is there. A file named
            *irrelevance* needs none.
    """

    answers: str = ""

    name: ClassVar[str] = "bfcl"

    @functools.cached_property
    def _allowed(self) -> dict[str, list[dict[str, Any]]]:
        file = Path(self.path)
        path = Path(self.answers) if self.answers else file.with_name(file.name.replace("bfcl_", "bfcl_answer_", 1))
        if not self.path or (not self.answers and "irrelevance" in file.name):
            return {}
        if path == file:
            raise UserError(
                f"where are the answers to {self.path}? name their file: bfcl:{self.path}?answers=FILE.jsonl"
            )
        return {take(row, at, "id"): take(row, at, "ground_truth", list) for row, at in rows_of(str(path))}

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        identity, functions = take(row, where, "id"), take(row, where, "function", list)
        answers = self._allowed
        if answers and identity not in answers:
            raise UserError(f"{where}: the answers have none for {identity!r}")
        question = take(row, where, "question", list)
        turn = question[0] if question and isinstance(question[0], list) else question
        messages = messages_of({"question": turn}, where, "question")
        tools = [{"type": "function", "function": plain_schema(function)} for function in functions]
        return Problem(identity, messages, {"calls": answers.get(identity, []), "functions": functions}, tools)

    def grade(self, problem: Problem, reply: str) -> Grade:
        """1 if the calls are those of the answer."""
        calls = calls_of(reply, problem.tools or [])
        wanted = problem.answer["calls"]
        if not wanted:
            return right_or_wrong(not calls, f"{len(calls)} calls where none helps")
        if len(calls) != len(wanted):
            return Grade(0.0, f"{len(calls)} calls, wanted {len(wanted)}")
        functions = {dotless(function["name"]): function for function in problem.answer["functions"]}
        rest, complaint = list(calls), ""
        for answer in wanted:
            for call in rest:
                complaint = wrong_with(call, answer, functions)
                if not complaint:
                    rest.remove(call)
                    break
            else:
                return Grade(0.0, complaint)
        return Grade(1.0)


def plain_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The leaderboard's description of a function with the type names of JSON Schema."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = value.get("type")
        out = {key: walk(item) for key, item in value.items()}
        if isinstance(kind, str):
            out["type"] = JSON_TYPES.get(kind, kind)
            if kind == "any":
                del out["type"]
        return out

    return walk(dict(function))


def calls_of(reply: str, tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Names and arguments of a reply's calls; arguments that are no JSON are None."""
    parser = ReplyParser(tools=tools)
    found = []
    for piece in [*parser.push(reply), *parser.finish()]:
        if piece.call is not None:
            try:
                arguments = json.loads(piece.call.arguments)
            except (ValueError, RecursionError):
                arguments = None
            found.append((piece.call.name, arguments))
    return found


def dotless(name: str) -> str:
    """Many interfaces allow no dot in names."""
    return name.replace(".", "_")


def wrong_with(call: tuple[str, Any], answer: Mapping[str, Any], functions: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a call is not the answer's; empty if it is."""
    (name, allowed), (called, arguments) = next(iter(answer.items())), call
    if dotless(called) != dotless(name):
        return f"calls {called}, wanted {name}"
    if not isinstance(arguments, dict):
        return f"the arguments of {called} are no object"
    schema = functions[dotless(name)].get("parameters", {})
    properties = schema.get("properties", {})
    missing = [key for key in schema.get("required", ()) if key not in arguments]
    missing += [key for key, values in allowed.items() if key not in arguments and "" not in values]
    if missing:
        return f"{missing[0]!r} is missing"
    for key, value in arguments.items():
        if key not in properties or key not in allowed:
            return f"{key!r} is unknown"
        if not fits(value, allowed[key], properties[key]):
            return f"{key!r} is {value!r}, wanted one of {allowed[key]!r}"
    return ""


def fits(value: Any, allowed: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    """Whether a value has the declared type, and is one of the allowed ones."""
    kind = schema.get("type", "any")
    if kind in ("float", "number") and type(value) is int:
        value = float(value)
    expected = PYTHON_TYPES.get(kind)
    if expected is not None and type(value) is not expected:
        # An answer of another type is the name of a variable, which may be written instead.
        return any(type(a) is type(value) and a != "" for a in allowed) and among(value, allowed)
    if expected is dict:
        return any(isinstance(a, dict) and dict_fits(value, a) for a in allowed)
    if expected is list and value and all(isinstance(item, dict) for item in value):
        return any(isinstance(a, list) and len(a) == len(value) and all(map(dict_fits, value, a)) for a in allowed)
    return among(value, allowed)


def dict_fits(value: Mapping[str, Any], allowed: Any) -> bool:
    """Whether each entry is one of those allowed for its key, and none is missing that must be there."""
    if not isinstance(allowed, dict):
        return False
    if any(key not in allowed for key in value):
        return False
    if any(key not in value and "" not in options for key, options in allowed.items()):
        return False
    return all(among(item, options_of(allowed[key])) for key, item in value.items())


def options_of(values: Any) -> Sequence[Any]:
    return values if isinstance(values, list) else [values]


def among(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether a value is one of these, where texts are compared loosely."""
    return any(alike(value, other) for other in allowed)


def alike(a: Any, b: Any) -> bool:
    """Equal; texts without case and some punctuation, lists element by element, and True is not 1."""
    if isinstance(a, str) and isinstance(b, str):
        return loose(a) == loose(b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return dict_fits(a, b)
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def loose(text: str) -> str:
    """Without case, spaces and punctuation that people place as they like."""
    return IGNORED.sub("", text).lower().replace("'", '"')
