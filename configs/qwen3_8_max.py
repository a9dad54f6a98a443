"""Qwen3.8-2.4T-A95B, trained on in full on 512 chips of v5p, 4,096 tokens on each.

    ./run.sh plan configs/qwen3_8_max.py --topology v5p:8x8x8
    ./run.sh plan configs/qwen3_8_max.py --topology v5p:4x4x8 --lora.rank 16 --parameter-dtype bfloat16 --mesh.fsdp 8 \\
        --data.batch-size 128
    ./run.sh plan configs/qwen3_8_max.py --topology v5p:2x4x4 --mode decode --weights int8 --rows 64 --mesh.fsdp 1 \\
        --mesh.expert 8 --mesh.tensor 4

By libtpu 0.0.52, GiB of 95.7 per device at the peak: in full on 512 chips 92.5, 23 % to 32 % MFU by the plan's model of
the time; adapters of rank 16 on 128 chips 69.9 (64 have no room for them), 18 % to 23 %; decoding 64 rows of 8,192
positions with weights in 8 bits on 32 chips 84.7.
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
