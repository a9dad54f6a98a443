"""Which tokens of a conversation are learned: by weight, by turn, and what is the prompt's where thinking is off.

And conversations that are longer than a row keep their beginning, their end, or are left out or refused.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.run import DataConfig, Run
from errors import UserError
from model.tokenizer import Tokenizer
from tests.test_data import take
from tests.text_fixtures import byte_tokenizer, write_jsonl
from train.data.encoding import Encoded, encode_row
from train.data.kinds import Kind, kind_of_rows
from train.data.loader import DataSets, open_data
from train.data.packing import TooLong, pack
from train.data.sources import Row

DATA = Path(__file__).parent / "data"
DEMO = Path(__file__).parent.parent / "configs" / "demo_data" / "tiny_tokenizer"
Turn = dict[str, Any]


@cache
def qwen() -> Tokenizer:
    """The tokenizer of Qwen3."""
    return Tokenizer({"tokenizer.json": gzip.decompress((DATA / "qwen3_tokenizer.json.gz").read_bytes())}, "qwen3")


@cache
def demo() -> Tokenizer:
    """A tokenizer such as the demo's."""
    return Tokenizer.load(DEMO)


BOTH = pytest.mark.parametrize("tokenizer", [qwen, demo])


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


def learned(messages: list[Turn], kind: Kind = "sft", tokenizer: Callable[[], Tokenizer] = byte_tokenizer) -> str:
    """What the mask gives to the assistant, as one text; or why the row is bad."""
    found = encode_row(tokenizer(), kind, Row({"messages": messages}, "here"))
    if not isinstance(found, Encoded):
        return str(found)
    assert found.loss_mask is not None
    return tokenizer().decode(found.tokens[found.loss_mask].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Weights and turns


EMPTY = "<think>\n\n</think>\n\n"


def test_turns_of_weight_0_are_not_learned() -> None:
    def turns(*weights: Any) -> list[Turn]:
        return [turn for i, w in enumerate(weights) for turn in (user(f"q{i}"), assistant(f"a{i}", weight=w))]

    assert learned(turns(None, None, None)) == f"a0<|im_end|>a1<|im_end|>{EMPTY}a2<|im_end|>"
    assert learned(turns(0, 1, None)) == f"a1<|im_end|>{EMPTY}a2<|im_end|>"
    assert learned(turns(1, 1, 0)) == "a0<|im_end|>a1<|im_end|>"
    assert learned(turns(0, 0)) == "no token of the assistant, so nothing to learn"
    assert learned(turns(1, 0.5)) == '"weight" is 0.5, neither 0 nor 1'
    assert learned(turns(True)) == '"weight" is True, neither 0 nor 1'
    assert learned([{**user("q"), "weight": 0}, assistant("a")]).startswith('a "weight" on a turn of the user')


def test_the_last_turn_alone() -> None:
    messages = [user("q"), assistant("a", weight=0), user("r"), assistant("b")]
    assert learned(messages, "sft-last") == f"{EMPTY}b<|im_end|>"
    assert learned([*messages[:3], assistant("b", weight=0)], "sft-last").startswith("no token of the assistant")
    assert learned([*messages, user("bye")], "sft-last") == "b<|im_end|>", "the template shows a block in last turns"


def test_weights_change_no_token() -> None:
    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    plain = encode_row(byte_tokenizer(), "sft", Row({"messages": messages}, ""))
    marked = [messages[0], assistant("a", weight=0), *messages[2:]]
    weighted = encode_row(byte_tokenizer(), "sft", Row({"messages": marked}, ""))
    last = encode_row(byte_tokenizer(), "sft-last", Row({"messages": messages}, ""))
    assert isinstance(plain, Encoded)
    assert isinstance(weighted, Encoded)
    assert isinstance(last, Encoded)
    assert plain.tokens.tolist() == weighted.tokens.tolist() == last.tokens.tolist()
    assert byte_tokenizer().encode_chat(messages) == plain.tokens.tolist()


@pytest.mark.parametrize("empty", [assistant(""), assistant(" \n"), assistant("", tool_calls=[], reasoning_content="")])
def test_an_empty_turn_is_a_bad_row(empty: Turn) -> None:
    assert learned([user("q"), assistant("a"), user("r"), empty]) == "turn 2 of the assistant is empty"


def test_a_turn_that_thinks_or_calls_is_not_empty() -> None:
    assert "a call" in learned([user("q"), {"role": "assistant", "reasoning_content": "a call"}])
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert '"name": "f"' in learned([user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}])


