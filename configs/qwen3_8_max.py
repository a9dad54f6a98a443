"""Qwen3.8-2.4T-A95B, trained on in full on 512 chips of v5p, 4,096 tokens on each.

    ./run.sh plan configs/qwen3_8_max.py --topology v5p:8x8x8

Not compiled whole yet: ask `qmax plan`.
"""

from configs.run import DataConfig, OptimizerConfig, Run
from model.sizes import named
from sharding.mesh import MeshConfig


def run() -> Run:
    """4,096 tokens on each chip; moments in bfloat16."""
    return Run(
        model=named("Qwen3.8-2.4T-A95B"),
        data=DataConfig(sources=("data/*.jsonl.zst",), tokenizer="tokenizer", sequence_length=4096, batch_size=512),
        optimizer=OptimizerConfig(learning_rate=0.0001, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=MeshConfig(fsdp=32, expert=16),
        remat="block",
        layers="stacked",
        steps=100_000,
    )
