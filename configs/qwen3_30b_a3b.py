"""Qwen3-30B-A3B, trained from nothing on 32 chips of v5p.

./run.sh plan configs/qwen3_30b_a3b.py --topology v5p:2x4x4
"""

from configs.run import DataConfig, OptimizerConfig, Run
from model.sizes import named
from sharding.mesh import MeshConfig


def run() -> Run:
    """4,096 tokens on each chip."""
    return Run(
        model=named("Qwen3-30B-A3B"),
        data=DataConfig(sources=("data/*.jsonl.zst",), tokenizer="tokenizer", sequence_length=4096, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=8, expert=4),
        remat="block",
        layers="stacked",
        steps=100_000,
    )
