"""Instructions that a program can verify: IFEval (Zhou et al. 2023) and IFBench (Pyatkin et al. 2025)."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from errors import UserError
from train.tasks import verify_form, verify_text, verify_words
from train.tasks.rows import FileTask, messages_of, take
from train.tasks.task import Grade, Problem, spoken
from train.tasks.verifying import VERIFIERS

REGISTERED = (verify_form, verify_text, verify_words)
"""Importing them registers what they verify."""


@dataclass(frozen=True)
class IfEval(FileTask):
    """Rows {"prompt", "instruction_id_list", "kwargs"}.

    Some kinds need what is not here (a language, parts of speech, syllables, lists of words): `left_out` counts them.

    Attributes:
        unknown: rows with a kind that is not known here are left out, or refused. score: 1 for all instructions
            followed, or the share that is. mode: "loose" also tries the reply without its first line, its last line,
            both, and each of these without asterisks, and takes the best for each instruction, as IFEval has it.
    """

    unknown: Literal["leave", "refuse"] = "leave"
    score: Literal["all", "share"] = "all"
    mode: Literal["strict", "loose"] = "strict"

    name: ClassVar[str] = "ifeval"

    @functools.cached_property
    def left_out(self) -> Counter[str]:
        """Kinds that are not known here, with the number of rows left out for each."""
        return Counter()

    def problem(self, row: dict[str, Any], where: str) -> Problem | None:
        """As `FileTask` has it."""
        kinds = take(row, where, "instruction_id_list", list)
        values = take(row, where, "kwargs", list)
        if not kinds or len(kinds) != len(values) or not all(isinstance(v, dict) for v in values):
            raise UserError(f"{where}: 'kwargs' has {len(values)} entries for {len(kinds)} instructions; give one each")
        foreign = sorted({str(kind) for kind in kinds if kind not in VERIFIERS})
        if foreign and self.unknown == "refuse":
            raise UserError(f"{where}: the instruction {foreign[0]!r} cannot be verified here; use unknown=leave")
        if foreign:
            self.left_out.update(foreign)
            return None
        prompt = messages_of(row, where)
        asked = str(prompt[-1]["content"])
        rules = [
            (kind, {"prompt": asked} | {key: v for key, v in value.items() if v is not None})
            for kind, value in zip(kinds, values, strict=True)
        ]
        for kind, value in rules:
            missing = [key for key in VERIFIERS[kind].needs if key not in value]
            if missing:
                raise UserError(f"{where}: the instruction {kind!r} lacks its {missing[0]!r} in 'kwargs'")
        return Problem(str(row.get("key", where)), prompt, rules)

    def grade(self, problem: Problem, reply: str) -> Grade:
        """All instructions, or the share of them, that the reply follows; an empty reply follows none."""
        text = spoken(reply)
        tries = variants(text) if self.mode == "loose" else [text]
        failed = [
            kind
            for kind, values in problem.answer
            if not any(t.strip() and VERIFIERS[kind].check(t, values) for t in tries)
        ]
        right = 1 - len(failed) / len(problem.answer)
        note = f"not followed: {', '.join(failed)}" if failed else "all followed"
        return Grade(right if self.score == "share" else float(right == 1), note)


def variants(text: str) -> list[str]:
    """What IFEval's loose accuracy tries."""
    lines = text.split("\n")
    cuts = [text, *("\n".join(cut).strip() for cut in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cuts, *(cut.replace("*", "") for cut in cuts)]
