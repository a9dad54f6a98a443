"""Words onto a Run (`--section.field value`), a Run to help text, to JSON and back, and a config file to a Run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from configs.run import Run
from errors import UserError, did_you_mean

T = TypeVar("T")

CONFIGS = Path(__file__).parent
NOT_CONFIGS = ("__init__", "run", "override")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class _MisfitError(Exception):
    """A value that does not fit its field; says what was expected."""


# ---- fields ---------------------------------------------------------------
def fields_of(cls: type) -> Iterator[tuple[str, Any]]:
    """`("section.field", type)` of every field of a dataclass, sections first in the order of the source."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            for name, inner in fields_of(typing.cast(type, kind)):
                yield f"{field.name}.{name}", inner
        else:
            yield field.name, kind


def explanations(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, as one line; empty where the source cannot be read."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError):
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            value = after.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[node.target.id] = " ".join(value.value.split())
    return found


def type_name(kind: Any) -> str:
    """How a type is written in help and errors: `int`, `adamw|muon`, `str ...`, `float or none`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is tuple:
        return f"{type_name(args[0])} ..."
    if origin in (Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else type_name(arg) for arg in args)
    return kind.__name__


# ---- words ----------------------------------------------------------------
def apply_overrides(run: T, argv: Sequence[str]) -> T:
    """`run` with `--section.field value` applied; dashes and underscores are the same, the last of two wins.

    All words are read first and every section is rebuilt once, so that only the final combination is judged.

    Raises:
        UserError: an unknown field (with the nearest), a value of another type, or an impossible combination.
    """
    kinds = dict(fields_of(type(run)))
    values: dict[str, Any] = {}
    for option, words in _options(argv):
        name = option[2:].replace("-", "_")
        if name not in kinds:
            raise UserError(_unknown(option, name, kinds))
        try:
            values[name] = _from_words(words, kinds[name])
        except _MisfitError as misfit:
            given = f"not {' '.join(words)!r}{misfit}" if words else "and no value follows it"
            raise UserError(f"--{_dashed(name)} takes {type_name(kinds[name])}, {given}") from None
    return _rebuild(run, values)


def _options(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Cuts words into options, each with the words up to the next option."""
    option, words = "", []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            if option:
                yield option, words
            option, equals, value = word.partition("=")
            words = [value] if equals else []
        elif not option:
            raise UserError(f"what is {word!r}? fields of the config are set as --section.field value")
        else:
            words.append(word)
    if option:
        yield option, words


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _unknown(option: str, name: str, kinds: dict[str, Any]) -> str:
    known = [f"--{_dashed(known)}" for known in kinds]
    same_leaf = [f"--{_dashed(other)}" for other in kinds if other.rpartition(".")[2] == name.rpartition(".")[2]]
    inside = [f"--{_dashed(other)}" for other in kinds if other.startswith(f"{name}.")]
    if inside:
        return f"{option} is a section of the config; name one of its fields, such as {inside[0]}"
    if same_leaf:
        return f"the config has no field {option}; did you mean {' or '.join(same_leaf)}?"
    return f"the config has no field {option}{did_you_mean(f'--{_dashed(name)}', known) or '; --help lists them'}"


def _from_words(words: list[str], kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        words = [] if words == [""] else words
        if args[0] is not str:
            words = [part for word in words for part in word.split(",")]
        return tuple(_from_words([word], args[0]) for word in words)
    if origin in (Union, types.UnionType):
        if type(None) in args and [word.lower() for word in words] == ["none"]:
            return None
        for arg in (arg for arg in args if arg is not type(None)):
            try:
                return _from_words(words, arg)
            except _MisfitError:
                continue
        raise _MisfitError
    if kind is bool and not words:
        return True
    if len(words) != 1:
        raise _MisfitError
    return _from_word(words[0], kind)


def _from_word(word: str, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if word not in choices:
            raise _MisfitError(did_you_mean(word, choices))
        return choices[word]
    if kind is str:
        return word
    if kind is bool:
        if word.lower() not in TRUE + FALSE:
            raise _MisfitError("; say true or false")
        return word.lower() in TRUE
    try:
        if kind is float:
            number = float(word)
            if math.isnan(number):
                raise _MisfitError
            return number
        decimal = Decimal(word)  # so that 1e3 and 1_000 are whole numbers, and 1e23 exactly so
        if not decimal.is_finite() or decimal.adjusted() > 30 or decimal != decimal.to_integral_value():
            raise _MisfitError
        return int(decimal)
    except (ValueError, InvalidOperation):
        raise _MisfitError from None


def _rebuild(node: T, values: dict[str, Any]) -> T:
    """`node` with dotted `values` replaced: innermost sections first, each made once."""
    changes: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            sections.setdefault(head, {})[rest] = value
        else:
            changes[head] = value
    for head, inner in sections.items():
        changes[head] = _rebuild(getattr(node, head), inner)
    return dataclasses.replace(typing.cast(Any, node), **changes) if changes else node


# ---- help -----------------------------------------------------------------
def describe(run: Any, prefix: str = "") -> str:
    """Every field of `run` with its type, its value in this config and its explanation, section by section."""
    hints, notes = typing.get_type_hints(type(run)), explanations(type(run))
    own, sections = [], []
    for field in dataclasses.fields(run):
        value, name = getattr(run, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            sections.append(f"{name}: {notes.get(field.name, '')}\n{describe(value, f'{name}.')}")
            continue
        own.append(f"  --{_dashed(name)} {type_name(hints[field.name])}  (is {_shown(value)})")
        own.extend(textwrap.wrap(notes.get(field.name, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n\n".join(["\n".join(own), *sections] if own else sections)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "empty"
    return "empty" if value == "" else str(value).lower() if value is None or isinstance(value, bool) else str(value)


# ---- JSON -----------------------------------------------------------------
def to_dict(run: Any) -> dict[str, Any]:
    """`run` as JSON types: sections become objects and tuples become lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(run)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The dataclass that `to_dict` wrote; fields that are missing take their defaults.

    Raises:
        UserError: a key that is no field (with the nearest), or a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'the config'} must be an object, not {values!r}")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(typing.cast(Any, cls))}
    for key in values:
        if key not in known:
            raise UserError(f"the config has no field {where + key!r}{did_you_mean(key, known)}")
    made = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            made[key] = from_dict(hints[key], value, f"{where}{key}.")
            continue
        try:
            made[key] = _from_json(value, hints[key])
        except _MisfitError:
            raise UserError(f"{where}{key} takes {type_name(hints[key])}, not {value!r}") from None
    return cls(**made)


def _from_json(value: Any, kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_json(item, args[0]) for item in value)
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return _from_json(value, arg)
            except _MisfitError:
                continue
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise _MisfitError
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise _MisfitError


# ---- files ----------------------------------------------------------------
def find_config(path_or_name: str) -> Path:
    """The config file that is meant: a path, or the name of a file in configs/.

    Raises:
        UserError: there is no such file; names the nearest that exists.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    names = sorted(file.stem for file in CONFIGS.glob("*.py") if file.stem not in NOT_CONFIGS)
    inside = path.parent == Path(".") or path.parent.name == CONFIGS.name
    if inside and path.suffix in ("", ".py") and path.stem in names:
        return CONFIGS / f"{path.stem}.py"
    hint = did_you_mean(path.stem, names) or f"; configs/ has {', '.join(names) or 'none'}"
    raise UserError(f"there is no config {path_or_name!r}{hint}")


def load_config(path_or_name: str) -> Run:
    """The Run that the function `run()` of a config file returns.

    Raises:
        UserError: no such file, no `run()`, or an error inside, named with its line.
    """
    path = find_config(path_or_name)
    module = types.ModuleType(f"qmax_config_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
        if not callable(make := getattr(module, "run", None)):
            raise UserError(f"{path} defines no function run(); a config is a Python file with run() -> Run")
        run = make()
    except UserError as exc:
        raise UserError(f"{exc} (in {path}{_line(exc, path)})") from exc
    except (Exception, SystemExit) as exc:
        text = " ".join(str(exc.msg if isinstance(exc, SyntaxError) else exc).split())
        raise UserError(f"{path}{_line(exc, path)} fails with {type(exc).__name__}: {text}") from exc
    if not isinstance(run, Run):
        raise UserError(f"run() in {path} returns {type(run).__name__}; it must return a configs.run.Run")
    return run


def config_docstring(path: Path) -> str:
    """What a config file says of itself: hardware, duration, expected result, command."""
    try:
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _line(exc: BaseException, path: Path) -> str:
    """` line N`: the innermost line of the file `path` that `exc` passed through."""
    if isinstance(exc, SyntaxError) and exc.filename == str(path):
        return f" line {exc.lineno}"
    number, trace = 0, exc.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            number = trace.tb_lineno
        trace = trace.tb_next
    return f" line {number}" if number else ""
