"""Qwen3-30B-A3B, a stage of sequences of 262,144 tokens on 64 chips of v5p: each sequence is cut over 16 of them.

    ./run.sh plan configs/qwen3_30b_long.py --topology v5p:4x4x4

By libtpu 0.0.52: 18.3 GiB per device at the peak, 10 % MFU by the plan's model of the time. Attention along the ring is
no kernel yet, and takes most of it.
"""

from configs.run import DataConfig, OptimizerConfig, Run
from model.sizes import named
from sharding.mesh import MeshConfig


def run() -> Run:
    """16,384 tokens on each chip: four sequences at a time."""
    return Run(
        model=named("Qwen3-30B-A3B-2507"),
        data=DataConfig(sources=("data/*.jsonl.zst",), tokenizer="tokenizer", sequence_length=262_144, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=200),
        mesh=MeshConfig(fsdp=4, context=16),
        remat="block",
        layers="stacked",
        steps=2000,
    )
