r"""The demo's mixture of experts, cut from a dense model instead of begun from nothing (upcycling).

Each dense feed-forward is copied, shuffled and cut into 16 experts; half of every expert's channels starts at random.
The dense model is the demo with a feed-forward of 256 channels, so that a token uses as many channels in both. Two
experts of 128 channels whose weights sum to one add up to half of what 256 channels do: `model.moe.scale` makes up
for it.

Hardware: 2 CPU cores, about 3 minutes for the dense model and 2 for the rest. Expected, held-out loss in nats per
token: 4.74 of the dense model after 300 steps; upcycled, 4.65 after 200 more (4.62 with nothing fresh); the same
mixture from nothing, 4.94 after 200; the dense model itself, 4.61 after 200 more: so few steps do not show what more
experts are good for, only that the start is not lost.

    ./run.sh tokenizer configs/demo_data/pretrain_*.jsonl.gz --vocab-size 4096 --out runs/demo-tokenizer
    ./run.sh train configs/demo.py --data.tokenizer runs/demo-tokenizer --steps 300 --out runs/dense \
        --model.moe.num-experts 0 --model.intermediate-size 256
    ./run.sh train configs/demo_upcycled.py
"""

from dataclasses import replace

from configs import demo
from configs.run import OptimizerConfig, Run


def run() -> Run:
    """The demo's model and text, from the weights of runs/dense."""
    base = demo.run()
    return replace(
        base,
        model=replace(base.model, moe=replace(base.model.moe, scale=2.0)),
        init_from="runs/dense",
        init_how="upcycle",
        upcycle_fresh=0.5,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, final_fraction=0.05, beta2=0.98),
        steps=200,
        validate_every=50,
    )
