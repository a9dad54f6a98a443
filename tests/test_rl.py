"""Laws of reinforcement learning: the sampler and the trainer say the same; a run that was stopped ends as one that
was not; what tools said is not learnt; rewards come as the config says."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from kill_campaign import campaign, finish, hashes, records, start, story, write_project
from test_resume import interrupt

import qmax
from configs.alignment import RLConfig
from configs.override import load_config
from errors import UserError
from model.tokenizer import Tokenizer
from serve.engine import Engine
from serve.request import Completion
from train.data.order import derive
from train.rl.rewards import Asked, GradeReward, JudgeReward, give, make_rewards
from train.rl.rollout import Rollout
from train.rl.samples import Sample
from train.tasks.task import Grade, Problem
from train.tools import tools_named

STEPS = 4
SHORT = ("--objective", "rl", "--data.sources=", "--data.weights=", "--data.sequence-length", "64", "--accumulate", "1")
GROUPS = ("--rl.prompts", "4", "--rl.samples", "4", "--rl.max-new-tokens", "6", "--rl.validation-problems", "4")
Words = tuple[str, ...]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts that nobody trained, and words to say again: now and then what it says is worth a little."""
    config = write_project(tmp_path_factory.mktemp("rl"))
    rows = [{"prompt": word, "answer": word * 2} for word in ("the", "a", "cat", "sat", "on", "mat", "dog", "ran")]
    (config.parent / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def train(config: Path, out: Path, *words: str, steps: int = STEPS) -> int:
    """Exit code of a run on the words beside the config, in this process."""
    task = f"jsonl:{config.parent / 'words.jsonl'}?grader=chrf"
    saved = ("--steps", str(steps), "--checkpoint.every", "2", "--checkpoint.keep", "9", "--validate-every", "2")
    return qmax.main(["train", str(config), "--out", str(out), *SHORT, *GROUPS, *saved, "--rl.tasks", task, *words])


SEVERAL = ("--rl.updates", "2", "--rl.ratio", "sequence", "--rl.mean", "sequence", "--rl.replay", "true")


@pytest.fixture(scope="module")
def several(config: Path) -> Path:
    """A run with two updates a step that nobody disturbed."""
    assert train(config, config.parent / "several", *SEVERAL) == 0
    return config.parent / "several"


@pytest.fixture(scope="module")
def once(config: Path) -> Path:
    """A run with one update a step, which learns fast."""
    assert train(config, config.parent / "once", "--optimizer.learning-rate", "1e-2") == 0
    return config.parent / "once"


@pytest.mark.parametrize("name", [pytest.param("once", marks=pytest.mark.full), "several"])
def test_the_sampler_and_the_trainer_say_the_same(name: str, request: pytest.FixtureRequest) -> None:
    """Engine and training step give each drawn token the same log-probability at every step, while weights change."""
    run: Path = request.getfixturevalue(name)
    found = records(run)
    assert [record["step"] for record in found] == list(range(STEPS + 1))
    for record in found[1:]:
        assert record["logprob_gap_max"] <= 1e-4 and record["logprob_gap"] <= 1e-5
        assert 0 <= record["clip_fraction"] <= 1 and record["reply_tokens"] >= 1
        assert sum(record["reward_histogram"]) == sum(record["length_histogram"]) == 16
    if name == "once":
        assert all(record["ratio"] == pytest.approx(1, abs=1e-5) for record in found[1:])
    assert any(record["reward_deviation"] > 0 and record["gradient_norm"] > 0.05 for record in found[1:])
    assert "validation_reward" in found[0] and "validation_reward" in found[-1]
    shown = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {0, 2, 4}


def test_a_stopped_run_ends_as_one_that_nobody_disturbed(
    config: Path, several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, stopped = several, tmp_path / "stopped"
    with monkeypatch.context() as patched:
        interrupt(patched, signal.SIGTERM, 4)
        assert train(config, stopped, *SEVERAL) == 0
    assert 0 < hashes(stopped)[0] < STEPS
    assert train(config, stopped, *SEVERAL, "--resume") == 0
    assert hashes(stopped) == hashes(undisturbed)
    assert [story(record) for record in records(stopped)] == [story(record) for record in records(undisturbed)]
    assert (stopped / "samples.jsonl").read_text() == (undisturbed / "samples.jsonl").read_text()


@pytest.mark.full
def test_killed_again_and_again(config: Path, tmp_path: Path) -> None:
    task = f"jsonl:{config.parent / 'words.jsonl'}?grader=chrf"
    words = [*SHORT, *GROUPS, *SEVERAL, "--checkpoint.every", "2", "--checkpoint.keep", "2", "--rl.tasks", task]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(config, undisturbed, "--steps", "16", *words))
    done = campaign(config, killed, steps=16, kills=3, during_saves=1, words=words)
    assert len(done) >= 3 and any(one.resumed for one in done)
    assert hashes(killed) == hashes(undisturbed)
    assert [story(record) for record in records(killed)] == [story(record) for record in records(undisturbed)]


@pytest.mark.full
def test_reference_adapters_and_the_rest_of_the_options_work_together(config: Path, tmp_path: Path) -> None:
    """With adapters the reference is the model without them: at the first step nothing is between them."""
    assert train(config, tmp_path / "base", steps=1) == 0
    words = ("--init-from", str(tmp_path / "base"), "--lora.rank", "2", "--rl.kl", "0.1", "--rl.resample", "1")
    words += ("--rl.baseline", "others", "--rl.normalize", "batch", "--rl.truncate", "2", "--rl.drop-cut", "true")
    assert train(config, tmp_path / "run", *words, "--optimizer.learning-rate", "1e-2") == 0
    first, *_, last = records(tmp_path / "run")[1:]
    assert first["kl"] == pytest.approx(0, abs=1e-9) and last["kl"] > 0
    assert last["logprob_gap_max"] <= 1e-4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rl.tasks=",), "rl.tasks"),
        (("--rl.tasks", "arithmetik"), "arithmetic"),
        (("--rl.rewards", "taks"), "task"),
        (("--rl.tools", "calculater"), "calculator"),
        (("--rl.samples", "1"), "rl.samples"),
        (("--rl.max-new-tokens", "64"), "room"),
        (("--rl.updates", "5"), "rl.prompts"),
        (("--rl.truncate", "2", "--rl.temperature", "0.5"), "rl.temperature"),
    ],
)
def test_what_cannot_work_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Words, told: str
) -> None:
    assert train(config, tmp_path / "run", *words) == 2
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said


