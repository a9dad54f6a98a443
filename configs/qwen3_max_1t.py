"""A model of the shape of Qwen3-Max, of a trillion parameters, trained from nothing on 2,048 chips of v5p.

    ./run.sh plan configs/qwen3_max_1t.py --topology v5p:8x16x16
    ./run.sh plan configs/qwen3_max_1t.py --topology v6e:16x16 --slices 4 --mesh.data 4 --mesh.fsdp 16 \\
        --mesh.cut-over-data true --data.batch-size 1024 --data.sequence-length 2048
    ./run.sh plan configs/qwen3_max_1t.py --topology tpu7x:4x8x8 --mesh.fsdp 32 --data.batch-size 512
    ./run.sh plan configs/qwen3_max_1t.py --topology v5p:4x4x4 --mode decode --weights int8 --mesh.fsdp 1 \\
        --mesh.tensor 4

By libtpu 0.0.52 for v5p: 22.6 GiB per device at the peak (weights 2.0, optimizer 2.0, within a step 18.7), whatever the
routing; no all-reduce of all devices in a loop; 30 % to 48 % MFU by the plan's model of the time. On v6e, where each
layer's weights come from the other slices when it is its turn, 23.5 GiB and 7 % to 10 %; on tpu7x 44.6 GiB and 19 % to
36 %. Decoding 256 rows of 8,192 positions on 64 chips of v5p with weights in 8 bits: 26.5 GiB.
"""

from configs.run import DataConfig, OptimizerConfig, Run
from model.config import ModelConfig, MoEConfig, RopeConfig
from sharding.mesh import MeshConfig


def run() -> Run:
    """4,096 tokens on each chip."""
    return Run(
        model=ModelConfig(
            vocab_size=155_648,
            hidden_size=8192,
            num_layers=64,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            moe=MoEConfig(num_experts=256, experts_per_token=8, intermediate_size=2560),
            rope=RopeConfig(theta=1e6),
            max_positions=262_144,
        ),
        data=DataConfig(sources=("data/*.jsonl.zst",), tokenizer="tokenizer", sequence_length=4096, batch_size=2048),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=MeshConfig(fsdp=128, expert=16),
        remat="block",
        layers="stacked",
        steps=100_000,
    )
