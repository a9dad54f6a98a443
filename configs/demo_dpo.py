"""The preference half of `qmax demo`: DPO (arXiv 2305.18290) on pairs of replies, from the instruct model.

Hardware: 2 CPU cores, about a minute. Expected: of held-out pairs it tells nearly all apart; at first half.

    ./run.sh train configs/demo_dpo.py --init-from runs/demo/sft
"""

from dataclasses import replace

from configs import demo
from configs.alignment import PreferenceConfig
from configs.run import CheckpointConfig, OptimizerConfig, Run


def run() -> Run:
    """The model of configs/demo_sft.py; the rejected reply is the plain answer, the chosen one a more polite one."""
    base = demo.run()
    return replace(
        base,
        objective="dpo",
        data=replace(
            base.data,
            sources=(str(demo.TEXT / "preferences_en.jsonl.gz"),),
            weights=(),
            validation=(),
            validation_fraction=0.1,
            too_long="drop",
        ),
        preference=PreferenceConfig(sft=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5, beta2=0.98),
        checkpoint=CheckpointConfig(every=50),
        steps=60,
        validate_every=30,
        validation_batches=8,
    )
