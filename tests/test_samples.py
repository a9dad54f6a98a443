"""Laws of replies while a run trains: those of the weights at that step, to held-out prompts, the same after a stop."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from kill_campaign import write_project
from test_resume import interrupt

import qmax
from configs.run import DataConfig, Run
from errors import UserError
from model.load import load_model
from serve.engine import Engine
from serve.sampling_params import SamplingParams
from tests.text_fixtures import SPECIALS, byte_tokenizer, write_jsonl
from train.data.loader import open_data
from train.sampler import BEGINNING, held_out_prompts
from train.samples_file import SAMPLES, read_samples

ASKED = ("--samples", "3", "--sample-tokens", "6", "--validate-every", "2", "--checkpoint.every", "1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and conversations beside it."""
    return write_project(tmp_path_factory.mktemp("samples"))


def train(config: Path, out: Path, *words: str) -> int:
    """Exit code of a run of four steps on the conversations."""
    chats = str(config.parent / "chats.jsonl")
    rows = ("--data.sources", chats, "--data.weights=", "--data.sequence-length", "96", "--steps", "4")
    return qmax.main(["train", str(config), "--out", str(out), "--objective", "sft", *rows, *ASKED, *words])


def assert_of_the_run(out: Path) -> None:
    """What was written at the last step is what the finished run answers."""
    model, tokenizer = load_model(out)[:2]
    last = [one for one in read_samples(out) if one["step"] == 4]
    assert len(last) == 3
    frame = {word: tokenizer.vocab_size - len(SPECIALS) + place for place, word in enumerate(SPECIALS)}
    assert all(tokenizer.decode([token]) == word for word, token in frame.items())
    pieces = [re.split(f"({'|'.join(map(re.escape, SPECIALS))})", one["prompt"]) for one in last]
    prompts = [
        [token for word in words for token in ([frame[word]] if word in frame else tokenizer.encode(word))]
        for words in pieces
    ]
    found = Engine(model, tokenizer, slots=3).generate(prompts, SamplingParams(temperature=0.0, max_tokens=6))
    assert [tokenizer.decode(reply.content) for reply in found] == [one["reply"] for one in last]


def test_replies_are_those_of_the_weights_and_the_same_after_a_stop(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert train(config, undisturbed) == 0
    written = read_samples(undisturbed)
    assert [one["step"] for one in written] == [2, 2, 2, 4, 4, 4]
    assert all(one["prompt"].startswith("<|im_start|>user\nquestion") for one in written)
    assert all("ANSWER" not in one["prompt"] for one in written)
    assert_of_the_run(undisturbed)
    with monkeypatch.context() as patched:
        interrupt(patched, signal.SIGTERM, 4)  # a batch of validation among them
        assert train(config, stopped) == 0
    with open(stopped / SAMPLES, "a") as file:  # as if it had gone on, and lost the checkpoint
        file.write(json.dumps({"step": 4, "prompt": "lost", "reply": "lost"}) + "\n")
    assert train(config, stopped, "--resume") == 0
    assert (stopped / SAMPLES).read_text() == (undisturbed / SAMPLES).read_text()


@pytest.mark.full
def test_adapters_on_a_mesh_answer_too(config: Path, tmp_path: Path) -> None:
    words = ("--lora.rank", "2", "--optimizer.learning-rate", "0.05", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    words += ("--lora.base", "int8", "--model.moe.dense-layers=")  # layers that are all alike, in a list
    assert train(config, tmp_path / "run", *words) == 0
    assert_of_the_run(tmp_path / "run")


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "pretrain"])
def test_prompts_are_held_out_and_end_where_the_model_begins(tmp_path: Path, objective: Any) -> None:
    asked = [{"role": "user", "content": f"question {i}"} for i in range(12)]
    rows: dict[str, list[Any]] = {
        "sft": [{"messages": [one, {"role": "assistant", "content": "ANSWER"}]} for one in asked],
        "dpo": [{"prompt": [one], "chosen": "ANSWER", "rejected": "ANSWERS"} for one in asked],
        "kto": [{"prompt": [one], "completion": "ANSWER", "label": True} for one in asked],
        "pretrain": [f"{i} is a number, and this is a text about it, {i} times" for i in range(12)],
    }
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows[objective]))
    data = DataConfig(sources=(source,), validation=(source,), sequence_length=256, batch_size=8)
    tokenizer = byte_tokenizer()
    found = open_data(Run(data=data, objective=objective), tokenizer, tmp_path / "cache")
    prompts = [tokenizer.decode(prompt) for prompt in held_out_prompts(found, objective)]
    found.close()
    if objective == "pretrain":
        # A text may go on in the next row, whose beginning is then somewhere in it.
        assert len(prompts) > 9
        assert all(len(one) == BEGINNING and any(one in text for text in rows["pretrain"]) for one in prompts)
        return
    expected = [tokenizer.encode_chat([one], add_generation_prompt=True) for one in asked]
    assert sorted(prompts) == sorted(tokenizer.decode(prompt) for prompt in expected)


@pytest.mark.parametrize("objective", ["reward", "rl"])
def test_objectives_without_replies_refuse_them(objective: Any) -> None:
    with pytest.raises(UserError, match=r"samples=2 asks for replies"):
        Run(objective=objective, samples=2)
