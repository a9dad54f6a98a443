"""Law: what a plan says of a program's collectives is what was written; a bad question is one sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import shard_map
from jax.sharding import PartitionSpec as P

import qmax
from sharding.mesh import AXES, MeshConfig, make_mesh, platform
from sharding.topology import BETWEEN_SLICES, find_chip
from tests.tiny import MOE, make_run
from train.hlo import Collective, Kernel, read_program
from train.plan import does_not_fit
from train.plan_programs import heap, largest_places
from train.plan_search import meshes, rough_seconds
from train.plan_time import Time, costs, kernel_flops, seconds_of

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def test_collectives_are_counted_by_axis_and_trip() -> None:
    config = MeshConfig(fsdp=2, expert=2, tensor=2)
    mesh = make_mesh(config)

    def local(x):
        def body(_, total):
            return total + jax.lax.all_gather(jnp.tanh(total[:4]), "fsdp", tiled=True)

        total = jax.lax.fori_loop(0, 3, body, x)
        return jax.lax.psum(total, ("fsdp", "tensor")) + jax.lax.ppermute(x, "expert", [(0, 1), (1, 0)])

    with jax.set_mesh(mesh):
        function = shard_map(local, in_specs=P(None), out_specs=P(None), check_vma=False)
        text = jax.jit(function).lower(jnp.ones((8, 16))).compile().as_text()
    assert text is not None
    found = {one.kind: one for one in read_program(text, dict(zip(AXES, config.shape, strict=True))).collectives}
    gather = found["all-gather"]
    assert (gather.axes, gather.devices, gather.count, gather.bytes) == (("fsdp",), 2, 3, 3 * 8 * 16 * 4)
    assert found["all-reduce"].axes == ("fsdp", "tensor") and found["all-reduce"].bytes == 8 * 16 * 4
    assert found["collective-permute"].axes == ("expert",)


def test_a_mesh_that_the_compiler_made_up_is_read() -> None:
    """Its axes have names of its own; the devices of a group say which of ours it runs along."""
    groups = {
        "mesh['axis_0'=8] {'axis_0'}": ("data", "fsdp", "expert"),
        "mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}": ("fsdp",),
        "mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,2,2]T(1,0,2)) {'axis_1'}": ("data", "fsdp"),
        "mesh['data'=2,'fsdp'=2,'expert'=2] {'expert'}": ("expert",),
    }
    for written, axes in groups.items():
        line = f"  %a = f32[4]{{0}} all-reduce(%b), replica_groups={written}, use_global_device_ids=true"
        program = f"ENTRY %main (b: f32[4]) -> f32[4] {{\n{line}\n}}\n"
        (found,) = read_program(program, {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}).collectives
        assert (found.axes, found.devices) == (axes, 2 ** len(axes))


def test_an_all_reduce_that_is_cut_at_once_is_a_reduce_scatter() -> None:
    """A TPU's compiler writes it as a fusion, whose name tells."""
    program = """
%all-reduce-scatter.1 (input: f32[8,4]) -> f32[2,4] {
  %a = f32[8,4]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[2,4]{1,0} dynamic-slice(%a, %place), dynamic_slice_sizes={2,4}
}

ENTRY %main (b: f32[8,4]) -> f32[2,4] {
  ROOT %f = f32[2,4]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = read_program(program, {"data": 4, "fsdp": 1, "expert": 1, "tensor": 1}).collectives
    assert (found.kind, found.axes, found.bytes) == ("reduce-scatter", ("data",), 8 * 4 * 4)


def test_what_hosts_send_to_other_slices_is_a_collective_along_data() -> None:
    """The compiler writes the two ends of a transfer for each shard; a gather ends with those of all slices."""
    target = 'frontend_attributes={_xla_megascale_target="{1,2}x{0:255}",_xla_megascale_transfer_type='
    program = f"""
