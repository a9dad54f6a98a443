"""Law: words reach exactly the field they name, a Run survives JSON, and what is wrong is refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.override import (
    apply_overrides,
    config_docstring,
    describe,
    explanations,
    fields_of,
    find_config,
    from_dict,
    load_config,
    to_dict,
    type_name,
)
from configs.run import DataConfig, Run
from errors import UserError
from model.config import ModelConfig
from sharding.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    """One of each kind of field, and no rules."""

    whole: int = 1
    real: float = 0.5
    flag: bool = False
    word: str = "a b"
    pick: Literal["one", "two-words", 3] = "one"
    words: tuple[str, ...] = ()
    wholes: tuple[int, ...] = (1,)
    reals: tuple[float, ...] = ()
    maybe: float | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    """A section and a field beside it."""

    inner: Inner = Inner()
    top_level: int = 0


WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda text: not text.startswith("--"))
REAL = st.floats(allow_nan=False)
WHOLE = st.integers(-(10**30), 10**30)
INNERS = st.builds(
    Inner,
    whole=WHOLE,
    real=REAL,
    flag=st.booleans(),
    word=WORD,
    pick=st.sampled_from(["one", "two-words", 3]),
    words=st.lists(WORD.filter(bool), max_size=3).map(tuple),
    wholes=st.lists(WHOLE, max_size=3).map(tuple),
    reals=st.lists(REAL, max_size=3).map(tuple),
    maybe=st.none() | REAL,
)
OUTERS = st.builds(Outer, inner=INNERS, top_level=WHOLE)


def words_of(value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return ["none" if value is None else str(value)]


@given(OUTERS)
def test_words_give_every_value(run: Outer) -> None:
    argv = []
    for name, _ in fields_of(Outer):
        head, _, leaf = name.rpartition(".")
        value = getattr(getattr(run, head) if head else run, leaf)
        argv += [f"--{name}", *words_of(value)]
    assert apply_overrides(Outer(), argv) == run
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in argv]
    assert apply_overrides(Outer(), dashed) == run


@given(OUTERS)
def test_json_round_trip(run: Outer) -> None:
    assert from_dict(Outer, json.loads(json.dumps(to_dict(run)))) == run


@given(
    st.builds(
        Run,
        model=st.builds(ModelConfig, hidden_size=st.sampled_from([64, 128]), qkv_bias=st.booleans()),
        data=st.builds(
            DataConfig, sources=st.lists(WORD).map(tuple), batch_size=st.sampled_from([8, 16]), tokenizer=WORD
        ),
        mesh=st.sampled_from([MeshConfig(), MeshConfig(fsdp=2, tensor=4), MeshConfig(data=8)]),
        steps=st.integers(1, 10**9),
        objective=st.sampled_from(["pretrain", "sft", "dpo", "reward", "kto"]),
    )
)
def test_a_run_survives_json(run: Run) -> None:
    assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--data.batch-size 16", "data.batch_size", 16),
        ("--data.batch_size=16", "data.batch_size", 16),
        ("--steps 1_000", "steps", 1000),
        ("--steps 2e3", "steps", 2000),
        ("--steps 5 --steps 7", "steps", 7),
        ("--optimizer.learning-rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("--optimizer.learning-rate 1", "optimizer.learning_rate", 1.0),
        ("--loss.z-loss -1", "loss.z_loss", -1.0),
        ("--model.qkv-bias", "model.qkv_bias", True),
        ("--model.qk-norm no", "model.qk_norm", False),
        ("--model.qk-norm=FALSE", "model.qk_norm", False),
        ("--data.sources a b/*.txt c", "data.sources", ("a", "b/*.txt", "c")),
        ("--data.sources=", "data.sources", ()),
        ("--data.sources", "data.sources", ()),
        ("--model.moe.dense-layers 0,1 5", "model.moe.dense_layers", (0, 1, 5)),
        ("--out=--strange", "out", "--strange"),
        ("--objective sft", "objective", "sft"),
    ],
)
def test_spellings(words: str, field: str, value: object) -> None:
    run: Any = apply_overrides(Run(), words.split())
    for part in field.split("."):
        run = getattr(run, part)
    assert (run, type(run)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--data.batchsize 3", "the config has no field --data.batchsize; did you mean '--data.batch-size'?"),
        ("--learning_rate 3", "the config has no field --learning_rate; did you mean --optimizer.learning-rate?"),
        ("--zzzz 3", "the config has no field --zzzz; --help lists them"),
        ("--data 3", "--data is a section of the config; name one of its fields, such as --data.sources"),
        ("--steps 1.5", "--steps takes int, not '1.5'"),
        ("--steps true", "--steps takes int, not 'true'"),
        ("--steps 1 2", "--steps takes int, not '1 2'"),
        ("--steps", "--steps takes int, and no value follows it"),
        ("--steps=", "--steps takes int, not ''"),
        ("--steps 1e999999999", "--steps takes int, not '1e999999999'"),
        ("--steps inf", "--steps takes int, not 'inf'"),
        ("--optimizer.eps nan", "--optimizer.eps takes float, not 'nan'"),
        ("--model.qkv-bias maybe", "--model.qkv-bias takes bool, not 'maybe'; say true or false"),
        ("--dtype bf16", "--dtype takes auto|float32|bfloat16, not 'bf16'; did you mean 'bfloat16'?"),
        ("--data.weights 1 x", "--data.weights takes float ..., not '1 x'"),
        ("16", "what is '16'? fields of the config are set as --section.field value"),
        ("--mesh.fsdp 3", "8 rows of a micro-batch do not divide over data x fsdp x expert = 3"),
    ],
)
def test_mistakes(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(Run(), words.split())
    assert str(caught.value) == sentence


def test_only_the_final_combination_is_judged() -> None:
    run = Run(data=DataConfig(sources=("a", "b"), weights=(1.0, 2.0)))
    one_source = ["--data.sources", "x", "--data.weights", "1"]
    changed = apply_overrides(run, [*one_source, "--mesh.fsdp", "16", "--data.batch-size", "32"])
    assert changed.data.sources == ("x",)
    with pytest.raises(UserError, match="weights"):
        apply_overrides(run, ["--data.sources", "x"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stps": 3}, "the config has no field 'stps'; did you mean 'steps'?"),
        ({"data": {"batchsize": 3}}, "the config has no field 'data.batchsize'; did you mean 'batch_size'?"),
        ({"steps": True}, "steps takes int, not True"),
        ({"steps": 1.0}, "steps takes int, not 1.0"),
        ({"data": {"sources": "a"}}, "data.sources takes str ..., not 'a'"),
        ({"data": [1]}, "data must be an object, not [1]"),
        ({"dtype": "int8"}, "dtype takes auto|float32|bfloat16, not 'int8'"),
    ],
)
def test_json_that_is_no_run(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(Run, values)
    assert str(caught.value) == sentence


def test_missing_keys_take_defaults() -> None:
    assert from_dict(Run, {}) == Run()
    assert from_dict(Run, {"optimizer": {"eps": 1}}).optimizer.eps == 1.0


def test_help_shows_every_field_with_its_words() -> None:
    text = describe(Run(steps=77))
    flat = " ".join(text.split())
    for name, kind in fields_of(Run):
        assert f"--{name.replace('_', '-')} {type_name(kind)}" in flat
    assert "--steps int (is 77) Optimizer steps." in flat
    for cls in (Run, DataConfig, ModelConfig, MeshConfig):
        hints = typing.get_type_hints(cls)
        assert all(note in flat for name, note in explanations(cls).items() if name in hints)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_config_file_is_a_function(tmp_path: Path) -> None:
    path = write(tmp_path, '"""On a laptop."""\nfrom configs.run import Run\n\ndef run():\n    return Run(steps=3)\n')
    assert load_config(path) == Run(steps=3)
    assert config_docstring(Path(path)) == "On a laptop."
    write(tmp_path, "from configs.run import Run\nrun = lambda: Run(steps=4)\n")
    assert load_config(path).steps == 4, "an edited file is read again"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.py"], "nothing is written beside it"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "defines no function run()"),
        ("def run():\n    return 3", "returns int; it must return a configs.run.Run"),
        ("import nothing_of_that_name", "line 1 fails with ModuleNotFoundError: No module named"),
        ("def run():\n    a = 0\n    return 1 / a", "line 3 fails with ZeroDivisionError: division by zero"),
        ("def run(:\n", "line 1 fails with SyntaxError"),
        ("import sys\nsys.exit(3)", "line 2 fails with SystemExit: 3"),
        ("from configs.run import Run\n\ndef run():\n    return Run(steps=0)", "steps=0 must be at least 1 (in "),
    ],
)
def test_a_config_that_fails_names_the_line(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert words in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_names_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text("")
    (tmp_path / "override.py").write_text("")
    monkeypatch.setattr("configs.override.CONFIGS", tmp_path)
    assert find_config("small") == tmp_path / "small.py"
    for wrong in ("smal", "configs/smal.py", "elsewhere/smal.py"):
        with pytest.raises(UserError, match=f"there is no config '{wrong}'; did you mean 'small'"):
            find_config(wrong)
    with pytest.raises(UserError, match="there is no config 'override'"):
        find_config("override")
