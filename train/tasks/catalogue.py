"""Tasks by name: `NAME[:PATH][?key=value&...]`, such as `arithmetic?digits=2` or `gsm8k:data/gsm8k_test.jsonl.gz`."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from errors import UserError, did_you_mean
from train.tasks.arithmetic import Arithmetic
from train.tasks.calls import Bfcl
from train.tasks.choices import Arc, Ceval, HellaSwag, Mmlu
from train.tasks.contests import LiveCodeBench
from train.tasks.countdown import Countdown
from train.tasks.exams import CevalChat, Gpqa, MmluPro
from train.tasks.haystacks import Needle, Ruler
from train.tasks.instructions import IfEval
from train.tasks.livebench import LiveBench
from train.tasks.programs import HumanEval, Mbpp
from train.tasks.questions import Aime, Gsm8k, Jsonl, Math, Translation
from train.tasks.task import Task
from train.tasks.texts import Lambada, Text, WikiText

TASKS: dict[str, Any] = {
    task.name: task
    for task in (
        *(Arithmetic, Countdown, Gsm8k, Math, Aime, Mbpp, HumanEval, IfEval, Bfcl, Translation, Jsonl),
        *(MmluPro, Gpqa, CevalChat, LiveCodeBench, LiveBench, Needle, Ruler),
    )
}
LIKELIHOOD_TASKS: dict[str, Any] = {task.name: task for task in (Mmlu, Ceval, Arc, HellaSwag, Lambada, WikiText, Text)}
"""Those that compare log-probabilities, and reward nothing."""
ALL = TASKS | LIKELIHOOD_TASKS


def open_task(spec: str) -> Task:
    """The task with replies to grade that a text names. Raises UserError, as `open_any` does."""
    name = re.split("[:?]", spec)[0]
    if name in LIKELIHOOD_TASKS:
        raise UserError(
            f"task {name!r} compares log-probabilities and grades no replies; take one of {', '.join(TASKS)}"
        )
    return open_any(spec, TASKS)


def open_any(spec: str, among: Mapping[str, Any] = ALL) -> Any:
    """The `Task` or `LikelihoodTask` that a text names. Its options are the fields of its class.

    Raises UserError for an unknown name or option, a value of another type, and what is wrong with the file.
    """
    head, _, tail = spec.partition("?")
    name, colon, path = head.partition(":")
    if name not in among:
        raise UserError(f"there is no task {name!r}{did_you_mean(name, among)}; there is {', '.join(among)}")
    fields = {field.name: field for field in dataclasses.fields(among[name])}
    kinds = typing.get_type_hints(among[name])
    values: dict[str, Any] = {}
    if "path" in fields:
        values["path"] = path
    elif colon:
        raise UserError(f"task {name!r} takes no file; leave out :{path}")
    options = {key: kinds[key] for key in fields if key != "path"}
    for part in filter(None, tail.split("&")):
        key, equals, text = part.partition("=")
        if key not in options:
            known = ", ".join(options)
            raise UserError(f"task {name!r} has no option {key!r}{did_you_mean(key, options)}; it has {known}")
        if not equals:
            raise UserError(f"option {key!r} of task {name!r} has no value; write {key}=VALUE")
        values[key] = parsed(text, options[key], f"option {key!r} of task {name!r}")
    return among[name](**values)


def parsed(text: str, kind: Any, what: str) -> Any:
    """A text as a value of a field's type. Raises UserError."""
    if typing.get_origin(kind) is Literal:
        if text not in typing.get_args(kind):
            known = ", ".join(typing.get_args(kind))
            raise UserError(f"{what} is {text!r}{did_you_mean(text, typing.get_args(kind))}; it is one of {known}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{what} is {text!r}; write true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"{what} is {text!r}, no {kind.__name__}; mend it") from error
