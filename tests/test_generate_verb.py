"""Law: in the terminal the reply is stdout, the rest is stderr, and a conversation survives whatever happens in it."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from conftest import ROOT

import qmax
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from serve import generate_verb
from serve.engine import Engine
from serve.generate_verb import Chat, talk
from serve.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "configs" / "demo_data" / "tiny_tokenizer")


class Parrot:
    """A generator that says the next of its lines, whatever it is asked; `prompts` is what it heard."""

    def __init__(self, tokenizer: Tokenizer, *lines: str, positions: int = 4096):
        self.tokenizer, self.lines, self.prompts = tokenizer, list(lines), []
        self.config = SimpleNamespace(max_positions=positions)

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[tuple[int, float]]:
        assert len(prompt) < self.config.max_positions
        self.prompts.append(self.tokenizer.decode(prompt))
        tokens = [*self.tokenizer.encode(self.lines.pop(0)), self.tokenizer.stop_ids[0]]
        return iter([(token, -1.0) for token in tokens][: sampling.max_tokens])


def chat_of(parrot: Parrot, *, system: str | None = None, max_tokens: int = 100) -> Chat:
    params = SamplingParams(max_tokens=max_tokens)
    return Chat(parrot, parrot.tokenizer, params, system=system, thinking=True)  # pyright: ignore[reportArgumentType]


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Engine:
    config = ModelConfig(tokenizer.vocab_size, 32, 1, 4, 2, 8, 48, max_positions=128)
    model = jax.jit(lambda: Transformer(config, jax.random.key(0)))()
    generator = Engine(model, tokenizer)
    monkeypatch.setattr(generate_verb, "open_model", lambda path, rows: (generator, tokenizer))
    return generator


def test_generate_prints_the_continuation_alone(
    real: Engine, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "run", "--prompt", "Once upon a", "--max-tokens", "9", "--json", str(tmp_path / "out.json")]
    assert qmax.main([*words, "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("[") and err.endswith("seed 3]\n") and err.count("\n") == 1
    found = json.loads((tmp_path / "out.json").read_text())
    (reply,) = found["completions"]
    assert out == reply["text"] + "\n"
    prompt = tokenizer.encode("Once upon a")
    assert found["prompt_tokens"] == len(prompt)
    said = reply["tokens"][:-1] if reply["finish_reason"] == "stop" else reply["tokens"]
    assert "Once upon a" + reply["text"] == tokenizer.decode([*prompt, *said], skip_specials=True)
    assert len(reply["logprobs"]) == len(reply["tokens"])

    assert qmax.main([*words, "--seed", "3", "--n", "3"]) == 0
    several = json.loads((tmp_path / "out.json").read_text())["completions"]
    assert several[0]["text"] == reply["text"]
    assert len({entry["text"] for entry in several}) == 3
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("---")] == [
        f"--- {i} of 3 ---" for i in (1, 2, 3)
    ]


def test_generate_can_ask_as_a_chat(
    real: Engine, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Sequence[int]] = []
    stream = real.stream
    monkeypatch.setattr(real, "stream", lambda prompt, params: heard.append(prompt) or stream(prompt, params))
    file = tmp_path / "prompt.txt"
    file.write_text("你好")
    words = ["generate", "run", "--chat", "--no-thinking", "--prompt-file", str(file), "--max-tokens", "1"]
    assert qmax.main(words) == 0
    message = [{"role": "user", "content": "你好"}]
    assert heard == [tokenizer.encode_chat(message, add_generation_prompt=True, enable_thinking=False)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "run"], "one of the arguments --prompt --prompt-file is required"),
        (["generate", "run", "--prompt", "x", "--prompt-file", "y"], "not allowed with argument --prompt"),
        (["generate", "run", "--prompt", "x", "--n", "0"], "--n 0 must be 1 or more"),
        (["generate", "run", "--prompt", "x", "--top-p", "2"], "top_p=2.0 is out of range"),
        (["generate", "run", "--prompt-file", "no-such-file"], "cannot read the prompt from no-such-file"),
        (["generate", "no-such-run", "--prompt", "x"], "no-such-run does not exist"),
        (["chat", "run", "--temperature", "-1"], "temperature=-1.0 is out of range"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert qmax.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_a_conversation_is_kept_and_forgotten(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parrot = Parrot(tokenizer, "One.", "<think>\nhm\n</think>\n\nTwo: é 好.", "Three.", "Four.")
    chat = chat_of(parrot, system="Be brief.")
    type_in(monkeypatch, "first", "", "second", "/hlp", "third", "/reset", "to\\", "/exit all", "/exit", "never")
    talk(chat)
    out, err = capsys.readouterr()
    assert out == "One.\n<think>\nhm\n</think>\n\nTwo: é 好.\nThree.\nFour.\n"
    assert "no command /hlp; did you mean '/help'?" in err
    assert parrot.prompts[2].count("Be brief.") == 1
    assert [part in parrot.prompts[2] for part in ("first", "One.", "second", "Two", "hm")] == [True] * 4 + [False]
    assert "first" not in parrot.prompts[3]
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "to\n/exit all"},
        {"role": "assistant", "content": "Four."},
    ]


def test_ctrl_c_stops_the_reply_and_not_the_chat(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parrot = Parrot(tokenizer, "A long reply that nobody wants to read.", "Short.")
    stream = parrot.stream

    def interrupted(prompt: Sequence[int], sampling: SamplingParams) -> Iterator[tuple[int, float]]:
        for index, pair in enumerate(stream(prompt, sampling)):
            if index == 3 and len(parrot.prompts) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield pair

    monkeypatch.setattr(parrot, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    chat = chat_of(parrot)
    type_in(monkeypatch, "talk", "again")
    talk(chat)
    out, err = capsys.readouterr()
    assert "read" not in out
    assert out.endswith("\nShort.\n")
    assert ", stopped]" in err
    assert len(chat.messages) == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_old_exchanges_make_room(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "a long and winding sentence about the sea " * 3
    parrot = Parrot(tokenizer, *[f"reply {i}" for i in range(9)], positions=400)
    chat = chat_of(parrot, system="Hello.")
    type_in(monkeypatch, *[f"turn{i} {words}" for i in range(4)], "x" * 4000, "after")
    talk(chat)
    _, err = capsys.readouterr()
    assert "forgot the first" in err
    assert "of the model's 400 positions; say it in less" in err
    assert "turn0" not in parrot.prompts[3]
    assert all("Hello." in prompt for prompt in parrot.prompts)
    assert chat.messages[-1]["content"] == "reply 4"


def test_one_turn_prints_the_reply(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parrot = Parrot(tokenizer, "Hello to you.")
    monkeypatch.setattr(generate_verb, "open_model", lambda path, rows: (parrot, tokenizer))
    file = tmp_path / "chat.json"
    assert qmax.main(["chat", "run", "--prompt", "Hello!", "--max-tokens", "5", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "Hello to you.".startswith(out.strip())
    assert "5 tokens" in err and "cut at --max-tokens" in err
    assert [message["role"] for message in json.loads(file.read_text())["messages"]] == ["user", "assistant"]