def test_turns_that_a_template_does_not_show_one_by_one_cannot_be_told_apart() -> None:
    once = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    files = {**byte_tokenizer().files, "chat_template.jinja": once.encode()}
    joined = Tokenizer(files, "joined")
    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert all(joined.encode_conversation(messages)[1])
    assert "2 turns of the assistant in 1 parts" in learned(messages, "sft-last", lambda: joined)


# ---------------------------------------------------------------------------------------------------------------------
# Thoughts


@BOTH
def test_prompt_and_learned_tokens_are_the_conversation(tokenizer: Callable[[], Tokenizer]) -> None:
    """With or without thoughts, up to the end of its last turn; a prompt without thinking goes on a little further."""
    for thinks in (True, False):
        reply = assistant("Four.", **({"reasoning_content": "I add."} if thinks else {}))
        ids, mask = tokenizer().encode_conversation([user("2+2?"), reply])
        prompt = tokenizer().encode_chat([user("2+2?")], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt
        assert mask.index(True) == len(prompt)
        thoughts = "\nI add.\n" if thinks else "\n\n"
        said = f"<think>{thoughts}</think>\n\nFour.<|im_end|>"
        assert tokenizer().decode(np.array(ids)[mask].tolist()) == said
        further = tokenizer().encode_chat([user("2+2?")], add_generation_prompt=True, enable_thinking=False)
        assert thinks or ids[: len(further)] == further


@BOTH
def test_the_block_is_the_models_unless_it_was_told_to_think(tokenizer: Callable[[], Tokenizer]) -> None:
    empty = EMPTY
    cases = {
        "2+2? /no_think": empty,
        "2+2?/no_think": empty,
        "2+2?": empty,
        "2+2? /think": "",
        "/no_think no, /think": "",
        "/think no, /no_think": empty,
        "see docs/think": empty,
        "see /thinking": empty,
    }
    for text, expected in cases.items():
        assert learned([user(text), assistant("4")], tokenizer=tokenizer) == f"{expected}4<|im_end|>", text
        system = {"role": "system", "content": text}
        assert learned([system, user("q"), assistant("4")], tokenizer=tokenizer) == f"{expected}4<|im_end|>", text
    switched = [user("a /no_think"), assistant("b"), user("c"), assistant("d")]
    assert learned(switched, tokenizer=tokenizer) == f"b<|im_end|>{empty}d<|im_end|>"
    back = [*switched[:2], user("c /think"), assistant("/no_think d", reasoning_content="e")]
    assert learned(back, tokenizer=tokenizer) == "b<|im_end|><think>\ne\n</think>\n\n/no_think d<|im_end|>"


@BOTH
def test_switches_are_left_in_what_users_say(tokenizer: Callable[[], Tokenizer]) -> None:
    for word in ("/think", "/no_think"):
        ids, _ = tokenizer().encode_conversation([user(f"2+2? {word}"), assistant("4")])
        assert f"user\n2+2? {word}<|im_end|>" in tokenizer().decode(ids)


def test_a_block_that_contents_spell_is_as_the_template_has_it() -> None:
    """Rows may come with the empty block written out, as Qwen3's own replies do."""
    spelled = [user("q"), assistant("<think>\n\n</think>\n\nYes.")]
    plain = [user("q"), assistant("Yes.")]
    assert qwen().encode_conversation(spelled) == qwen().encode_conversation(plain)


# ---------------------------------------------------------------------------------------------------------------------
# Longer than a row


@given(
    st.lists(st.integers(0, 60), max_size=60),
    st.integers(1, 40),
    st.sampled_from(["cut", "cut_left", "drop", "refuse"]),
)
def test_what_is_longer_than_a_row_is_cut_at_the_end_that_is_named_or_left_out(
    lengths: list[int], length: int, too_long: TooLong
) -> None:
    packed = pack(np.array(lengths, np.int64), length, "whole", too_long)
    pieces = sorted(zip(packed.doc.tolist(), packed.start.tolist(), packed.length.tolist(), strict=True))
    expected = [
        (doc, max(0, n - 1 - length) if too_long == "cut_left" else 0, min(n - 1, length))
        for doc, n in enumerate(lengths)
        if n > 1 and not (too_long == "drop" and n - 1 > length)
    ]
    over = sum(n - 1 > length for n in lengths)
    assert pieces == expected
    assert (packed.cut, packed.dropped) == ((0, over) if too_long == "drop" else (over, 0))


def opened(place: Path, **data: Any) -> DataSets:
    """Two conversations, one of 29 tokens and one of 79, which is longer than a row of 40."""
    write_jsonl(place / "chats.jsonl", [{"messages": [user("q"), assistant(text)]} for text in ("a", "b" * 50 + "c")])
    settings = {"sequence_length": 40, "batch_size": 1, "validation_fraction": 0.0, **data}
    run = Run(data=DataConfig(sources=(str(place / "chats.jsonl"),), **settings), objective="sft")
    return open_data(run, byte_tokenizer(), place / "cache")


def test_policies_give_the_rows_that_they_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = byte_tokenizer().encode("b")[0]
    for too_long in ("cut", "cut_left"):
        data = opened(tmp_path, too_long=too_long)
        rows = [batch for batch in take(data, 2) if (batch["targets"] == b).sum() > 1]
        targets, weights = rows[0]["targets"][0], rows[0]["weights"][0]
        text = byte_tokenizer().decode(targets.tolist())
        assert len(targets) == 40
        assert text.startswith("user\nq") if too_long == "cut" else text.endswith("bc<|im_end|>\n")
        block = len(byte_tokenizer().encode(EMPTY, specials=True)) if too_long == "cut" else 0
        assert weights.sum() == (targets == b).sum() + block + (too_long == "cut_left") * 2
        assert (rows[0]["positions"][0] == np.arange(40)).all()
        assert "1 of 2 conversations" in capsys.readouterr().err
    data = opened(tmp_path, too_long="drop")
    assert data.rows_per_epoch == 1
    assert "1 of 2 conversations of" in (said := capsys.readouterr().err)
    assert "are left out" in said
    with pytest.raises(
        UserError, match=r"1 of 2 conversations .* \(the longest takes 78\); raise it, or set data\.too_long"
    ):
        opened(tmp_path, too_long="refuse")
    assert opened(tmp_path, too_long="refuse", sequence_length=78).rows_per_epoch == 2
    with pytest.raises(UserError, match="the longest takes 78"):
        opened(tmp_path, too_long="refuse", sequence_length=77)


def test_each_objective_has_its_kind_of_rows(tmp_path: Path) -> None:
    kinds = {"pretrain": "pretrain", "sft": "sft", "dpo": "preference", "reward": "preference", "kto": "kto"}
    run: Any
    for objective, kind in kinds.items():
        run = Run(objective=objective)  # pyright: ignore[reportArgumentType]
        assert kind_of_rows(run) == kind
    assert kind_of_rows(Run(objective="sft", data=DataConfig(train_on="last"))) == "sft-last"
    every, last = opened(tmp_path), opened(tmp_path, train_on="last")
    assert every.parts.keys().isdisjoint(last.parts.keys())
    assert every.validation_bytes() == last.validation_bytes() == 0  # nothing is held out here
