"""The pretraining half of `qmax demo`: a small mixture of experts on stories, novels, poems and code.

Hardware: 2 CPU cores, about 5 minutes. Expected: held-out loss about 4.4 nats per token (about 2 bits per byte).
`qmax demo` trains the tokenizer first and names it; alone:

    ./run.sh tokenizer configs/demo_data/pretrain_*.jsonl.gz --vocab-size 4096 --out runs/demo-tokenizer
    ./run.sh train configs/demo.py --data.tokenizer runs/demo-tokenizer
"""

from pathlib import Path

from configs.run import CheckpointConfig, DataConfig, LossConfig, OptimizerConfig, Run
from model.config import ModelConfig, MoEConfig

TEXT = Path(__file__).parent / "demo_data"

MIXTURE = {
    "en_tinystories": 0.15,
    "en_sherlock": 0.09,
    "en_shakespeare": 0.07,
    "en_war_and_peace": 0.18,
    "fr_candide": 0.03,
    "fr_les_miserables": 0.08,
    "fr_germinal": 0.07,
    "zh_tang_poems": 0.07,
    "zh_red_chamber": 0.13,
    "code_python": 0.13,
}
"""Share of each file; the simple stories get five times what their size would give them."""


def run() -> Run:
    """6.4 M parameters in 4 layers, 16 experts of which each token uses 2."""
    return Run(
        model=ModelConfig(
            vocab_size=0,
            hidden_size=192,
            num_layers=4,
            num_heads=6,
            num_kv_heads=3,
            head_dim=32,
            moe=MoEConfig(num_experts=16, experts_per_token=2, intermediate_size=128),
            max_positions=1024,
        ),
        data=DataConfig(
            sources=tuple(str(TEXT / f"pretrain_{name}.jsonl.gz") for name in MIXTURE),
            weights=tuple(MIXTURE.values()),
            validation=(str(TEXT / "heldout.jsonl.gz"),),
            sequence_length=256,
            batch_size=8,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=30, final_fraction=0.05, beta2=0.98),
        loss=LossConfig(balance=0.01, router_z_loss=0.0001),
        checkpoint=CheckpointConfig(every=100),
        steps=500,
        validate_every=100,
        validation_batches=8,
    )
