"""Laws of reward models: one score for a reply, at the token that ends it, the same in training, from a run, from a
Hugging Face directory and as the reward of reinforcement learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kill_campaign import records, write_project
from test_rl import GROUPS
from text_fixtures import byte_tokenizer

import qmax
from configs.override import apply_overrides, load_config
from configs.run import Run
from errors import UserError
from model.forward import Batch, forward
from model.load import open_model, read_model
from model.tokenizer import Tokenizer
from sharding.mesh import MeshConfig, make_mesh
from train.data.encoding import Encoded, encode_row
from train.data.sources import Row
from train.preference import score_hidden
from train.rl.rewards import ModelReward
from train.rl.samples import Sample
from train.setup import Job, find_start, prepare_job

Words = tuple[str, ...]
FAMILY = ("--model.moe.dense-layers=", "--model.moe.selection-bias", "false", "--loss.bias-update-rate", "0")
"""What some family of transformers has too."""


# ---- where the score stands ------------------------------------------------------------
TEMPLATES = {
    "a newline": "{{ '<|im_end|>\\n' }}",
    "nothing": "{{ '<|im_end|>' }}",
    "a newline and the end": "{{ '<|im_end|>\\n<|endoftext|>' }}",
}
"""What a template writes after a turn."""


def reading(after: str) -> Tokenizer:
    """A tokenizer whose template ends turns like this."""
    said = "{{ '<|im_start|>' + m.role + '\\n' + m.content }}" + after
    start = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    template = "{% for m in messages %}" + said + "{% endfor %}" + start
    return Tokenizer({**byte_tokenizer().files, "chat_template.jinja": template.encode()}, "bytes")


@pytest.mark.parametrize("after", TEMPLATES)
def test_the_token_that_ends_a_reply_is_the_last_input(after: str) -> None:
    """Inputs are all but the last token; what is learned ends with that token too."""
    tokenizer = reading(TEMPLATES[after])
    stop = "<|im_end|>"
    pair: dict[str, Any] = {"prompt": "q", "chosen": "one", "rejected": "three"}
    judged: dict[str, Any] = {"prompt": "q", "completion": "one", "label": True}
    found = encode_row(tokenizer, "preference", Row(pair, ""))
    assert isinstance(found, Encoded) and found.loss_mask is not None
    tokens, mask, first = found.tokens[2:].tolist(), found.loss_mask[2:].tolist(), int(found.tokens[0])
    sides = [(tokens[:first], mask[:first], "one"), (tokens[first:], mask[first:], "three")]
    found = encode_row(tokenizer, "kto", Row(judged, ""))
    assert isinstance(found, Encoded) and found.loss_mask is not None
    sides.append((found.tokens[1:].tolist(), found.loss_mask[1:].tolist(), "one"))
    for ids, learned, text in sides:
        assert tokenizer.decode(ids[:-1]).endswith(f"assistant\n{text}{stop}")
        assert learned[-2:] == [True, False]
        assert tokenizer.decode([i for i, own in zip(ids, learned, strict=True) if own]) == text + stop


# ---- runs ---------------------------------------------------------------------------------
def learnt(out: Path) -> list[dict[str, Any]]:
    """The records of steps, without what held-out rows gave before the first."""
    return [record for record in records(out) if record["step"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with pairs, and the run `base`."""
    place = tmp_path_factory.mktemp("reward")
    config = write_project(place)
    rows = [{"prompt": f"q{i}", "chosen": f"GOOD {i}", "rejected": f"bad {i}", "margin": i % 2} for i in range(40)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert qmax.main(["train", str(config), "--out", str(place / "base"), "--steps", "2", *FAMILY]) == 0
    return place


def words_of(place: Path, *words: str) -> list[str]:
    """What makes a run of the project one of a reward model."""
    data = ("--data.sources", str(place / "pairs.jsonl"), "--data.weights=", "--data.sequence-length", "128")
    short = ("--steps", "4", "--validate-every", "2", "--objective", "reward", "--optimizer.learning-rate", "1e-2")
    return [*FAMILY, *data, *short, "--init-from", str(place / "base"), *words]


def train(place: Path, out: Path, *words: str) -> int:
    """Exit code of a run in this process."""
    return qmax.main(["train", str(place / "small.py"), "--out", str(out), *words])


def prepared(run: Run, out: Path) -> Job:
    """The run, ready; nothing is compiled."""
    return prepare_job(run, out, *find_start(run, out, resume=False))


@pytest.fixture(scope="module")
def reward(place: Path) -> Path:
    """A trained reward model."""
    assert train(place, place / "reward", *words_of(place)) == 0
    return place / "reward"


@pytest.fixture(scope="module")
def exported(place: Path, reward: Path) -> Path:
    """The same as a directory of transformers."""
    assert qmax.main(["convert", str(reward), str(place / "hf"), "--dtype", "float32"]) == 0
    return place / "hf"


def test_a_language_model_becomes_a_reward_model_by_its_objective_alone(reward: Path) -> None:
    first, *_, last = learnt(reward)
    assert open_model(reward).config.num_labels == 1
    assert last["loss"] < first["loss"] and last["accuracy"] > 0.5
    assert {"validation_loss", "validation_accuracy", "validation_reward_margin"} <= last.keys()
    assert 0 <= last["validation_accuracy"] <= 1


def test_its_sizes_may_come_from_the_source_too(place: Path, tmp_path: Path) -> None:
    base = load_config(str(place / "small.py"))
    plain = Run(data=base.data, accumulate=2, init_from=str(place / "base"), init_model="source")
    words = [word for word in words_of(place) if word not in FAMILY]
    del words[words.index("--init-from") :]
    job = prepared(apply_overrides(plain, words), tmp_path / "run")
    job.data.close()
    assert job.run.model.num_labels == 1 and job.skeleton.shapes["head_DV"] == (32, 1)
    with pytest.raises(UserError, match=r"objective=reward learns one score for a reply, .* num_labels=3"):
        prepared(apply_overrides(plain, [*words, "--model.num-labels", "3"]), tmp_path / "three")


def test_as_a_directory_it_is_a_model_for_sequence_classification(exported: Path) -> None:
    settings = json.loads((exported / "config.json").read_text())
    assert settings["architectures"][0].endswith("ForSequenceClassification") and settings["num_labels"] == 1
    assert open_model(exported).config.num_labels == 1


@pytest.mark.parametrize("form", ["reward", "exported"])
def test_a_reply_is_worth_what_training_gave_its_last_token(
    form: str, place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Packed with others in the rows of training; alone as tokens that were drawn, whatever mesh the run has."""
    path: Path = request.getfixturevalue(form)
    job = prepared(apply_overrides(load_config(str(place / "small.py")), words_of(place)), tmp_path / "run")
    row = next(iter(job.data.parts.values()))[0]
    job.data.close()
    model = read_model(open_model(path), make_mesh(MeshConfig()))
    batch = Batch(*(jnp.asarray(row[name])[None] for name in ("tokens", "positions", "segments")))
    scores = np.asarray(jax.jit(lambda m, b: score_hidden(m, forward(m, b).hidden_BTD))(model, batch))[0]
    segments = row["segments"]
    samples, wanted = list[Sample](), list[float]()
    for number in range(1, segments.max() + 1):
        tokens = row["tokens"][segments == number].tolist()
        assert tokens[-1] in job.tokenizer.stop_ids
        samples.append(Sample(0, 1, tokens, np.ones(len(tokens), bool), np.zeros(len(tokens)), None, "", False))
        wanted.append(float(scores[segments == number][-1]))
    assert len(wanted) >= 2 and np.std(wanted) > 0
    judge = ModelReward(path, job.tokenizer)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))):
        found = judge([], samples)
    np.testing.assert_allclose(np.array(found, np.float32), wanted, atol=1e-5)


def test_what_is_no_reward_model_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"is no reward model; train one with objective=reward"):
        ModelReward(place / "base", byte_tokenizer())


def test_one_of_other_tokens_is_refused(exported: Path) -> None:
    with pytest.raises(UserError, match=r"has other tokens than the model that is trained"):
        ModelReward(exported, byte_tokenizer("<|more|>"))


def test_reinforcement_learning_takes_its_rewards_from_it(place: Path, exported: Path, tmp_path: Path) -> None:
    words = [{"prompt": word, "answer": word * 2} for word in ("the", "a", "cat", "sat", "on", "mat")]
    (place / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    task = ("--rl.tasks", f"jsonl:{place / 'words.jsonl'}?grader=chrf", "--rl.rewards", "task", f"model:{exported}")
    short = ("--objective", "rl", "--data.sources=", "--data.weights=", "--data.sequence-length", "64", "--steps", "2")
    start = ("--init-from", str(place / "base"), "--accumulate", "1")
    assert train(place, tmp_path / "rl", *FAMILY, *short, *GROUPS, *task, *start) == 0
    for record in records(tmp_path / "rl")[1:]:
        assert np.isfinite(record["reward_model"]) and record["reward_model"] != 0
        assert record["reward"] == pytest.approx(record["reward_task"] + record["reward_model"], abs=1e-5)
        assert record["reward_deviation"] > 0 and record["gradient_norm"] > 0
