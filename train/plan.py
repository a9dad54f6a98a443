"""`qmax plan CONFIG --topology v5p:4x4x8`: steps of training and generation, compiled for TPUs that are not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from configs.override import apply_overrides, load_config
from configs.run import Run
from errors import UserError
from sharding.topology import Chip, absent_devices, find_chip
from terminal import Parser, human_bytes, print_table, write_json


def plan_main(argv: list[str]) -> int:
    """Runs the verb; returns its exit code. 0 also where the step does not fit: that is an answer."""
    args, words = make_parser().parse_known_args(argv)
    from sharding.runtime import configure_jax

    run = apply_overrides(load_config(args.config), words)
    chip = find_chip(args.topology)
    run = complete(run)
    check(run, args)
    configure_jax()
    devices = absent_devices(args.topology, args.slices)
    if args.search:
        from train.plan_search import search

        found: dict[str, Any] = {"search": search(run, devices, chip, args, plan)}
        show_search(found["search"])
    else:
        found = plan(run, devices, chip, args)
        show(found, args)
    if args.json:
        write_json(args.json, found)
    return 0


def make_parser() -> Parser:
    """What the verb takes."""
    parser = Parser(
        "plan",
        "Compiles a step of CONFIG with the TPU compiler, for chips that are not here, and says whether it fits,\n"
        "where its bytes go, what it sends and what it may cost. Needs `pip install 'qmax[plan]'`. Any field of the\n"
        "config can be given another value. Memory and collectives are the compiler's; times are a model, marked so.",
        [
            "qmax plan configs/qwen3_30b_a3b.py --topology v5p:2x2x4",
            "qmax plan configs/qwen3_30b_a3b.py --topology v6e:8x8 --data.batch-size 64 --search 3",
            "qmax plan configs/qwen3_30b_a3b.py --topology v5p:2x2x1 --mode decode --rows 64 --mesh.fsdp 1",
        ],
    )
    parser.add_argument("config", metavar="CONFIG", help="the config, as `qmax train` takes it")
    parser.add_argument(
        "--topology", required=True, metavar="GEN:SHAPE", help="generation and shape of a slice, such as v5p:4x4x8"
    )
    parser.add_argument(
        "--slices", type=int, default=1, metavar="N", help="slices, along the mesh axis data (default: 1)"
    )
    parser.add_argument(
        "--mode", choices=("train", "prefill", "decode"), default="train", help="which step (default: train)"
    )
    parser.add_argument(
        "--rows", type=int, default=256, metavar="N", help="prefill, decode: rows at a time (default: 256)"
    )
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="prefill, decode: positions of a row (default: 8192)"
    )
    parser.add_argument(
        "--weights",
        choices=("same", "int8"),
        default="same",
        help="prefill, decode: how matrices are stored (default: same)",
    )
    parser.add_argument(
        "--tokens", type=float, default=1e12, metavar="N", help="a budget of tokens, for its cost (default: 1e12)"
    )
    parser.add_argument("--price", type=float, default=0.0, metavar="X", help="of a chip for an hour, in any money")
    parser.add_argument(
        "--search", type=int, default=0, metavar="N", help="try meshes, compile the N likeliest and rank them"
    )
    parser.add_json()
    return parser


def complete(run: Run) -> Run:
    """`run` with what a TPU decides.

    Raises:
        UserError: it leaves sizes open.
    """
    if run.init_model == "source" or not run.model.vocab_size:
        raise UserError("the config leaves sizes to its tokenizer or source; give model.vocab_size and the sizes")
    dtype = "bfloat16" if run.dtype == "auto" else run.dtype
    return replace(run, dtype=dtype, layers="stacked" if run.layers == "auto" else run.layers)


def check(run: Run, args: Any) -> None:
    """Refuses options that make no sense."""
    for name, least in (("slices", 1), ("rows", 1), ("context", 1), ("search", 0), ("tokens", 0), ("price", 0)):
        if not getattr(args, name) >= least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")
    if args.mode != "train" and args.context > run.model.max_positions:
        raise UserError(f"--context {args.context} is more than model.max_positions={run.model.max_positions}")
    if args.mode != "train" and args.rows % run.mesh.batch_shards:
        raise UserError(f"--rows {args.rows} do not divide over data x fsdp x expert = {run.mesh.batch_shards}")


def plan(run: Run, devices: Sequence[Any], chip: Chip, args: Any) -> dict[str, Any]:
    """Compiles the step and reads the compiler's figures.

    Raises:
        UserError: the mesh is not that of the devices.
    """
    if run.mesh.num_devices != len(devices):
        raise UserError(
            f"the mesh {run.mesh.words} is of {run.mesh.num_devices} devices and the topology has {len(devices)}"
        )
    from train.hlo import read_program
    from train.plan_programs import compile_program, lower
    from train.plan_time import costs, spans_of, step_time

    program = lower(run, devices, args.mode, args.rows, args.context, args.weights)
    compiled = compile_program(program)
    length = run.data.sequence_length if args.mode == "train" else args.context
    per_step, needed = work(run, args)
    found: dict[str, Any] = {
        "mode": args.mode,
        "parameters_total": run.model.parameters_total,
        "parameters_active": run.model.parameters_active,
        "devices": len(devices),
        "mesh": run.mesh.sizes,
        "tokens_per_step": per_step,
        "bytes_per_device": program.held | {"within a step": compiled.temporary},
        "state_bytes_per_device": sum(program.held.values()),
        "peak_bytes_per_device": compiled.peak,
        "limit_bytes_per_device": int(chip.limit),
        "fits": compiled.fits and compiled.peak is not None and compiled.peak <= chip.limit,
        "largest_arrays": [{"bytes": size, "shapes": shapes} for size, shapes in compiled.largest],
        "compile_seconds": compiled.seconds,
        "compiler": compiler(),
        "collectives": [],
    }
    if not compiled.text:
        return found
    spans = spans_of(program.mesh)
    each = len(devices)
    most = worst_rounds(run, per_step)
    for name, overflow in (("balanced", 0), ("worst", most)):
        read = read_program(compiled.text, run.mesh.sizes, overflow)
        time = step_time(read, run, spans, chip, per_step / each, length, needed / each)
        cost = costs(time, per_step, each, chip, args.tokens, args.price)
        if name == "balanced":
            found |= {
                "collectives": [vars(one) for one in read.collectives],
                "kernels": [vars(k) for k in read.kernels],
            } | cost
            found["over_all_devices"] = [vars(one) for one in read.collectives if one.devices == each > 1]
        else:
            found["worst_routing"] = {"rounds": most + 1} | {k: cost[k] for k in ("modelled", "tokens_per_second")}
    return found


def work(run: Run, args: Any) -> tuple[int, float]:
    """Tokens of a step, and the floating-point operations that it is for."""
    if args.mode == "train":
        tokens, length = run.data.batch_size * run.data.sequence_length, run.data.sequence_length
        # Of weights that are not trained no gradient is made: a third less.
        passes = 2 if run.lora.rank else 3
        return tokens, passes * tokens * run.model.flops_per_token(length / 2)
    if args.mode == "prefill":
        return args.rows * args.context, args.rows * args.context * run.model.flops_per_token(args.context / 2)
    return args.rows, args.rows * run.model.flops_per_token(args.context)


def worst_rounds(run: Run, tokens: int) -> int:
    """Rounds beyond the first if every token chooses the same experts. Memory is the same: buffers are always there."""
    from model.experts import ring_rows
    from sharding.expert_parallel import buffer_rows, chosen

    moe, mesh = run.model.moe, run.mesh
    if not moe.num_experts or mesh.expert == 1:
        return 0
    own = tokens // (mesh.batch_shards * mesh.context)
    pairs = own * moe.experts_per_token
    kind = chosen(mesh.exchange, mesh.expert, moe.experts_per_token)
    if kind == "dropping":
        return 0
    if kind == "all_to_all":
        return -(-own // buffer_rows(pairs / moe.num_experts, 8)) - 1
    return -(-pairs * mesh.expert // ring_rows(pairs * mesh.expert, mesh.expert)) - 1


def compiler() -> str:
    """Name and version of the TPU compiler."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"libtpu {version('libtpu')}, jax {version('jax')}"
    except PackageNotFoundError:
        return f"libtpu, jax {version('jax')}"


