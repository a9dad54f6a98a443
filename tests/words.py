"""Whether a verb or a benchmark understands its words, without doing anything."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from typing import Any

import pytest

import qmax
import terminal
from configs.override import apply_overrides, fields_of, load_config
from configs.run import Run
from sharding.hosts import OPTIONS
from train import main

EVERY = {"--help", "--debug", "--version", "--json"}
TRAIN = {"--resume", "--stopped-code", "--field", *OPTIONS}
"""What `qmax train` takes beside the fields of a config; its help writes --field for any of them."""


class UnderstoodError(Exception):
    """An argument parser has taken all its words, and the verb shall do no more."""

    def __init__(self, parser: argparse.ArgumentParser, found: argparse.Namespace, rest: list[str]) -> None:
        self.parser, self.found, self.rest = parser, found, rest


def understand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a verb read its words. UserError where it refuses them, or fields of a config that do not go together."""
    assert words[0] in {verb.name for verb in qmax.VERBS} | {"--help", "help", "--version"}
    if words[0] == "train":
        monkeypatch.setattr(main, "train_run", lambda *_, **__: {"stopped": ""})
        assert qmax._dispatch(words) == 0
        return
    try:
        read(words, monkeypatch)
    except UnderstoodError as done:
        if words[0] == "plan":
            apply_overrides(load_config(done.found.config), done.rest)


def read(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises UnderstoodError when a verb has read its words, UserError when it refuses them."""
    known = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise UnderstoodError(self, *known(self, args, namespace))

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        found, rest = known(self, args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        raise UnderstoodError(self, found, rest)

    monkeypatch.setattr(terminal.Parser, "parse_args", parse_args)
    monkeypatch.setattr(terminal.Parser, "parse_known_args", parse_known_args)
    qmax._dispatch(words)


def understand_benchmark(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `python -m MODULE` read its words."""
    bench = importlib.import_module("bench.__main__" if module == "bench" else module)
    if hasattr(bench, "parse"):
        bench.parse(words)
        return
    known = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> Any:
        raise UnderstoodError(self, known(self, words), [])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(UnderstoodError):
        bench.main()


@functools.cache
def parser_of(verb: str) -> argparse.ArgumentParser:
    """The argument parser of a verb; `qmax train` has none."""

    def error(self: argparse.ArgumentParser, message: str) -> None:
        raise UnderstoodError(self, argparse.Namespace(), [message])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal.Parser, "error", error)  # of the words that it needs and is not given
        try:
            read([verb], patch)
        except UnderstoodError as done:
            return done.parser
    raise AssertionError(f"qmax {verb} reads no arguments")


@functools.cache
def options_of(verb: str) -> frozenset[str]:
    """Every option that a verb takes, fields of a config among them where it takes any."""
    fields = {f"--{name.replace('_', '-')}" for name, _ in fields_of(Run)}
    if verb == "train":
        return frozenset(fields | TRAIN | EVERY)
    return frozenset({*parser_of(verb)._option_string_actions, *EVERY, *(fields if verb == "plan" else ())})
