"""Sources of every form give the same rows from any place, and malformed input is named by file and line.

A malformed row is counted and skipped up to a limit, then refused; a damaged file is one sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import UserError
from tests.text_fixtures import byte_tokenizer, chats, sentences, texts_of, write_form, write_jsonl
from train.data import sources as reading
from train.data.conversations import BadRowError, conversation
from train.data.prepare import prepare
from train.data.sources import BadRows, expand, read_documents, read_rows, scan


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrayrecord"])
def test_every_form_gives_the_same_documents_from_any_place(tmp_path: Path, form: str) -> None:
    texts = sentences(200)
    file = write_form(tmp_path, form, texts)
    rows = list(read_rows(file))
    assert [row.value["text"] for row in rows] == texts
    assert rows[4].where == f"{file}:5"
    for stop in (0, 29, 30, 64, 199):
        rest = [(row.value["text"], row.where) for row in read_rows(file, rows[stop].after)]
        assert rest == [(row.value["text"], row.where) for row in rows[stop + 1 :]]
    assert texts_of(prepare([file], byte_tokenizer(), tmp_path / "store")) == texts


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"), max_size=400), st.integers(1, 40))
def test_a_long_text_is_cut_into_documents_and_loses_no_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, limit: int
) -> None:
    monkeypatch.setattr(reading, "TEXT_BYTES", 4 * limit)
    file = tmp_path / "book.txt"
    file.write_bytes(text.encode())
    rows = list(scan(file))
    assert not any(row.problem for row in rows)
    pieces = [row.value["text"] for row in rows]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(len(piece.encode()) < 12 * limit for piece in pieces)
    for i, row in enumerate(rows):
        assert [other.value["text"] for other in scan(file, row.after)] == pieces[i + 1 :]
        before = text.encode()[: row.after.offset - len(pieces[i].encode())]
        assert row.where == f"{file}:{before.count(10) + 1}"


def test_a_text_file_is_one_document_unless_it_is_large(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("one\n\ntwo\n")
    (tmp_path / "large.txt").write_text("a paragraph of some words\n\n" * 10_000)
    assert [row.value["text"] for row in read_rows(tmp_path / "small.txt")] == ["one\n\ntwo\n"]
    pieces = [row.value["text"] for row in read_rows(tmp_path / "large.txt")]
    assert len(pieces) == 5
    assert all(piece.endswith("\n\n") for piece in pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def test_the_three_forms_of_conversations_are_one() -> None:
    wanted = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    messages = {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, wanted[1]]}
    sharegpt = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "tools": ""}
    alpaca = {"instruction": "2+2?", "input": "", "output": "4"}
    for row in (messages, sharegpt, alpaca):
        assert conversation(row) == (wanted, None)
    assert conversation({**alpaca, "input": "now"})[0][0]["content"] == "2+2?\nnow"
    assert conversation({**alpaca, "system": "Count."})[0][0] == {"role": "system", "content": "Count."}


def test_function_calls_become_tool_calls() -> None:
    call = '{"name": "area", "arguments": {"radius": 5}}'
    turns = [("human", "area?"), ("function_call", call), ("observation", "78.5"), ("gpt", "It is 78.5.")]
    row = {
        "conversations": [{"from": who, "value": what} for who, what in turns],
        "tools": '[{"name": "area", "parameters": {}}]',
    }
    messages, tools = conversation(row)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "area", "arguments": {"radius": 5}}}]
    assert tools == [{"type": "function", "function": {"name": "area", "parameters": {}}}]
    ids, mask = byte_tokenizer().encode_conversation(messages, tools=tools)
    said = byte_tokenizer().decode([i for i, own in zip(ids, mask, strict=True) if own])
    assert "radius" in said
    assert "observation" not in said


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "answer": "b"}, 'no "messages"'),
        ({"messages": []}, "not a list of turns"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "is a int"),
        ({"messages": [{"role": "assistant", "content": None}]}, "is a NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}, "unknown type 'image'"),
        ({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}, "surrogate"),
        ({"messages": "hello"}, "not a list of turns"),
        ({"messages": [{"content": "x"}]}, 'without a "role"'),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown speaker 'bot'"),
        ({"conversations": [{"from": "gpt"}]}, '"from" and "value"'),
        ({"conversations": [{"from": "function_call", "value": "area(5)"}]}, "not JSON"),
        ({"instruction": "a", "output": 4}, '"output" is a int'),
        ({"instruction": "a", "output": "b", "tools": "{"}, '"tools" is not JSON'),
    ],
)
def test_a_malformed_conversation_says_why(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        conversation(row)


# ---------------------------------------------------------------------------------------------------------------------
# Malformed input


BAD_LINES = [
    (b'{"text": "fine"', "not JSON"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'["text"]', "a JSON list"),
    (b'{"txt": "x"}', "no \"text\"; its fields are 'txt'"),
    (b'{"text": 7}', '"text" is a int'),
    (b'{"text": "\\ud83d"}', "surrogate"),
    (b"[" * 100_000, "not usable JSON"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_a_malformed_row_is_named_counted_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, problem: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b'\n\n{"text": ""}\n{"text": "two"}\n')
    store = prepare([file], byte_tokenizer(), tmp_path / "store", max_bad_rows=1)
    assert texts_of(store) == ["one", "two"]
    assert store.meta["bad_rows"] == 1
    said = capsys.readouterr().err
    assert f"{file}:2: " in said
    assert problem in said
    with pytest.raises(UserError, match="max_bad_rows allows 0") as refused:
        prepare([file], byte_tokenizer(), tmp_path / "strict", max_bad_rows=0)
    assert f"{file}:2: " in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "strict").exists()


def test_a_row_of_endless_length_is_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ROW_BYTES", 100)
    file = write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000, "short"])
    rows = list(read_rows(file, bad=BadRows(1)))
    assert [row.value["text"] for row in rows] == ["short"]
    assert rows[0].where == f"{file}:2"


def test_malformed_text_and_parquet_name_their_line(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    assert [(row.where, row.problem) for row in scan(tmp_path / "a.txt")] == [(f"{tmp_path}/a.txt:3", "not UTF-8")]
    broken = pyarrow.array([b"fine", b"\xff"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    assert [row.problem for row in scan(tmp_path / "a.parquet")] == ["", "not UTF-8"]


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl.gz", sentences(2000)).read_bytes()
    files = {
        "cut.jsonl.gz": good[: len(good) // 2],
        "not.jsonl.gz": b"plain text",
        "not.jsonl.zst": b"plain text",
        "not.parquet": b"plain text",
        "not.arrayrecord": b"plain text",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} is (damaged|not a readable)") as refused:
            list(read_rows(tmp_path / name))
        assert "\n" not in str(refused.value)


def test_sources_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "b.jsonl", ["x"])
    (tmp_path / "notes.md").write_text("x")
    assert expand([f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl"]) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(UserError, match=r"did you mean 'a\.jsonl'"):
        expand([f"{tmp_path}/aa.jsonl"])
    with pytest.raises(UserError, match="no file or directory matches"):
        expand([f"{tmp_path}/*.parquet"])
    with pytest.raises(UserError, match=r"notes\.md is none of"):
        expand([f"{tmp_path}/*"])
    with pytest.raises(UserError, match="is a directory but not a prepared one"):
        expand([str(tmp_path)])
    with pytest.raises(UserError, match="no source"):
        expand([])


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    for call in (
        lambda: prepare([tmp_path / "a.txt"], byte_tokenizer(), tmp_path / "store"),
        lambda: list(read_documents([f"{tmp_path}/a.txt"], 0)),
    ):
        with pytest.raises(UserError, match="the corpus is empty"):
            call()
    assert not (tmp_path / "store").exists()


def test_tokenizers_are_trained_on_text_and_on_conversations(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "", "two"])
    write_jsonl(tmp_path / "b.jsonl", chats(1))
    assert list(read_documents([f"{tmp_path}/*.jsonl"], 0)) == ["one", "two", "question 0 0\nANSWER 0 0"]
