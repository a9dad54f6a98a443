"""The instruction-tuning half of `qmax demo`: the assistant's turns of short conversations.

Hardware: 2 CPU cores, about a minute and a half. Expected: loss on held-out answers about 3.5 nats per token.

    ./run.sh train configs/demo_sft.py --init-from runs/demo
"""

from dataclasses import replace

from configs import demo
from configs.run import CheckpointConfig, OptimizerConfig, Run

CONVERSATIONS = {
    "small_talk": 0.25,
    "instructions_en": 0.3,
    "alpaca_en": 0.15,
    "alpaca_zh": 0.08,
    "seed_tasks": 0.07,
    "translations": 0.15,
}
"""Share of each file; small talk gets several times what its size would give it."""


def run() -> Run:
    """The model of configs/demo.py, tuned from its last checkpoint."""
    base = demo.run()
    return replace(
        base,
        objective="sft",
        data=replace(
            base.data,
            sources=tuple(str(demo.TEXT / f"sft_{name}.jsonl.gz") for name in CONVERSATIONS),
            weights=tuple(CONVERSATIONS.values()),
            validation=(),
            validation_fraction=0.03,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10, beta2=0.98),
        checkpoint=CheckpointConfig(every=50),
        steps=150,
        validate_every=50,
        validation_batches=4,
    )