ENTRY %main (b: f32[8,4]) -> f32[8,4] {{
  %s = (bf16[16,2]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%x, %t), is_host_transfer=true, {target}"ALL_GATHER"}}
  %r = (f32[8,4]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%y, %t), is_host_transfer=true, {target}"REDUCE_SCATTER"}}
}}
"""
    gather, scatter = sorted(read_program(program, {"data": 2, "fsdp": 256}).collectives, key=lambda one: one.kind)
    assert (gather.kind, gather.axes, gather.devices, gather.bytes) == ("all-gather", ("data",), 2, 2 * 16 * 2 * 2)
    assert (scatter.kind, scatter.axes, scatter.devices, scatter.bytes) == ("reduce-scatter", ("data",), 2, 8 * 4 * 4)
    assert gather.asynchronous and scatter.asynchronous


def test_a_program_is_made_for_the_devices_of_its_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.set_mesh(make_mesh(MeshConfig(data=2))):
        assert platform() == "cpu"
    absent = SimpleNamespace(abstract_device=SimpleNamespace(device_kind="TPU v5p"))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: absent)
    assert platform() == "tpu"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "v5q:4x4"], "'v5q' is no TPU that is known; did you mean"),
        (["--topology", "v5p"], "is not of the form GENERATION:SHAPE"),
        (["--topology", "v5p:2x2x1", "--mesh.fspd", "4"], "did you mean"),
    ],
)
def test_a_bad_question_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert qmax.main(["plan", "configs/tiny.py", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


def test_chips_are_those_of_the_specifications() -> None:
    assert find_chip("v5p:2x2x1").flops == 459e12 and find_chip("tpu7x:2x2x1").per_chip == 2


CHIP = find_chip("v5p:4x4x4")
RING, LINE = {"fsdp": ((4, True), (8, True))}, {"fsdp": ((4, False),), "data": ()}


def sent(kind: str, devices: int, size: int, axes: tuple[str, ...] = ("fsdp",)) -> Collective:
    return Collective(kind, axes, devices, 1, size, asynchronous=False)


def test_the_time_of_collectives_by_hand() -> None:
    """A gather passes 31 of 32 parts over two links in each of two dimensions; an all-to-all waits for the longer."""
    assert seconds_of(sent("all-gather", 32, 32 * 10**9), RING, CHIP) == pytest.approx(31e9 / (4 * 90e9))
    assert seconds_of(sent("all-reduce", 32, 32 * 10**9), RING, CHIP) == pytest.approx(2 * 31e9 / (4 * 90e9))
    assert seconds_of(sent("all-to-all", 32, 10**9), RING, CHIP) == pytest.approx(1e9 * 8 / 8 / 90e9)
    assert seconds_of(sent("all-gather", 4, 4 * 10**9), LINE, CHIP) == pytest.approx(3e9 / 90e9)
    assert seconds_of(sent("all-gather", 2, 2 * 10**9, ("data",)), LINE, CHIP) == pytest.approx(1e9 / BETWEEN_SLICES)
    assert seconds_of(sent("all-gather", 1, 10**9), RING, CHIP) == 0


def test_the_operations_of_kernels_by_hand() -> None:
    """A product of 64 rows, each with two experts of 16 channels over a width of 32; and attention forward."""
    run = make_run(MOE)
    heads, width = 4, 8
    by_hand = {
        Kernel("ragged-dot-none", 3, ((80, 32), (9,), (80, 16), (4, 16, 32)), 0): 2 * (64 * 2) * 32 * 16,
        Kernel("ragged-dot-metadata", 9, ((4,), (9,)), 0): 0,
        Kernel("transpose_jvp_jit_tgmm___", 1, ((4, 16, 32), (80, 16), (80, 32)), 0): 2 * (64 * 2) * 32 * 16,
        Kernel("splash_mha_fwd_residuals", 1, (), 0): 2 * 2 * heads * width * 64 * 16 / 2,
    }
    for kernel, flops in by_hand.items():
        assert kernel_flops(kernel, run, 64, 16) == flops


def test_what_is_not_hidden_is_added() -> None:
    time = Time(matrix=1.0, kernels=2.0, unstated=0.5, collectives=3.0, asynchronous=0.0, needed=1.75)
    found = costs(time, 1000, 8, CHIP, tokens=3.6e6, price=2.0)
    assert (time.low, time.high) == (3.5, 6.5)
    assert found["mfu_high"] == 0.5 and found["tokens_per_second"] == [1000 / 6.5, 1000 / 3.5]
    assert found["chip_hours"] == [3600 * 3.5 * 8 / 3600, 3600 * 6.5 * 8 / 3600]
    assert found["money"][0] == 2 * found["chip_hours"][0]


def test_meshes_to_search_divide_what_they_cut() -> None:
    run = make_run(MOE)
    found = list(meshes(run, 8, 2))
    assert len({one.mesh for one in found}) == len(found) > 4
    for one in found:
        assert one.mesh.num_devices == 8 and one.mesh.data % 2 == 0
        assert rough_seconds(one, CHIP) < float("inf")


def test_what_does_not_fit_is_one_sentence() -> None:
    report = """Memory Space: default (color=0)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
    4.75GiB( 13%);    4.75GiB;  15056977920;                9; 4xbf16[16,2560,2560], 5xf32[8192,155648]
    8.75GiB( 23%);    4.00GiB;  10762010624;                5; 5xbf16[64,1,4096,8192]

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
    2.00GiB(100%);    2.00GiB;            0;                1; f32[8192,65536]