# ---- turns with tools ---------------------------------------------------------
class Script:
    """An engine that says what it is told to."""

    context = 512

    def __init__(self, tokenizer: Tokenizer, turns: list[str]):
        self.turns, self.tokenizer, self.prompts = list(turns), tokenizer, list[list[int]]()

    def generate(self, prompts: list[list[int]], sampling: list[Any]) -> list[Completion]:
        assert len(prompts) == len(sampling)
        self.prompts += [list(prompt) for prompt in prompts]
        tokens = [*self.tokenizer.encode(self.turns.pop(0)), self.tokenizer.stop_ids[0]]
        return [Completion(tokens, [-0.5] * len(tokens), "stop", len(prompts[0]))]


def test_what_tools_say_is_read_and_not_learnt(config: Path) -> None:
    tokenizer = Tokenizer.load(load_config(str(Path("configs/tiny.py"))).data.tokenizer)
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'
    engine: Any = Script(tokenizer, [call, "It is 42."])
    settings = RLConfig(tasks=("arithmetic",), tools=("calculator",), max_new_tokens=100)
    rollout = Rollout(engine, tokenizer, settings, tools_named(settings.tools), 2048)
    prompt = rollout.encode(Problem("1", [{"role": "user", "content": "6*7?"}], 42))
    (sample,) = rollout.draw([prompt], derive("x"), samples=1)
    assert sample.reply == "It is 42." and sample.calls == 1
    said = tokenizer.decode([t for t, own in zip(sample.tokens, sample.drawn, strict=True) if own])
    assert "calculator" in said and "It is 42." in said
    heard = sample.tokens[len(engine.prompts[0]) : len(engine.prompts[1])]
    heard = [t for t, own in zip(heard, sample.drawn[len(engine.prompts[0]) :], strict=False) if not own]
    assert "42" in tokenizer.decode(heard) and not sample.drawn[: len(prompt)].any()
    assert engine.prompts[1][: len(prompt)] == prompt and (sample.logprobs[~sample.drawn] == 0).all()


# ---- rewards --------------------------------------------------------------------
class Broken:
    """A task whose grader fails."""

    name = "broken"

    def problems(self, split: str) -> list[Problem]:
        return []

    def grade(self, problem: Problem, reply: str) -> Grade:
        raise RuntimeError(reply)


def sample_of(text: str) -> Sample:
    return Sample(0, 1, [1, 2], np.array([False, True]), np.zeros(2, np.float32), None, text, False)


ASKED = [Asked(Broken(), Problem("1", [{"role": "user", "content": "Well?"}], None))]


def test_a_grader_that_raises_gives_nothing_and_is_counted() -> None:
    reward, sample = GradeReward(), sample_of("x")
    give([reward], (), ASKED, [sample])
    assert (sample.reward, sample.skipped, reward.raised) == (0.0, False, 1)


def judge(answers: list[Any], **settings: Any) -> tuple[JudgeReward, Sample]:
    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "judge"}]})
        answer = answers.pop(0) if answers else 503
        if isinstance(answer, int):
            return httpx.Response(answer)
        assert json.loads(request.content)["model"] == "judge"
        return httpx.Response(200, json={"choices": [{"message": {"content": answer}}]})

    client = httpx.Client(transport=httpx.MockTransport(respond))
    return JudgeReward("http://judge/v1", RLConfig(**settings), client), sample_of("Fine.")


def test_a_judge_is_asked_again_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    reward, sample = judge([503, 500, "no idea", "I say 7"])
    give([reward, GradeReward()], (2.0, 1.0), ASKED, [sample])
    assert sample.reward == pytest.approx(1.4) and reward.failures == 3
    assert sample.parts == {"judge": 0.7, "task": 0.0}


def test_without_a_judge_replies_are_left_out_where_the_config_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    reward, sample = judge([], judge_down="skip")
    give([reward], (), ASKED, [sample])
    assert sample.skipped and sample.reward == 0


def test_rewards_are_named_as_the_config_has_them() -> None:
    tokenizer: Any = None
    assert [one.name for one in make_rewards(RLConfig(rewards=("task", "judge:http://x/v1")), tokenizer)] == [
        "task",
        "judge",
    ]
    with pytest.raises(UserError, match="did you mean"):
        make_rewards(RLConfig(rewards=("jugde:http://x",)), tokenizer)


def test_a_step_s_engine_begins_as_a_new_one(config: Path) -> None:
    """After `forget` slots come in their first order, so that a resumed run has rows in the same places."""
    del config
    from test_one_forward import NAMES, Words, make

    from serve.sampling_params import SamplingParams

    engine = Engine(make(NAMES[0]), Words(), slots=3, context=32)  # pyright: ignore[reportArgumentType]
    before = [list(slots) for slots in engine.scheduler._slots]
    engine.generate([[1, 2], [3], [4, 5, 6]], [SamplingParams(max_tokens=n, seed=n) for n in (3, 1, 2)])
    engine.forget()
    assert engine.scheduler._slots == before
