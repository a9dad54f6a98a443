"""`python -m bench.plan`: the named configs of `configs/` compiled for the TPUs that they are for, as one table.

Needs `pip install 'qmax[plan]'` on Python 3.12 or later. Memory and collectives are the TPU compiler's; times are the
model of `train/plan_time.py`, and no TPU was touched. Minutes for each on two cores. `--maxtext-python` compiles
MaxText's step of the same models for the same chips too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import plan_maxtext

GIB = 2**30
ROOT = Path(__file__).parents[1]

MAXTEXT = {
    "30B-A3B, v5p-32": ("qwen3-30b-a3b", "v5p-32", "v5p:2x2x4", 4, 4),
    "235B-A22B, v5p-256": ("qwen3-235b-a22b", "v5p-256", "v5p:4x4x8", 16, 8),
}
"""For plans that MaxText can make too: its names of model and chips, ours of the chips, fsdp and expert."""

SLICES = "--topology v6e:16x16 --slices 4 --mesh.data 4 --mesh.fsdp 16 --mesh.cut-over-data true"
V6E = f"{SLICES} --data.batch-size 1024 --data.sequence-length 2048"
INT8 = "--mode decode --weights int8 --mesh.fsdp 1"
SMALL = "--rows 64 --mesh.expert 8 --mesh.tensor 4"
LORA = "--lora.rank 16 --parameter-dtype bfloat16 --mesh.fsdp 8 --data.batch-size 128"
PLANS: dict[str, tuple[str, float | None]] = {
    "30B-A3B, v5p-32": ("qwen3_30b_a3b.py --topology v5p:2x2x4", None),
    "30B-A3B, v6e-64": ("qwen3_30b_a3b.py --topology v6e:8x8 --mesh.fsdp 16 --data.batch-size 64", None),
    "235B-A22B, v5p-256": ("qwen3_235b_a22b.py --topology v5p:4x4x8", None),
    "235B-A22B, tpu7x-128": ("qwen3_235b_a22b.py --topology tpu7x:4x4x4", None),
    "1T, v5p 2,048 chips": ("qwen3_max_1t.py --topology v5p:8x16x16", 24),
    "1T, v6e 4 x 256": (f"qwen3_max_1t.py {V6E}", 30),
    "1T, tpu7x 256 chips": ("qwen3_max_1t.py --topology tpu7x:4x8x8 --mesh.fsdp 32 --data.batch-size 512", 45),
    "1T with 4 layers, v5p 2,048 chips": ("qwen3_max_1t.py --topology v5p:8x16x16 --model.num-layers 4", None),
    "1T decoding, int8, v5p 64 chips": (f"qwen3_max_1t.py --topology v5p:4x4x4 {INT8} --mesh.tensor 4", None),
    "2.4T-A95B, v5p 512 chips": ("qwen3_8_max.py --topology v5p:8x8x8", None),
    "2.4T-A95B, LoRA, v5p 128 chips": (f"qwen3_8_max.py --topology v5p:4x4x8 {LORA}", None),
    "2.4T-A95B decoding, int8, v5p 32 chips": (f"qwen3_8_max.py --topology v5p:2x4x4 {INT8} {SMALL}", None),
    "30B-A3B, 262,144 tokens": ("qwen3_30b_long.py --topology v5p:4x4x4", None),
}
"""Words after `qmax plan configs/`, and the most GiB per device that the step should need."""

HEADER = ("plan", "peak GiB (mark)", "fits", "MFU, modelled", "worst routing", "over all devices in loops", "compiled")


def measure(words: str) -> dict[str, Any]:
    """One plan, in a process of its own; `error` if there is none."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "plan.json"
        command = [sys.executable, "qmax.py", "plan", *f"configs/{words}".split(), "--json", str(out)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1:]}
        return json.loads(out.read_text())


def row(name: str, found: dict[str, Any], mark: float | None) -> list[str]:
    """A line of the table."""
    if "error" in found:
        return [name, *found["error"], *[""] * (len(HEADER) - 2)]
    peak = found["peak_bytes_per_device"]
    words = f"{peak / GIB:.1f}" if peak else "unknown"
    worst = found.get("worst_routing", {})
    looped = {one["kind"] for one in found.get("over_all_devices", []) if one["looped"]}
    mfu = f"{found['mfu_low']:.0%} to {found['mfu_high']:.0%}" if "mfu_low" in found else "-"
    return [
        name,
        f"{words} ({mark:g})" if mark else words,
        "yes" if found["fits"] else "no",
        mfu,
        f"{worst['rounds']} rounds" if worst else "-",
        ", ".join(sorted(looped)) or "nothing",
        f"{found['compile_seconds']:.0f} s",
    ]


def beside(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Our plan beside MaxText's, as sentences."""
    if "error" in theirs or "modelled" not in ours:
        return f"MaxText: {theirs.get('error')}"
    own = {
        "peak_bytes_per_device": ours["peak_bytes_per_device"],
        "compile_seconds": ours["compile_seconds"],
        "matrix_seconds": ours["modelled"]["matrix"],
        "unstated_seconds": ours["modelled"]["unstated"],
        "collective_bytes": plan_maxtext.bytes_by_kind(ours["collectives"]),
    }

    def words(one: dict[str, Any]) -> str:
        sent = ", ".join(
            f"{kind} {size / GIB:.1f}" for kind, size in one["collective_bytes"].items() if size > GIB / 10
        )
        return (
            f"{one['peak_bytes_per_device'] / GIB:.1f} GiB; beside kernels {one['matrix_seconds']:.3g} s of cycles and "
            f"{one['unstated_seconds']:.3g} s of bytes; GiB sent: {sent}; {one['compile_seconds']:.0f} s to compile"
        )

    return f"  ours:    {words(own)}\n  MaxText: {words(theirs)}"


def main() -> int:
    """Compiles what was asked for and prints the table as it grows."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--only", default="", help="those whose name holds this")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--maxtext-python", default="", help="an interpreter that has MaxText")
    args = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    found: dict[str, Any] = {}
    for name, (words, mark) in PLANS.items():
        if args.only in name:
            found[name] = measure(words)
            print("| " + " | ".join(row(name, found[name], mark)) + " |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))
    for name, words in MAXTEXT.items() if args.maxtext_python else ():
        if name in found:
            theirs = found[name]["maxtext"] = plan_maxtext.measure(args.maxtext_python, *words)
            print(f"\n{name}\n{beside(found[name], theirs)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    print("\nBy", next((one["compiler"] for one in found.values() if "compiler" in one), "no compiler"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