Memory Space: vmem (color=1)
"""
    assert heap(report) == 15056977920 + int(4.75 * 2**30)  # an argument, which has its place to itself, is none of it
    largest = largest_places(report)[:2]
    assert largest == (
        (int(4.75 * 2**30), "4xbf16[16,2560,2560], 5xf32[8192,155648]"),
        (2**32, "5xbf16[64,1,4096,8192]"),
    )
    arrays = [{"bytes": size, "shapes": shapes} for size, shapes in largest]
    found = {"mode": "train", "peak_bytes_per_device": 2**37, "limit_bytes_per_device": 2**36, "largest_arrays": arrays}
    words = does_not_fit(found)
    assert "128 GiB of 64.0 GiB" in words and "4.8 GiB 4xbf16[16,2560,2560]" in words and "data.batch_size" in words


def planned(tmp_path: Path, *words: str) -> dict:
    """What `qmax plan` finds, in a process of its own: the compiler wants to be the first to start."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "qmax.py", "plan", *words, "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "plan.json").read_text()) | {"said": done.stdout}


needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs pip install 'qmax[plan]'")


@needs_compiler
def test_a_step_for_chips_that_are_not_here(tmp_path: Path) -> None:
    """Four layers with experts on a slice of sixteen chips: what fits, and what is sent along which axis."""
    sizes = {"num-layers": 4, "hidden-size": 512, "num-heads": 8, "vocab-size": 8192}
    sizes |= {"moe.num-experts": 16, "moe.experts-per-token": 4, "moe.intermediate-size": 256}
    words = [word for name, size in sizes.items() for word in (f"--model.{name}", str(size))]
    words += [
        "--data.sequence-length",
        "1024",
        "--mesh.exchange",
        "all_to_all",
        "--mesh.fsdp",
        "4",
        "--mesh.expert",
        "4",
    ]
    found = planned(tmp_path, "configs/qwen3_30b_a3b.py", "--topology", "v5p:2x2x4", *words)
    held = found["bytes_per_device"]
    assert found["fits"] and found["peak_bytes_per_device"] < 400 * 2**20
    assert held["optimizer"] == pytest.approx(2 * held["weights"], rel=0.01)
    kinds = {(one["kind"], *one["axes"]) for one in found["collectives"] if one["bytes"] > 2**20}
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-to-all", "expert")} <= kinds
    assert ("all-reduce", "fsdp") not in kinds, "weights are gathered and their gradients scattered"
    looped = {one["kind"] for one in found["over_all_devices"] if one["looped"]}
    assert looped <= {"all-gather", "reduce-scatter"}, "weights alone, and their gradients"
    assert 0 < found["mfu_low"] <= found["mfu_high"] <= 1
    assert found["worst_routing"]["rounds"] > 1
    assert f"in loops: {', '.join(sorted(looped)) or 'nothing'}." in found["said"]


@needs_compiler
def test_a_step_that_does_not_fit(tmp_path: Path) -> None:
    words = ["--model.vocab-size", "32768", "--model.max-positions", "8192", "--data.sequence-length", "8192"]
    found = planned(tmp_path, "configs/tiny.py", "--topology", "v5e:1x1", *words, "--data.batch-size", "256")
    assert not found["fits"] and found["peak_bytes_per_device"] > found["limit_bytes_per_device"]
    assert "It does not fit" in found["said"] and found["largest_arrays"][0]["bytes"] > 2**30


@needs_compiler
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_step_of_generation(mode: str, tmp_path: Path) -> None:
    words = ["--mode", mode, "--rows", "8", "--context", "256", "--model.vocab-size", "512", "--mesh.tensor", "2"]
    found = planned(tmp_path, "configs/tiny.py", "--topology", "v6e:1x2", *words)
    assert found["fits"] and found["bytes_per_device"]["cache"] > 0
    assert "all-reduce" in {one["kind"] for one in found["collectives"]}
