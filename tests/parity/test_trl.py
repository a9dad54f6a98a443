"""Law: from the same weights and token ids TRL's trainers and we have the same loss and gradients, of DPO and of SFT.

What TRL gives is what its trainers' own `compute_loss` gives, from a batch of its own collator, with two models of
transformers: one that is trained and one that is the reference. Our pairs lie packed in rows.
"""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from configs.alignment import PreferenceConfig
from configs.run import LossConfig
from model.tree import Skeleton
from train.data.packing import empty_row, put
from train.handover import logprobs_of
from train.losses import no_parts, totals
from train.preference import preference_loss

from . import carry, hf_models

pytestmark = [
    pytest.mark.skipif(os.environ.get("QMAX_PARITY") != "1", reason="./run.sh test --parity"),
    # What torch, transformers and TRL warn of is theirs to mend.
    pytest.mark.filterwarnings("default"),
]

TOLERANCE = 1e-4
PROMPTS, CHOSEN, REJECTED = (5, 3, 4), (6, 6, 6), (4, 9, 2)
"""Tokens of each pair. TRL's term of SFT is a mean over all chosen tokens of a batch, ours of each reply and then over
pairs (arXiv 2404.19733, equation 2); where chosen replies are as long as each other both are the same."""
NAMES = ["qwen3", "qwen3_moe"]


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@functools.cache
def pairs() -> list[Pair]:
    draw = np.random.RandomState(3)
    sizes = zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    return [Pair(*(draw.randint(1, 128, size).tolist() for size in one)) for one in sizes]


@functools.cache
def weights(name: str, seed: int) -> carry.Weights:
    """Those of the reference are near those of the model, as they are in a run."""
    drawn = carry.draw(hf_models.CASES[name].config, 1)
    other = carry.draw(hf_models.CASES[name].config, 2, deviation=0.02)
    return {path: array + seed * other[path] for path, array in drawn.items()}


# ---- theirs ------------------------------------------------------------------------------
def tokenizer(place: Path) -> Any:
    """Some tokenizer: trainers want one, though token ids are given to them."""
    from transformers import PreTrainedTokenizerFast

    from tests.text_fixtures import byte_tokenizer

    file = place / "tokenizer.json"
    file.write_bytes(byte_tokenizer().files["tokenizer.json"])
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|im_end|>", pad_token="<|endoftext|>")


def options(name: str, place: Path) -> dict[str, Any]:
    """What no loss depends on; and the balance loss, which `test_live` compares, left out."""
    return {
        "router_aux_loss_coef": 0.0 if hf_models.CASES[name].config.num_moe_layers else None,
        "output_dir": str(place),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
    }


def dpo_of_trl(name: str, place: Path, chosen: list[Pair], **config: Any) -> tuple[float, carry.Weights]:
    """Loss and every gradient, by names of transformers."""
    import datasets
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    case = hf_models.CASES[name]
    model, reference = (hf_models.build(case, weights(name, seed)) for seed in (1, 0))
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    trainer = DPOTrainer(
        model,
        reference,
        args=DPOConfig(**options(name, place), **config),
        data_collator=DataCollatorForPreference(pad_token_id=0),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(place),
    )
    examples = [{f"{part}_ids": ids for part, ids in pair._asdict().items()} for pair in chosen]
    return backward(trainer, trainer.data_collator(examples))


