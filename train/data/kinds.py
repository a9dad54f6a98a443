"""Kinds of rows: what a store holds, by the word that it is identified by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from configs.run import Run

Kind = Literal["pretrain", "sft", "sft-last", "preference", "kto"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LABELLED = ("preference", "kto")
"""Kinds whose rows have `labels`, and two sequences for each document."""
SPELLED = ("pretrain", "sft", "sft-last")
"""Kinds whose weighted targets are text to be predicted, so that bits per byte mean something."""


def kind_of_rows(run: Run) -> Kind:
    """The rows that a run reads; dpo and reward read the same."""
    if run.objective in ("sft", "distill"):
        return "sft-last" if run.data.train_on == "last" else "sft"
    if run.objective in ("dpo", "reward"):
        return "preference"
    return "kto" if run.objective == "kto" else "pretrain"
