"""`qmax plan CONFIG --topology v5p:4x4x8`: the step that `qmax train` runs, compiled for TPUs that are not here."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from configs.override import apply_overrides, load_config
from configs.run import Run
from errors import UserError
from sharding.topology import Chip, absent_devices, find_chip
from terminal import Parser, human_bytes, print_table, write_json

KERNEL_SHARE = 0.7
"""Of its peak, what a grouped matrix product is assumed to reach: the compiler states no cycles for kernels."""

COMPILER = {"xla_tpu_enable_ragged_dot_kernel": "true"}
"""Without it some generations multiply every row with every expert."""


def plan_main(argv: list[str]) -> int:
    """Runs the verb; returns its exit code. 0 also where the step does not fit: that is an answer."""
    args, words = make_parser().parse_known_args(argv)
    from sharding.runtime import configure_jax

    run = apply_overrides(load_config(args.config), words)
    chip = find_chip(args.topology)
    configure_jax()
    found = plan(run, absent_devices(args.topology, args.slices), chip, args.tokens)
    show(found, args.topology, args.slices)
    if args.json:
        write_json(args.json, found)
    return 0


def make_parser() -> Parser:
    """What the verb takes."""
    parser = Parser(
        "plan",
        "Compiles the training step of CONFIG with the TPU compiler, for chips that are not here, and says whether it\n"
        "fits, where its bytes go and what it sends. Needs `pip install 'qmax[plan]'`. Any field of the config can be\n"
        "given another value. Memory and collectives are the compiler's; times are a model of it, and marked so.",
        ["qmax plan configs/qwen3_30b_a3b.py --topology v5p:2x4x4 --mesh.fsdp 8 --mesh.expert 4"],
    )
    parser.add_argument("config", metavar="CONFIG", help="the config, as `qmax train` takes it")
    parser.add_argument("--topology", required=True, help="generation and shape of a slice, such as v5p:4x4x8")
    parser.add_argument("--slices", type=int, default=1, help="slices, one after the other along `data` (default: 1)")
    parser.add_argument("--tokens", type=float, default=0.0, help="tokens to train on, for the hours that it takes")
    parser.add_json()
    return parser


def plan(run: Run, devices: Sequence[Any], chip: Chip, tokens: float = 0.0) -> dict[str, Any]:
    """Compiles the step and reads the compiler's figures.

    Raises:
        UserError: the mesh is not that of the devices, or the config leaves sizes open.
    """
    if run.init_model == "source" or not run.model.vocab_size:
        raise UserError("the config leaves sizes to its tokenizer or source; give model.vocab_size and the sizes")
    if run.mesh.num_devices != len(devices):
        sizes = " x ".join(f"{name}={size}" for name, size in run.mesh.sizes.items())
        raise UserError(f"the mesh {sizes} is of {run.mesh.num_devices} devices and the topology has {len(devices)}")
    run = replace(
        run,
        dtype="bfloat16" if run.dtype == "auto" else run.dtype,
        layers="stacked" if run.layers == "auto" else run.layers,
    )
    start = time.perf_counter()
    lowered, state_bytes = lower(run, devices)
    found: dict[str, Any] = {
        "parameters_total": run.model.parameters_total,
        "parameters_active": run.model.parameters_active,
        "devices": len(devices),
        "mesh": run.mesh.sizes,
        "tokens_per_step": run.data.batch_size * run.data.sequence_length,
        "state_bytes_per_device": state_bytes,
        "limit_bytes_per_device": int(chip.limit),
    }
    try:
        compiled = lowered.compile(compiler_options=COMPILER)
    except Exception as exc:
        return found | refused(exc) | {"compile_seconds": time.perf_counter() - start}
    found["compile_seconds"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    found["peak_bytes_per_device"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    found["temporary_bytes_per_device"] = memory.temp_size_in_bytes
    found["fits"] = found["peak_bytes_per_device"] <= chip.limit
    return found | step_time(run, chip, compiled.as_text(), tokens)


def lower(run: Run, devices: Sequence[Any]) -> tuple[Any, int]:
    """The step of `run`, lowered for `devices`, and the bytes of state that each of them holds."""
    import jax
    import numpy as np

    from sharding.mesh import make_mesh
    from sharding.rules import batch_sharding
    from train.losses import next_token
    from train.optimizer import make_optimizer
    from train.state import abstract_state, make_skeleton
    from train.step import make_train_step

    mesh = make_mesh(run.mesh, devices)
    # The program is made for the devices of this mesh, not for those that jax finds here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        skeleton = make_skeleton(run)
        optimizer = make_optimizer(run.optimizer, run.steps, skeleton)
        state = abstract_state(run, skeleton, optimizer, mesh)
        shape = (run.data.batch_size, run.data.sequence_length)
        kinds = dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32) | {"weights": np.float32}
        batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(mesh)) for name, kind in kinds.items()}
        step = make_train_step(run, skeleton, lambda m, r, t, b: next_token(m, r, t, b, run.loss), optimizer)
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    leaves = jax.tree.leaves(state)
    return lowered, sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def refused(exc: Exception) -> dict[str, Any]:
    """What the compiler says of a program that does not fit; any other failure goes on."""
    words = " ".join(str(exc).split())
    if "RESOURCE_EXHAUSTED" not in words and "Oom" not in words:
        raise exc
    used = re.search(r"Used ([\d.]+)([KMGT]) of", words)
    peak = float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]] if used else None
    return {"fits": False, "peak_bytes_per_device": peak, "refusal": words[:2000], "collectives": []}


def step_time(run: Run, chip: Chip, text: str, tokens: float) -> dict[str, Any]:
    """Collectives, and a model of the time of a step.

    The matrix core's time: the compiler's cycles, and for kernels without an estimate the operations of the experts
    at `KERNEL_SHARE` of the peak. High: all communication is hidden behind it; low: none.
    """
    from train.hlo import read_program

    program = read_program(text, run.mesh.sizes)
    per_step = run.data.batch_size * run.data.sequence_length
    needed = 3 * per_step * run.model.flops_per_token(run.data.sequence_length / 2) / run.mesh.num_devices
    moe = run.model.moe
    expert_flops = 0.0
    if moe.num_experts and program.kernels:
        passes = 4 if run.remat != "none" else 3
        per_token = 6 * run.model.hidden_size * moe.intermediate_size * moe.experts_per_token
        expert_flops = passes * per_step * per_token * run.model.num_moe_layers / run.mesh.num_devices
    busy = program.cycles / chip.clock + expert_flops / (KERNEL_SHARE * chip.flops)
    sent = sum(moved(one) for one in program.collectives) / chip.links
    low, high = (needed / chip.flops / max(seconds, 1e-12) for seconds in (busy + sent, max(busy, sent)))
    found: dict[str, Any] = {
        "collectives": [vars(one) for one in program.collectives],
        "kernels": dict(program.kernels),
        "modelled": {"core_seconds": busy, "communication_seconds": sent, "needed_seconds": needed / chip.flops},
        "mfu_low": min(low, 1.0),
        "mfu_high": min(high, 1.0),
        "tokens_per_second": [per_step / (busy + sent), per_step / max(busy, sent)],
    }
    chips = run.mesh.num_devices / chip.per_chip
    found["chip_hours"] = [tokens / rate / 3600 * chips for rate in reversed(found["tokens_per_second"])]
    return found


def moved(collective: Any) -> float:
    """Bytes that a device sends for a collective, on a ring."""
    if collective.devices < 2:
        return 0.0
    share = (collective.devices - 1) / collective.devices
    return collective.bytes * share * (2 if collective.kind == "all-reduce" else 1)


def show(found: dict[str, Any], topology: str, slices: int) -> None:
    """The plan as tables."""
    limit = found["limit_bytes_per_device"]
    where = f"{slices} x {topology}" if slices > 1 else topology
    peak = found["peak_bytes_per_device"]
    rows = [
        ["parameters", f"{found['parameters_total']:,}"],
        ["of them active", f"{found['parameters_active']:,}"],
        ["devices", f"{found['devices']:,} ({where})"],
        ["mesh", ", ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1) or "one device"],
        ["tokens per step", f"{found['tokens_per_step']:,}"],
        ["weights and optimizer", f"{human_bytes(found['state_bytes_per_device'])} per device"],
        ["peak", f"{human_bytes(peak) if peak else 'unknown'} of {human_bytes(limit)} per device"],
        ["fits", "yes" if found["fits"] else "no"],
        ["compiled in", f"{found['compile_seconds']:.0f} s"],
    ]
    if "mfu_low" in found:
        rate = found["tokens_per_second"]
        rows += [
            ["MFU, modelled", f"{found['mfu_low']:.0%} (nothing hidden) to {found['mfu_high']:.0%} (all hidden)"],
            ["tokens per second, modelled", f"{rate[0]:,.0f} to {rate[1]:,.0f}"],
        ]
        if found["chip_hours"][1]:
            rows.append(["chip hours, modelled", "{:,.0f} to {:,.0f}".format(*found["chip_hours"])])
    print_table(rows)
    if not found["fits"] and "refusal" in found:
        print(
            f"\nThe compiler refuses it: {found['refusal'][:600]}\nLower data.batch_size, raise mesh.fsdp or set "
            "remat to block."
        )
    if found["collectives"]:
        print()
        print_table(
            [
                [
                    one["kind"],
                    " x ".join(one["axes"]) or "-",
                    one["devices"],
                    one["count"],
                    human_bytes(one["bytes"]),
                    "yes" if one["asynchronous"] else "no",
                ]
                for one in found["collectives"][:20]
            ],
            ("collective", "axes", "devices", "times", "bytes", "asynchronous"),
        )
