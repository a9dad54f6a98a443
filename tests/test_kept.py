"""Law: a program that was kept does what it did, is found by nobody else, and its loss is no harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from test_engine import CONFIG, GREEDY, Words

from model.config import ModelConfig
from model.transformer import Transformer
from serve.engine import Engine
from serve.kept import Kept
from sharding.mesh import MeshConfig, make_mesh

PROMPT = [[3, 1, 4, 1, 5, 9, 2, 6]]
TRACED = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return jax.jit(lambda: Transformer(CONFIG, jax.random.key(0)))()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the steps that are traced; it grows with each."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == TRACED and str(kwargs.get("fun_name")).startswith("engine_step"):
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


def say(model: Transformer, kept: Kept, **more: Any) -> list[int]:
    """Greedy words of a new engine."""
    return Engine(model, Words(), slots=2, kept=kept, **more).generate(PROMPT, GREEDY)[0].tokens


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.program"))


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_next_engine_traces_nothing_and_says_the_same(
    model: Transformer, tmp_path: Path, traced: list[str], tensor: int
) -> None:
    mesh = make_mesh(MeshConfig(tensor=tensor)) if tensor > 1 else None
    first = say(model, Kept(tmp_path), mesh=mesh)
    assert len(traced) == len(files(tmp_path)) > 1
    before = len(traced)
    assert say(model, Kept(tmp_path), mesh=mesh) == first
    assert first == Engine(model, Words(), slots=2, mesh=mesh).generate(PROMPT, GREEDY)[0].tokens
    assert len(traced) == before + before, "only the engine that keeps none traced again"


@pytest.mark.parametrize("more", [{"context": 64}, {"weight_type": "int8"}, {"kv_type": "int8"}], ids=str)
def test_another_engine_has_programs_of_its_own(model: Transformer, tmp_path: Path, more: dict[str, Any]) -> None:
    say(model, Kept(tmp_path))
    count = len(files(tmp_path))
    said = say(model, Kept(tmp_path), **more)
    assert len(files(tmp_path)) > count
    assert said == Engine(model, Words(), slots=2, **more).generate(PROMPT, GREEDY)[0].tokens


def test_other_sources_or_settings_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(ending: str) -> Any:
        made.append(1)

        def add_one(x: jax.Array) -> jax.Array:
            return x + 1

        add_one.__name__ += ending
        return jax.jit(add_one).lower(jax.ShapeDtypeStruct((2,), "float32")).compile()

    kept = Kept(tmp_path)
    for _ in range(2):
        assert kept.get(("one",), jax.devices()[:1], make)(jax.numpy.zeros(2)).tolist() == [1, 1]
    assert len(made) == 1
    monkeypatch.setattr("serve.kept._machine", lambda: ("other sources",))
    kept.get(("one",), jax.devices()[:1], make)
    assert len(made) == 2
    before = jax.config.values["jax_default_matmul_precision"]
    try:
        jax.config.update("jax_default_matmul_precision", "float32" if before == "highest" else "highest")
        kept.get(("one",), jax.devices()[:1], make)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert len(made) == 3 == len(files(tmp_path))


def test_what_is_broken_is_made_anew(model: Transformer, tmp_path: Path) -> None:
    first = say(model, Kept(tmp_path))
    for number, path in enumerate(files(tmp_path)):
        path.write_bytes(path.read_bytes()[: 1000 * number])
    assert say(model, Kept(tmp_path)) == first
    assert all(len(path.read_bytes()) > 5000 for path in files(tmp_path))


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = ModelConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    model = jax.jit(lambda: Transformer(config, jax.random.key(0)))()
    assert len(say(model, Kept(tmp_path / "file"))) == GREEDY.max_tokens