def backward(trainer: Any, inputs: Any) -> tuple[float, carry.Weights]:
    """Loss and gradients of a trainer's batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {path: p.grad.numpy().copy() for path, p in trainer.model.named_parameters()}


# ---- ours --------------------------------------------------------------------------------
def rows_of(chosen: list[Pair]) -> dict[str, np.ndarray]:
    """All pairs in one row, as `materialize_pairs` lays them out."""
    row, at = empty_row(64, labels=True), 0
    sides = [(pair.prompt, reply) for pair in chosen for reply in (pair.chosen, pair.rejected)]
    for segment, (prompt, reply) in enumerate(sides, 1):
        tokens, mask = np.array(prompt + reply), np.arange(len(prompt) + len(reply)) >= len(prompt)
        at = put(row, at, segment, tokens, mask)
    return {path: array[None] for path, array in row.items()}


def dpo_of_ours(name: str, chosen: list[Pair], config: PreferenceConfig) -> tuple[float, carry.Weights]:
    case, rows = hf_models.CASES[name], rows_of(chosen)
    model, reference = (carry.build(case.config, weights(name, seed)) for seed in (1, 0))
    rows["reference"] = np.asarray(jax.jit(logprobs_of)(reference, rows)[0])
    skeleton = Skeleton(model)
    params, extra = skeleton.split(model)
    routers = LossConfig(balance=0.0, router_z_loss=0.0)

    def function(params: Any, rows: Any) -> Any:
        own = skeleton.merge(params, extra)
        return preference_loss(own, rows, totals(rows), no_parts(own), config, routers, "dpo")[0]

    loss, gradients = jax.jit(jax.value_and_grad(function))(params, rows)
    return float(loss), carry.to_hf(carry.flatten(gradients, case.config, model.stacked), case.config)


def assert_alike(ours: tuple[float, carry.Weights], theirs: tuple[float, carry.Weights]) -> None:
    assert abs(ours[0] - theirs[0]) <= TOLERANCE * max(1, abs(theirs[0]))
    assert ours[1].keys() == theirs[1].keys()
    for path, gradient in theirs[1].items():
        largest = np.abs(gradient).max()
        assert largest > 0, path
        assert np.abs(ours[1][path] - gradient).max() <= TOLERANCE * largest, path


# ---- laws --------------------------------------------------------------------------------
LOSSES: dict[str, tuple[dict[str, Any], PreferenceConfig]] = {
    "sigmoid": ({"loss_type": ["sigmoid"], "beta": 0.3}, PreferenceConfig(beta=0.3)),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.3}, PreferenceConfig(beta=0.3, loss="ipo")),
    "sigmoid and sft": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.3},
        PreferenceConfig(beta=0.3, sft=0.2),
    ),
}


@pytest.mark.parametrize(
    ("name", "loss"),
    [*(("qwen3", loss) for loss in LOSSES), ("qwen3_moe", "sigmoid"), ("qwen3_moe", "sigmoid and sft")],
)
def test_dpo(name: str, loss: str, tmp_path: Path) -> None:
    config, own = LOSSES[loss]
    theirs = dpo_of_trl(name, tmp_path, pairs(), **config)
    assert_alike(dpo_of_ours(name, pairs(), own), theirs)


def test_label_smoothing(tmp_path: Path) -> None:
    """TRL has smoothed labels in `aot`, which sorts the pairs of a batch: with one pair it is DPO's loss."""
    theirs = dpo_of_trl("qwen3", tmp_path, pairs()[:1], loss_type=["aot"], label_smoothing=0.2, beta=0.3)
    assert_alike(dpo_of_ours("qwen3", pairs()[:1], PreferenceConfig(beta=0.3, label_smoothing=0.2)), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_sft_on_what_the_assistant_says(name: str, tmp_path: Path) -> None:
    """Prompts have labels of -100 there and weights of 0 here; ours lie packed in one row."""
    import datasets
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    case = hf_models.CASES[name]
    trainer = SFTTrainer(
        hf_models.build(case, weights(name, 1)),
        args=SFTConfig(**options(name, tmp_path)),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
        train_dataset=datasets.Dataset.from_list([{"text": "a b"}]),
        processing_class=tokenizer(tmp_path),
    )
    examples = [
        {"input_ids": pair.prompt + reply, "labels": [-100] * len(pair.prompt) + reply}
        for pair in pairs()
        for reply in (pair.chosen, pair.rejected)
    ]
    theirs = backward(trainer, trainer.data_collator(copy.deepcopy(examples)))
    rows = rows_of(pairs())
    del rows["labels"]
    model = carry.build(case.config, weights(name, 1))
    assert_alike(carry.training_step(model, rows), theirs)
