r"""The demo's model in English, taught French with tokens of its own: the vocabulary is extended and training goes on.

Every new token's rows begin as the mean of the rows of the old tokens that it replaces. A fifth of the text is English
again, so that English is not forgotten: its held-out loss is reported beside (`reference_loss`).

Hardware: 2 CPU cores, about 3 minutes for English and 2 for French. Expected: with 1,024 tokens more, French takes 0.34
tokens per character instead of 0.53. Bits per byte of held-out text, which vocabularies can be compared by:

                                      French   English
    English alone, old tokens          4.93     3.03
    English alone, larger tokens       3.78     3.17      new rows are means, nothing is learned yet
    200 steps more, larger tokens      2.13     2.87
    200 steps more, old tokens         2.44     2.89

    mkdir -p runs
    zcat configs/demo_data/heldout.jsonl.gz | grep -E ' (the|and) .* (the|and) ' > runs/heldout_en.jsonl
    zcat configs/demo_data/heldout.jsonl.gz | grep -E ' (les|une|dans) .* (les|une|dans) ' > runs/heldout_fr.jsonl
    ./run.sh tokenizer configs/demo_data/pretrain_en_*.jsonl.gz --vocab-size 2048 --out runs/english-tokens
    ./run.sh train configs/demo.py --data.tokenizer runs/english-tokens --data.weights= --steps 300 \
        --data.sources configs/demo_data/pretrain_en_*.jsonl.gz --data.validation runs/heldout_en.jsonl \
        --data.reference runs/heldout_fr.jsonl --out runs/english
    ./run.sh tokenizer configs/demo_data/pretrain_fr_*.jsonl.gz --extend runs/english --add 1024 \
        --out runs/larger-tokens
    ./run.sh train configs/demo_extended.py
"""

from configs import demo
from configs.run import CheckpointConfig, DataConfig, LossConfig, OptimizerConfig, Run

SHARES = {"fr": 0.8, "en": 0.2}
"""Share of each language."""


def run() -> Run:
    """The model of runs/english, whose sizes are not said again, with the tokens of runs/larger-tokens."""
    return Run(
        init_from="runs/english",
        init_model="source",
        data=DataConfig(
            sources=tuple(str(demo.TEXT / f"pretrain_{language}_*.jsonl.gz") for language in SHARES),
            weights=tuple(SHARES.values()),
            validation=("runs/heldout_fr.jsonl",),
            reference=("runs/heldout_en.jsonl",),
            tokenizer="runs/larger-tokens",
            sequence_length=256,
            batch_size=8,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, final_fraction=0.05, beta2=0.98),
        loss=LossConfig(balance=0.01, router_z_loss=0.0001),
        checkpoint=CheckpointConfig(every=100),
        steps=200,
        validate_every=50,
        validation_batches=8,
    )
