"""The MaxText side: its own trainer on synthetic data, run by an interpreter that has it; its log is read."""

from __future__ import annotations

import re
import subprocess
from typing import Any

from bench.shapes import Shape

STEP = re.compile(r"completed step: (\d+), seconds: ([\d.]+)")

WARM_STEPS = 3
"""Steps that are not counted: the log runs ahead of the first ones."""

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE", "TF_CPP_MIN_LOG_LEVEL": "3"}

PATHS = {"MaxText": "-1", "MaxText, dropping": "1.25"}
"""Capacity factors of its dense expert path, the faster one on a CPU. -1 computes every pair, as we and transformers
do; with 1.25, the fastest, pairs beyond an expert's capacity are dropped."""


def find(python: str) -> tuple[str, dict[str, str]]:
    """The trainer's base config and the versions, as the interpreter `python` has them.

    Raises:
        OSError, subprocess.SubprocessError: it does not run, or has no MaxText.
    """
    code = (
        "import importlib.metadata as m, importlib.util as u; "
        "print(u.find_spec('maxtext').submodule_search_locations[0], m.version('maxtext'), m.version('jax'))"
    )
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    folder, maxtext, jax = out.split()
    return f"{folder}/configs/base.yml", {"maxtext": maxtext, "jax of maxtext": jax}


def command(python: str, base: str, shape: Shape, capacity: str, repeats: int, folder: str) -> list[str]:
    """The command line that trains `shape` with a capacity factor of `PATHS` and writes to `folder`."""
    model, moe = shape.model, shape.model.moe
    settings: dict[str, Any] = {
        "model_name": "qwen3-30b-a3b",
        "override_model_config": "true",
        "run_name": "bench",
        "base_output_directory": folder,
        "hardware": "cpu",
        "skip_jax_distributed_system": "true",
        "dataset_type": "synthetic",
        "steps": WARM_STEPS + repeats,
        "enable_checkpointing": "false",
        "enable_goodput_recording": "false",
        "log_config": "false",
        "per_device_batch_size": shape.batch,
        "max_target_length": shape.seq,
        "base_emb_dim": model.hidden_size,
        "base_num_query_heads": model.num_heads,
        "base_num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "base_num_decoder_layers": model.num_layers,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "base_moe_mlp_dim": moe.intermediate_size,
        "base_mlp_dim": moe.intermediate_size,
        "vocab_size": model.vocab_size,
        "dtype": "float32",
        "weight_dtype": "float32",
        "matmul_precision": "highest",
        "attention": "dot_product",
        "sparse_matmul": "false",
        "capacity_factor": capacity,
        "remat_policy": "none",
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    return [python, "-m", "maxtext.trainers.pre_train.train", base, *words]


def read(shape: Shape, lines: list[tuple[float, str]]) -> dict[str, Any]:
    """The result in a log whose lines come with the time at which they came.

    Raises:
        ValueError: the log shows no steps.
    """
    steps = [(at, float(match[2])) for at, line in lines if (match := STEP.search(line))][WARM_STEPS:]
    if not steps:
        raise ValueError(next((line for _, line in reversed(lines) if line.strip()), "it printed nothing"))
    begin = steps[0][0] - steps[0][1]
    return {"rates": [shape.tokens / seconds for _, seconds in steps], "spans": [(begin, steps[-1][0])]}