def show(found: dict[str, Any], args: Any) -> None:
    """The plan as tables."""
    where = f"{args.slices} x {args.topology}" if args.slices > 1 else args.topology
    peak, limit = found["peak_bytes_per_device"], found["limit_bytes_per_device"]
    kinds = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in found["bytes_per_device"].items() if size)
    rows = [
        ["step", f"{found['mode']}, {found['tokens_per_step']:,} tokens"],
        ["parameters", f"{found['parameters_total']:,}, {found['parameters_active']:,} of them active"],
        ["devices", f"{found['devices']:,} ({where})"],
        ["mesh", mesh_words(found["mesh"])],
        ["bytes per device", kinds],
        ["peak", f"{human_bytes(peak) if peak else 'unknown'} of {human_bytes(limit)} per device"],
        ["fits", "yes, whatever the routing" if found["fits"] else "no"],
        ["compiled in", f"{found['compile_seconds']:.0f} s by {found['compiler']}"],
    ]
    print_table(rows)
    if not found["fits"]:
        print("\n" + does_not_fit(found))
    if "modelled" in found:
        show_time(found, args)
    show_collectives(found)


def mesh_words(sizes: Mapping[str, int]) -> str:
    """A mesh for people."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


def does_not_fit(found: dict[str, Any]) -> str:
    """One sentence: how much too large, what is largest, and what to turn."""
    peak, limit = found["peak_bytes_per_device"], found["limit_bytes_per_device"]
    largest = "; ".join(f"{human_bytes(one['bytes'])} {one['shapes'][:80]}" for one in found["largest_arrays"][:3])
    knob = "lower data.batch_size, raise mesh.fsdp or mesh.context, or set remat to block"
    if found["mode"] != "train":
        knob = "lower --rows or --context, or raise mesh.tensor or mesh.expert"
    return (
        f"It does not fit: it needs {human_bytes(peak) if peak else 'more'} of {human_bytes(limit)} per device"
        + (f" (largest: {largest})" if largest else "")
        + f"; {knob}."
    )


def show_time(found: dict[str, Any], args: Any) -> None:
    """The terms of the time, and what they come to."""
    parts, worst = found["modelled"], found["worst_routing"]
    names = {
        "matrix": "matrix core, by the compiler's cycles",
        "kernels": "kernels, at 70 % of the peak",
        "unstated": "operations without a figure, by their bytes",
        "collectives": "communication",
        "asynchronous": "  of it beside other work",
    }
    print("\nModelled, not measured:")
    low, high = found["tokens_per_second"]
    print_table(
        [
            *([words, f"{parts[name]:.4g} s"] for name, words in names.items()),
            ["a step", f"{parts['step_low']:.4g} s (all communication hidden) to {parts['step_high']:.4g} s (none)"],
            ["a step, worst routing", f"to {worst['modelled']['step_high']:.4g} s in {worst['rounds']} rounds"],
            ["MFU", f"{found['mfu_low']:.0%} to {found['mfu_high']:.0%}"],
            ["tokens per second", f"{low:,.0f} to {high:,.0f}"],
            [f"{args.tokens:.3g} tokens", "{:,.0f} to {:,.0f} chip hours".format(*found["chip_hours"])],
            *([["", "{:,.0f} to {:,.0f} in money".format(*found["money"])]] if args.price else []),
            ["", "{:,.0f} to {:,.0f} MWh, roughly".format(*found["megawatt_hours"])],
        ]
    )


def show_collectives(found: dict[str, Any]) -> None:
    """What is sent, and what of it spans all devices."""
    if not found["collectives"]:
        return
    print()
    rows = [
        [
            one["kind"],
            " x ".join(one["axes"]) or "-",
            one["devices"],
            one["count"],
            human_bytes(one["bytes"]),
            "yes" if one["asynchronous"] else "no",
            "yes" if one["looped"] else "no",
        ]
        for one in found["collectives"][:20]
    ]
    print_table(rows, ("collective", "axes", "devices", "times", "bytes", "asynchronous", "in a loop"))
    looped = sorted({one["kind"] for one in found["over_all_devices"] if one["looped"]})
    all_bytes = human_bytes(sum(one["bytes"] for one in found["over_all_devices"]))
    print(f"\nOver all devices: {all_bytes} a step; in loops: {', '.join(looped) or 'nothing'}.")


def show_search(ranked: list[dict[str, Any]]) -> None:
    """The meshes that were compiled, the fastest first."""
    rows = [
        [
            mesh_words(one["mesh"]),
            human_bytes(one["peak_bytes_per_device"]) if one["peak_bytes_per_device"] else "unknown",
            "yes" if one["fits"] else "no",
            f"{one['mfu_low']:.0%} to {one['mfu_high']:.0%}" if "mfu_low" in one else "-",
        ]
        for one in ranked
    ]
    print_table(rows, ("mesh", "peak per device", "fits", "MFU, modelled"))
