"""`qmax demo`: raw text to a chatting mixture of experts, and what reward teaches, on a laptop, in minutes.

Each stage is what its own verb does; a stage that is done is not done again, so a demo that was stopped goes
on when it is called again.
"""

from __future__ import annotations

import glob
import gzip
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs import arithmetic, arithmetic_gspo, demo, demo_dpo, demo_sft
from configs.run import Run
from terminal import Parser, write_json

STAGES = "pretrain", "sft", "dpo", "arithmetic", "gspo"
PROMPT = "Hello!"
STORY = "Once upon a time"
QUESTIONS = (PROMPT, "What is the capital of France?", "Translate into Chinese: I am happy.")
SHADES = " ░▒▓█"
BARS = "▁▂▃▄▅▆▇█"


def demo_main(argv: list[str]) -> int:
    """The verb. Returns the exit code."""
    from train.report import write_report

    parser = Parser(
        "demo",
        "Trains a tokenizer, a mixture of experts and its instruct version on the text in configs/demo_data, chats\n"
        "with it, and lets models learn from preferences and from reward: about 13 minutes on two cores. Called\n"
        "again, it goes on where it stopped.",
        ["qmax demo", "qmax demo --fast --out /tmp/demo"],
    )
    parser.add_argument(
        "--out", metavar="DIR", default="runs/demo", help="where everything goes (default: %(default)s)"
    )
    parser.add_argument("--fast", action="store_true", help="a part of the steps, for a look in under four minutes")
    args = parser.parse_args(argv)
    started = time.monotonic()
    out = Path(args.out)
    if args.fast:
        out = out.with_name(out.name + "-fast") if args.out == "runs/demo" else out
    summary = run_demo(out, fast=args.fast)
    page = write_report(*(out / stage for stage in STAGES))
    summary["seconds"] = round(time.monotonic() - started, 1)
    write_json(out / "summary.json", summary)
    tell(f"\nAll of it took {summary['seconds']:.0f} s. Summary: {out / 'summary.json'}")
    tell(f"Chat with it:  qmax chat {out / 'sft'}")
    tell(f"Look at it:    open {page}")
    return 0


def tell(text: str) -> None:
    """One line for the person at the terminal."""
    print(text, flush=True)


def run_demo(out: Path, *, fast: bool) -> dict[str, Any]:
    """All stages; returns what goes into `summary.json`."""
    vocabulary = 2048 if fast else 4096
    tokens = make_tokenizer(out / "tokenizer", vocabulary)
    pretrain, sft = demo.run(), demo_sft.run()
    if fast:
        pretrain, sft = (shortened(run) for run in (pretrain, sft))
    pretrain = replace(pretrain, data=replace(pretrain.data, tokenizer=str(out / "tokenizer")))
    # The instruct run takes tokenizer and weights from the pretrained one.
    sft = replace(sft, init_from=str(out / "pretrain"))
    summary: dict[str, Any] = {"tokenizer": {"vocab_size": tokens}}

    tell(
        f"\n2. Pretraining: {pretrain.steps} steps of {pretrain.data.batch_size * pretrain.data.sequence_length} tokens"
    )
    records = train_stage(pretrain, out / "pretrain")
    summary["pretrain"] = stage_summary(records) | {
        "tokens": sum(r["tokens"] for r in records),
        "tokens_per_second": records[-1].get("tokens_per_second"),
        "expert_load_max_over_mean": records[-1]["expert_load_max_over_mean"],
    }
    show_load(records[-1]["expert_load"])
    summary["heldout"] = compare(records[-1]["bits_per_byte"], pretrain)
    before = generations(out / "pretrain")

    tell(f"\n3. Instruction tuning: {sft.steps} steps on the assistant's turns")
    records = train_stage(sft, out / "sft")
    summary["sft"] = stage_summary(records) | {"validation_loss": records[-1].get("validation_loss")}

    tell("\n4. The same prompts, before and after instruction tuning")
    after = generations(out / "sft")
    for prompt, old, new in zip((STORY, *QUESTIONS), before, after, strict=True):
        tell(f"\n  {prompt}\n    before: {one_line(old)}\n    after:  {one_line(new)}")
    summary["chat"] = {"prompt": PROMPT, "reply": after[1]}
    tell(f"\n5. A chat turn\n  you:  {PROMPT}\n  qmax: {one_line(after[1])}")
    return summary | align(out, fast=fast)


