"""Law: what is restored is bit for bit what was saved, and whatever happens to a save, a good checkpoint is left.

A save survives the donation of its buffers, another mesh shape, kill -9 and a full disk; damage is named, never used.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from errors import UserError
from model.checkpoint import manifest
from model.checkpoint.checkpoints import CheckpointError, Checkpoints, leaf_hashes
from model.checkpoint.storage import quieten

ROOT = Path(__file__).parents[1]


def make_state(step: int, size: int = 64) -> dict[str, Any]:
    """A state that is a pure function of `step`, in the containers and types that a run uses."""
    key = jax.random.fold_in(jax.random.key(7), step)
    w = jax.random.normal(key, (3, size, size))
    return {
        "parameters": {"layers": [{"w": w[0]}, {"w": w[1]}], "norm": jnp.ones(size)},
        "optimizer": ({"m": w[2].astype(jnp.bfloat16)}, {"count": jnp.int32(step)}),
        "counters": {"step": jnp.int32(step), "empty": jnp.zeros((0, 4))},
    }


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield checkpoints
    checkpoints.close()


def test_round_trip_keeps_bits_structure_and_meta(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    state, directory = make_state(5), tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, keep=2, tokenizer=tokenizer)
    checkpoints.save(5, state, meta={"run": {"seed": 3, "name": "début"}}, validation_loss=2.5)
    checkpoints.close()

    again = Checkpoints(directory, keep=2)
    assert again.latest_good(pytest.fail) == 5
    restored = again.restore(5, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert leaf_hashes(restored) == leaf_hashes(state)
    assert again.meta(5) == {"run": {"seed": 3, "name": "début"}}
    assert again.leaves(5)["optimizer/0/m"] == jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    assert (again.path(5) / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert {path.name for path in directory.iterdir()} == {"5", ".lock"}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_save_survives_the_donation_of_its_buffers(box: Checkpoints, sharded: bool) -> None:
    @partial(jax.jit, donate_argnums=0)
    def step(state: Any) -> Any:
        return jax.tree.map(lambda x: x * 2 + 1, state)

    state = make_state(1, size=512)
    if sharded:
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
        rows = NamedSharding(mesh, PartitionSpec("fsdp"))
        state = jax.tree.map(lambda x: jax.device_put(x, rows) if x.size > 64 else x, state)
    template = abstract(state)
    for number in range(3):
        state = step(state)
        wanted = leaf_hashes(jax.tree.map(jnp.copy, state))
        box.save(number, state, meta={})
        given = jax.tree.leaves(state)
        for _ in range(5):
            state = step(state)
        assert all(x.is_deleted() for x in given), "a save must not keep the step from working in place"
        jax.block_until_ready(state)
        box.wait()
        assert leaf_hashes(state) != wanted
        assert leaf_hashes(box.restore(number, template)) == wanted


def test_restored_arrays_may_be_donated(box: Checkpoints) -> None:
    @partial(jax.jit, donate_argnums=0)
    def step(state: Any) -> Any:
        return jax.tree.map(lambda x: (x * 3).astype(x.dtype), state)

    state = make_state(2, size=512)
    box.save(2, state, meta={})
    box.wait()
    restored = box.restore(2, abstract(state))
    for _ in range(3):
        state, restored = step(state), step(restored)
    assert leaf_hashes(restored) == leaf_hashes(state)


def test_saving_compiles_nothing(box: Checkpoints) -> None:
    state = make_state(0)
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        box.save(0, state, meta={})
        box.wait()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_restores_onto_another_mesh_bit_for_bit(box: Checkpoints) -> None:
    def layout(shape: tuple[int, int]) -> Any:
        mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

        def place(x: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec("fsdp", "tensor") if x.shape == (64, 64) else PartitionSpec())

        return place

    before, after = layout((2, 4)), layout((4, 2))
    state = make_state(3)
    placed = jax.tree.map(lambda x: jax.device_put(x, before(x)), state)
    box.save(3, placed, meta={})
    box.wait()
    one = SingleDeviceSharding(jax.devices()[5])
    for shardings in (jax.tree.map(after, state), jax.tree.map(lambda x: one, state)):
        template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        restored = box.restore(3, template)
        assert leaf_hashes(restored) == leaf_hashes(state)
        assert jax.tree.map(lambda x: x.sharding, restored) == shardings


def test_a_part_of_the_state_can_be_read_alone(box: Checkpoints) -> None:
    state = make_state(1)
    box.save(1, state, meta={})
    box.wait()
    part = {"parameters": state["parameters"]}
    assert leaf_hashes(box.restore(1, abstract(part), part=True)) == leaf_hashes(part)
    with pytest.raises(CheckpointError, match=r"4 arrays differ \(it has 7, this run asks for 3\)"):
        box.restore(1, abstract(part))


def test_another_architecture_is_refused_in_one_sentence(box: Checkpoints) -> None:
    state = make_state(1)
    box.save(1, state, meta={})
    box.wait()
    template = abstract(state)
    template["parameters"]["norm"] = jax.ShapeDtypeStruct((65,), jnp.float32)
    template["parameters"]["gate"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    del template["counters"]["empty"]
    template["optimizer"][0]["m"] = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    with pytest.raises(CheckpointError) as caught:
        box.restore(1, template)
    sentence = str(caught.value)
    assert "is of another architecture or optimizer: 4 arrays differ (it has 7, this run asks for 7)" in sentence
    assert "\n" not in sentence
    assert "counters/empty is float32[0, 4] there and missing here" in sentence
    assert "parameters/gate is missing there and float32[2] here" in sentence
    assert sentence.count(" there and ") == 3


def test_every_file_counts(box: Checkpoints) -> None:
    """Each file of a checkpoint in turn is cut short, changed by one bit, or taken away: the one before is used."""
    for step in (10, 20):
        box.save(step, make_state(step), meta={"x": 1})
        box.wait()
    files = [path for path in box.path(20).rglob("*") if path.is_file()]
    assert len(files) >= 8
    for number, path in enumerate(files):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[(number * 37) % len(whole)] ^= 1 << (number % 7)
        for damage in (whole[:-1], bytes(flipped), whole + b"\n", None):
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage)
            said: list[str] = []
            assert Checkpoints(box.directory, keep=2).latest_good(said.append) == 10, (path, damage)
            [sentence] = said
            assert sentence.startswith("checkpoint 20 in ")
            assert path.name in sentence
            with pytest.raises(CheckpointError, match="checkpoint 20"):
                Checkpoints(box.directory, keep=2).restore(20, abstract(make_state(20)))
            path.write_bytes(whole)
    assert Checkpoints(box.directory, keep=2).latest_good(pytest.fail) == 20


def test_a_damaged_checkpoint_is_not_counted_and_is_replaced(box: Checkpoints) -> None:
    for step in (10, 20, 30):
        box.save(step, make_state(step), meta={})
    box.wait()
    (box.path(30) / manifest.NAME).unlink()
    again = Checkpoints(box.directory, keep=2)
    box.close()
    assert again.latest_good() == 20
    again.save(25, make_state(25), meta={})
    again.wait()
    assert again.steps() == [20, 25, 30], "step 20 is the last good one before 25; 30 awaits its successor"
    again.save(30, make_state(30), meta={})
    again.close()
    assert again.steps() == [25, 30]
    assert again.latest_good(pytest.fail) == 30


def test_keeps_the_newest_and_the_best(box: Checkpoints) -> None:
    losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: None, 60: 1.5}
    for step, loss in losses.items():
        box.save(step, make_state(step), meta={}, validation_loss=loss)
    box.wait()
    assert box.steps() == [20, 50, 60]
    assert box.best() == 20
    assert json.loads((box.path(60) / manifest.NAME).read_text())["validation_loss"] == 1.5
    box.clear()
    assert box.steps() == []
    assert box.latest_good() is None


def test_the_restored_checkpoint_outlives_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Checkpoints(tmp_path, keep=1)
    box.save(10, make_state(10), meta={})
    box.wait()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        box.save(20, make_state(20), meta={})
        with pytest.raises(CheckpointError, match="step 10; free some space") as caught:
            box.wait()
    assert "disk is full" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"10", ".lock"}
    box.check()  # said once
    box.save(20, make_state(20), meta={})
    box.close()
    assert box.steps() == [20]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


# When the disk fills up under its hands, Orbax forgets the parts still being written; Python says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_one_sentence_and_costs_nothing(
    small_disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    if not foreseen:
        monkeypatch.setattr("model.checkpoint.checkpoints.demand_space", lambda directory, size: None)
    box = Checkpoints(small_disk / "checkpoints", keep=1)
    box.save(1, make_state(1, size=256), meta={})  # 0.7 MB
    box.wait()
    with pytest.raises(CheckpointError) as caught:  # noqa: PT012 - which of the two raises is the difference
        box.save(2, make_state(2, size=1024), meta={})  # 10 MB
        assert not foreseen
        box.wait()
    assert str(caught.value) == (
        f"checkpoint 2 could not be written to {small_disk}/checkpoints: the disk is full; "
        "the last good checkpoint is step 1; free some space and resume"
    )
    assert box.latest_good(pytest.fail) == 1
    assert {path.name for path in box.directory.iterdir()} == {"1", ".lock"}
    assert capfd.readouterr() == ("", "")
    box.save(3, make_state(3, size=256), meta={})
    box.close()
    assert box.steps() == [3]


def test_a_second_save_waits_for_the_first(box: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), manifest.write

    def slow(directory: Path, **record: Any) -> None:
        gate.wait(20)
        write(directory, **record)

    monkeypatch.setattr(manifest, "write", slow)
    box.save(1, make_state(1), meta={})
    box.check()
    assert box.steps() == [], "nothing is seen before it is whole"
    threading.Timer(0.2, gate.set).start()
    box.save(2, make_state(2), meta={})
    assert box.steps() == [1]
    box.wait()
    assert box.steps() == [1, 2]


def test_two_writers_do_not_mix(box: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.checkpoints.LOCK_SECONDS", 0.1)
    box.save(1, make_state(1), meta={})
    other = Checkpoints(box.directory, keep=2)
    with pytest.raises(CheckpointError, match="another process is saving"):
        other.save(2, make_state(2), meta={})
    assert other.latest_good(pytest.fail) in (None, 1)
    box.close()
    assert box.steps() == [1]
    other.save(2, make_state(2), meta={})
    other.close()
    assert box.steps() == [1, 2]


def test_what_is_no_checkpoint_is_refused_or_ignored(box: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(UserError, match="local or network"):
        Checkpoints("gs://bucket/run", keep=1)
    with pytest.raises(TypeError, match="counters/step is a int"):
        box.save(1, {"counters": {"step": 3}}, meta={})
    with pytest.raises(TypeError, match="plain jax arrays"):
        box.save(1, {"key": jax.random.key(0)}, meta={})
    with pytest.raises(ValueError, match="JSON"):
        box.save(1, make_state(1), meta={"loss": float("inf")})
    with pytest.raises(CheckpointError, match="it has no manifest"):
        box.restore(1, abstract(make_state(1)))
    assert box.latest_good(pytest.fail) is None
    assert not box.directory.exists()
    (box.directory / "notes").mkdir(parents=True)
    (box.directory / ".tmp-7" / "state").mkdir(parents=True)
    assert box.latest_good(pytest.fail) is None
    assert sorted(path.name for path in box.directory.iterdir()) == [".lock", "notes"]


def test_parts_of_a_failed_write_say_nothing_when_they_are_given_up() -> None:
    async def async_serialize_from_host() -> None:
        """Stands for the part of Orbax of this name."""

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quieten()
        async_serialize_from_host()  # pyright: ignore[reportUnusedCoroutine]
        gc.collect()
    assert seen == []
