"""Law: preferences in every form that others use become the same pairs and judgements, or a reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.feedback import Feedback
from tests.text_fixtures import byte_tokenizer, write_jsonl
from train.data.conversations import BadRowError
from train.data.encoding import Encoded, encode_row
from train.data.kinds import Kind
from train.data.preferences import judged_of, pair_of
from train.data.prepare import prepare
from train.data.sources import Row

Turn = dict[str, Any]


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


ASKED, GOOD, BAD = [user("2+2?")], [assistant("4")], [assistant("5")]
HH = "\n\nHuman: 2+2?\n\nAssistant:"
PAIRS: dict[str, Turn] = {
    "feedback": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "kind": "arena", "winner": "a", "time": 1},
    "trl text": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "trl mixed": {"prompt": ASKED, "chosen": "4", "rejected": BAD},
    "implicit prompt": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "ultrafeedback": {"prompt": "2+2?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD, "score_chosen": 8.0},
    "prompt repeated": {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "llama-factory sharegpt": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "llama-factory openai": {"messages": ASKED, "chosen": GOOD[0], "rejected": BAD[0]},
    "alpaca": {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
    "hh": {"chosen": f"{HH} 4", "rejected": f"{HH} 5"},
    "hh with a prompt": {"prompt": HH, "chosen": " 4", "rejected": " 5"},
}
JUDGED: dict[str, Turn] = {
    "trl text": {"prompt": "2+2?", "completion": "4", "label": True},
    "trl messages": {"prompt": ASKED, "completion": GOOD, "label": True},
    "feedback": {"prompt": ASKED, "completion": GOOD, "label": True, "kind": "vote", "model": "m"},
    "messages": {"messages": ASKED + GOOD, "label": True},
    "kto_tag": {
        "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
        "kto_tag": True,
    },
}


@pytest.mark.parametrize("form", PAIRS)
def test_every_form_of_pairs_is_the_same_pair(form: str) -> None:
    pair = pair_of(PAIRS[form])
    assert pair is not None
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin, pair.tools) == (ASKED, GOOD, BAD, 0.0, None)
    more = pair_of({**PAIRS[form], "margin": 1.25, "system": "Count.", "tools": [{"name": "add"}]})
    assert more is not None
    assert more.prompt == [{"role": "system", "content": "Count."}, *ASKED]
    assert (more.margin, more.tools) == (1.25, [{"type": "function", "function": {"name": "add"}}])


@pytest.mark.parametrize("form", JUDGED)
@pytest.mark.parametrize("good", [True, False])
def test_every_form_of_judged_replies_is_the_same(form: str, good: bool) -> None:
    row = {name: good if value is True else value for name, value in JUDGED[form].items()}
    judged = judged_of(row)
    assert judged is not None
    assert (judged.prompt, judged.reply, judged.good) == (ASKED, GOOD, good)


def test_conversations_share_what_they_begin_with() -> None:
    first = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: "
    pair = pair_of({"chosen": first + "Because.\n\nOf that.", "rejected": first + "No."})
    assert pair is not None
    assert pair.prompt == [user("Hi"), assistant("Hello"), user("Why?")]
    assert pair.chosen == [assistant("Because.\n\nOf that.")]
    assert pair.rejected == [assistant("No.")]
    longer = [assistant("a"), user("more"), assistant("b")]
    pair = pair_of({"chosen": ASKED + longer, "rejected": ASKED + BAD})
    assert pair is not None
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, longer, BAD)
    went_on = pair_of({"prompt": ASKED + GOOD, "chosen": [user("and?"), *GOOD], "rejected": [user("and?"), *BAD]})
    assert went_on is not None
    assert (went_on.prompt, went_on.chosen) == (ASKED + GOOD, [user("and?"), *GOOD])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen is equal to rejected"),
        ({"chosen": ASKED + GOOD, "rejected": ASKED + GOOD}, "chosen is equal to rejected"),
        ({"chosen": ASKED + GOOD, "rejected": [user("3+3?"), *BAD]}, "no beginning in common"),
        ({"chosen": ASKED + GOOD, "rejected": [*ASKED, *GOOD, user("x")]}, "no more than the beginning of the other"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected: turn 1 of the assistant is empty"),
        ({"prompt": "q", "chosen": [assistant("")], "rejected": "a"}, "chosen: turn 1 of the assistant is empty"),
        ({"prompt": "q", "chosen": "a"}, 'no "rejected"'),
        ({"text": "a"}, "no \"chosen\"; its fields are 'text'"),
        ({"prompt": ASKED, "chosen": [*GOOD, user("x")], "rejected": BAD}, "does not end with a turn of the assistant"),
        ({"prompt": [{"role": "robot", "content": "x"}], "chosen": "a", "rejected": "b"}, "unknown role 'robot'"),
        ({"prompt": "q", "chosen": {"from": "bot", "value": "x"}, "rejected": "b"}, "unknown speaker 'bot'"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, '"chosen" is a int'),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "q\ud800", "chosen": "a", "rejected": "b"}, "surrogate"),
        ({**PAIRS["trl text"], "margin": -1}, "not a number of 0 or more"),
        ({**PAIRS["trl text"], "margin": float("nan")}, "not a number of 0 or more"),
        ({**PAIRS["trl text"], "margin": "1"}, "not a number of 0 or more"),
        ({**PAIRS["trl text"], "margin": 700}, "the largest is 655.35"),
    ],
)
def test_a_malformed_pair_says_why(row: Turn, problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        pair_of(row)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "completion": "a", "label": 1}, '"label" is 1, neither true nor false'),
        ({"prompt": "q", "completion": "a"}, '"label" is None'),
        ({"prompt": "q", "completion": "", "label": True}, "completion: turn 1 of the assistant is empty"),
        ({"completion": "a", "label": True}, "no prompt"),
        ({"messages": GOOD, "label": True}, "no prompt"),
        ({"messages": ASKED, "label": True}, "does not end with a turn of the assistant"),
        ({"label": True}, 'no "completion"'),
        ({"messages": [{"role": "robot", "content": "x"}], "label": True}, "unknown role 'robot'"),
    ],
)
def test_a_malformed_judgement_says_why(row: Turn, problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        judged_of(row)


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def encoded(kind: Kind, row: Turn) -> Encoded:
    found = encode_row(byte_tokenizer(), kind, Row(row, "here"))
    assert isinstance(found, Encoded), found
    assert found.loss_mask is not None
    assert len(found.loss_mask) == len(found.tokens)
    return found


def spelled(tokens: Any) -> str:
    return byte_tokenizer().decode(tokens.tolist())


EMPTY = "<think>\n\n</think>\n\n"


def test_a_pair_is_one_document_with_a_header_and_both_sides() -> None:
    row = {"prompt": [*ASKED, assistant("old"), user("again")], "chosen": GOOD, "rejected": "5!", "margin": 0.5}
    document = encoded("preference", row)
    assert document.loss_mask is not None
    first, margin = document.tokens[:2].tolist()
    assert margin == 50
    head = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nold<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n"
    head += "<|im_start|>assistant\n"
    assert spelled(document.tokens[2 : 2 + first]) == f"{head}{EMPTY}4<|im_end|>\n"
    assert spelled(document.tokens[2 + first :]) == f"{head}{EMPTY}5!<|im_end|>\n"
    learned = document.loss_mask
    assert not learned[:2].any()
    assert spelled(document.tokens[2 : 2 + first][learned[2 : 2 + first]]) == f"{EMPTY}4<|im_end|>"
    assert spelled(document.tokens[2 + first :][learned[2 + first :]]) == f"{EMPTY}5!<|im_end|>"


def test_a_judged_reply_is_one_document_with_a_header() -> None:
    for good in (True, False):
        document = encoded("kto", {"messages": [*ASKED, assistant("old"), user("more"), *GOOD], "label": good})
        assert document.tokens[0] == good
        assert document.loss_mask is not None
        assert spelled(document.tokens[1:]).startswith("<|im_start|>user\n2+2?")
        assert spelled(document.tokens[document.loss_mask]) == f"{EMPTY}4<|im_end|>"


def test_what_differs_in_a_way_that_the_template_does_not_show_is_no_pair() -> None:
    row = {"prompt": "q", "chosen": [assistant("\na")], "rejected": [assistant("\n\na")]}
    assert encode_row(byte_tokenizer(), "preference", Row(row, "")) == (
        "chosen is equal to rejected, as the chat template writes them"
    )
    long = {"prompt": "q", "chosen": "x" * 70_000, "rejected": "b"}
    assert "the most is 65,535" in str(encode_row(byte_tokenizer(), "preference", Row(long, "")))


def test_the_file_of_feedback_is_read_by_both_and_each_takes_its_own(tmp_path: Path) -> None:
    file = tmp_path / "feedback.jsonl"
    feedback = Feedback(file)
    feedback.vote("m", ASKED, "4", True)
    feedback.vote("m", ASKED, "5", False)
    feedback.correction("m", ASKED, "5", "4")
    feedback.arena(("m", "n"), ASKED, ("5", "4"), "b")
    feedback.arena(("m", "n"), ASKED, ("4", "four"), "tie")
    pairs = prepare([file], byte_tokenizer(), tmp_path / "pairs", objective="preference", max_bad_rows=0)
    votes = prepare([file], byte_tokenizer(), tmp_path / "votes", objective="kto", max_bad_rows=0)
    assert (len(pairs), len(votes)) == (2, 2)
    assert pairs[0].tokens.tolist() == pairs[1].tokens.tolist()
    assert [int(votes[i].tokens[0]) for i in range(2)] == [1, 0]
    assert pairs.meta["bad_rows"] == votes.meta["bad_rows"] == 0
    assert len(file.read_text().splitlines()) == 5


def test_forms_survive_files_and_bad_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [*PAIRS.values(), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    store = prepare([write_jsonl(tmp_path / "a.jsonl", rows)], byte_tokenizer(), tmp_path / "a", objective="preference")
    assert len({tuple(store[i].tokens.tolist()) for i in range(len(store))}) == 1
    assert (len(store), store.meta["bad_rows"]) == (len(PAIRS), 1)
    assert f"{tmp_path}/a.jsonl:12: chosen is equal to rejected; skipped" in capsys.readouterr().err
    table = pyarrow.Table.from_pylist(
        [{**PAIRS["implicit prompt"], "margin": None}, {**PAIRS["implicit prompt"], "margin": 2.0}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    store = prepare([tmp_path / "b.parquet"], byte_tokenizer(), tmp_path / "b", objective="preference")
    assert [int(store[i].tokens[1]) for i in range(2)] == [0, 200]
    assert json.loads((tmp_path / "b" / "meta.json").read_text())["objective"] == "preference"