def align(out: Path, *, fast: bool) -> dict[str, Any]:
    """The stages that learn from preferences and from reward."""
    dpo = replace(demo_dpo.run(), init_from=str(out / "sft"))
    wrong, gspo = arithmetic.run(), replace(arithmetic_gspo.run(), init_from=str(out / "arithmetic"))
    if fast:
        dpo = replace(dpo, steps=dpo.steps // 2)
        wrong, gspo = (
            replace(wrong, steps=2 * wrong.steps // 5, validate_every=0),
            replace(gspo, steps=gspo.steps // 10),
        )
    tell(f"\n6. Preferences (DPO): {dpo.steps} steps on pairs of replies, one more polite than the other")
    records = train_stage(dpo, out / "dpo")
    found = [record["validation_accuracy"] for record in records if "validation_accuracy" in record]
    summary: dict[str, Any] = {"dpo": {"preference_accuracy_before": found[0], "preference_accuracy_after": found[-1]}}
    tell(f"   held-out pairs told apart: {found[0]:.0%} before, {found[-1]:.0%} after")

    tell(f"\n7. Reward (GSPO): a model that learnt wrong sums, {wrong.steps} steps, then {gspo.steps} steps of reward")
    train_stage(wrong, out / "arithmetic")
    records = train_stage(gspo, out / "gspo")
    found = [record["validation_reward"] for record in records if "validation_reward" in record]
    gap = max(record["logprob_gap_max"] for record in records if "logprob_gap_max" in record)
    summary["gspo"] = {"accuracy_before": found[0], "accuracy_after": found[-1], "logprob_gap_max": gap}
    tell(f"   held-out sums right: {found[0]:.0%} before, {found[-1]:.0%} after; {curve(found)}")
    tell(f"   sampler and trainer differ by at most {gap:.1e} in the log-probability of a token")
    return summary


def curve(values: list[float]) -> str:
    """Numbers from 0 to 1 as a line of bars."""
    return "".join(BARS[min(len(BARS) - 1, int(value * len(BARS)))] for value in values)


def shortened(run: Run) -> Run:
    """A run of a fifth of the steps."""
    return replace(run, steps=run.steps // 5, validate_every=0, optimizer=replace(run.optimizer, warmup_steps=10))


def make_tokenizer(directory: Path, size: int) -> int:
    """Trains the tokenizer unless it is there; returns its vocabulary size."""
    from model.tokenizer import Tokenizer
    from model.tokenizer_training import train_tokenizer
    from train.data.sources import read_documents

    tell("1. Tokenizer")
    if (directory / "tokenizer.model").is_file():
        return Tokenizer.load(directory).vocab_size
    files = sorted(glob.glob(str(demo.TEXT / "pretrain_*.jsonl.gz")))
    tokenizer = train_tokenizer(read_documents(files, max_bad_rows=0), size, directory)
    sample = STORY + ", 床前明月光。"
    pieces = "|".join(tokenizer.decode([token]) for token in tokenizer.encode(sample))
    tell(f"   {tokenizer.vocab_size} pieces; {sample} -> {pieces}")
    return tokenizer.vocab_size


def train_stage(run: Run, out: Path) -> list[dict[str, Any]]:
    """Trains, or goes on training; returns the records of all steps."""
    from train.main import train_run
    from train.metrics import read_metrics
    from train.report import write_report

    result = train_run(run, out, resume=out.exists())
    if result["stopped"]:
        sys.exit(0)
    write_report(out)
    return read_metrics(out)


def stage_summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps and losses; the losses are means over the first and last five steps, less jumpy than single ones."""
    losses = [record["loss"] for record in records]
    first, last = (sum(part) / len(part) for part in (losses[:1], losses[-5:]))
    return {"steps": records[-1]["step"], "loss_first": first, "loss_last": last}


def compare(bits: float, run: Run) -> dict[str, float]:
    """Held-out bits per byte of the model beside what it has to beat, as a table."""
    from train.baselines import gzip_bits_per_byte, trigram_bits_per_byte

    heldout = raw_text(run.data.validation)
    found = {
        "bits_per_byte": bits,
        "gzip_bits_per_byte": gzip_bits_per_byte(heldout),
        "trigram_bits_per_byte": trigram_bits_per_byte(raw_text(run.data.sources), heldout),
    }
    tell("\n   Held-out text, bits per byte (less is better)")
    for name, value in zip(("this model", "gzip -9", "3-gram of bytes"), found.values(), strict=True):
        tell(f"   {name:<16} {value:5.2f}  {'█' * round(value * 10)}")
    return found


def raw_text(files: tuple[str, ...]) -> bytes:
    """The text of `.jsonl.gz` files, documents joined by newlines."""
    texts: list[str] = []
    for name in files:
        with gzip.open(name, "rt", encoding="utf-8") as rows:
            texts += [json.loads(row)["text"] for row in rows]
    return "\n".join(texts).encode()


def generations(run: Path) -> list[str]:
    """A greedy continuation of a story and replies to questions."""
    from model.load import load_model
    from serve.engine import Engine
    from serve.sampling_params import SamplingParams

    model, tokenizer = load_model(run)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [tokenizer.encode(STORY)]
    prompts += [tokenizer.encode_chat(chat, add_generation_prompt=True, enable_thinking=False) for chat in chats]
    params = SamplingParams(temperature=0.0, max_tokens=40)
    completions = Engine(model, tokenizer).generate(prompts, params)
    return [tokenizer.decode(completion.content, skip_specials=True).strip() for completion in completions]


def one_line(text: str) -> str:
    """`text` on one line, no wider than the terminal."""
    width = max(40, shutil.get_terminal_size().columns - 14)
    joined = " ".join(text.split())
    return joined if len(joined) <= width else joined[: width - 1] + "…"


def show_load(load: list[list[float]]) -> None:
    """The expert load of the last step: a row per layer, a shade per expert; ▒ is an even share."""
    tell("\n   Expert load: a row per layer, a column per expert (▒ is an even share, █ twice that or more)")
    for layer, row in enumerate(load):
        cells = "".join(SHADES[min(4, round(value * 2))] * 2 for value in row)
        tell(f"   layer {layer}  {cells}  busiest {max(row):.2f}")
