"""Law: decoding gives back the text that was encoded, whole or as a stream, and no text spells a control token."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import UserError
from model.tokenizer import StreamDecoder, Tokenizer
from model.tokenizer_training import RESERVED, SMALLEST, SPECIALS, train_tokenizer
from train.tokenizer_verb import Excerpts, tokenizer_main

DATA = Path(__file__).parent / "data"
CORPUS = [
    "Once upon a time there was a little girl who lived near the sea.\nShe liked to read.\n\n",
    "def add(a, b):\n    total = a + b\n    return total\n\n\nprint(add(12, 345))\n",
    "从前有一只小鸟，它不会飞。一个小女孩每天喂它吃米。\n",
    "L'été dernier, j'ai mangé des crêpes à la plage avec ma mère.\n",
] * 8
CONFIG = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "bos_token": None}
FORGERIES = ["<|im_end|>", "<|im_start|>assistant\n", "<think>", "</tool_call>", "<|im_", "end|>", "<", " "]
PROPERTY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
any_text = st.one_of(st.text(), st.lists(st.sampled_from([*FORGERIES, "\u2581", "\r\n", "  ", "你", "é"])).map("".join))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("qwen3")
    (directory / "tokenizer.json").write_bytes(gzip.decompress((DATA / "qwen3_tokenizer.json.gz").read_bytes()))
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(CORPUS, 480, tmp_path_factory.mktemp("trained") / "tokenizer", progress=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A sentencepiece model that puts a space in front of text, and brings no config."""
    directory = tmp_path_factory.mktemp("llama")
    (directory / "tokenizer.model").write_bytes((DATA / "tok512.model").read_bytes())
    return Tokenizer.load(directory)


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    stream = StreamDecoder(tokenizer, **options)
    return "".join([*(stream.push(i) for i in ids), stream.finish()])


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@PROPERTY
@given(text=any_text)
def test_trained_tokenizer_gives_back_any_text(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert streamed(trained, ids) == text
    assert trained.decode(trained.encode(text, specials=True)) == text


@PROPERTY
@given(text=any_text)
def test_qwen_gives_back_the_composed_form_of_any_text(qwen: Tokenizer, text: str) -> None:
    ids = qwen.encode(text)
    assert qwen.decode(ids) == unicodedata.normalize("NFC", text) == streamed(qwen, ids)


@PROPERTY
@given(ids=st.lists(st.integers(-2, 600)), skip=st.booleans())
def test_a_stream_adds_up_to_decode_and_never_splits_a_character(
    trained: Tokenizer, llama: Tokenizer, ids: list[int], skip: bool
) -> None:
    for tokenizer in (trained, llama):
        assert streamed(tokenizer, ids, skip_specials=skip) == tokenizer.decode(ids, skip_specials=skip)


def test_a_stream_waits_for_whole_characters(trained: Tokenizer) -> None:
    ids = trained.encode("😀")
    assert len(ids) == 4
    stream = StreamDecoder(trained)
    assert [stream.push(i) for i in ids] == ["", "", "", "😀"]
    stream = StreamDecoder(trained)
    assert stream.push(ids[0]) + stream.push(ids[1]) == ""
    assert stream.finish() == "\ufffd"


def test_bytes_that_are_no_text_decode_to_replacement_characters(trained: Tokenizer) -> None:
    byte = [trained.token_id(f"<0x{value:02X}>") for value in (0xFF, 0x61, 0xE4, 0xBD)]
    assert trained.decode([i for i in byte if i is not None]) == "\ufffda\ufffd"


def test_lone_surrogates_become_replacement_characters(trained: Tokenizer, qwen: Tokenizer) -> None:
    for tokenizer in (trained, qwen):
        assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_sentencepiece_ids_are_those_of_the_library(llama: Tokenizer) -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_proto=(DATA / "tok512.model").read_bytes())
    for text in ("Once upon a time, Lily said: hi!", " two  spaces\n", "¿Qué? 你"):
        assert llama.encode(text) == library.encode(text)
        assert llama.decode(llama.encode(text)) == library.decode(library.encode(text))
    assert llama.encode("</s>") == library.encode("</s>")
    assert llama.document_end_id in llama.encode("a</s>", specials=True)


# ---------------------------------------------------------------------------------------------------------------------
# Qwen's vocabulary


def test_qwen_encodings_are_the_recorded_ones(qwen: Tokenizer) -> None:
    for row in json.loads((DATA / "qwen3_encodings.json").read_text(encoding="utf-8"))["texts"]:
        assert qwen.encode(row["text"]) == row["ids"], row["text"]


def test_qwen_ids_that_others_rely_on(qwen: Tokenizer) -> None:
    assert qwen.vocab_size == 151669
    assert qwen.token_id("<|im_end|>") == 151645
    assert qwen.token_id("no such piece") is None
    assert qwen.stop_ids == (151645, 151643)
    assert qwen.document_end_id == qwen.pad_id == 151643
    assert len(qwen.encode("20240131")) == 8


def test_markup_survives_where_the_frame_is_skipped(qwen: Tokenizer, trained: Tokenizer) -> None:
    text = "<|im_start|>assistant\n<think>\nx\n</think>\n\n<tool_call>{}</tool_call><|im_end|><|endoftext|>"
    for tokenizer in (qwen, trained):
        ids = tokenizer.encode(text, specials=True)
        shown = "assistant\n<think>\nx\n</think>\n\n<tool_call>{}</tool_call>"
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_specials=True) == shown == streamed(tokenizer, ids, skip_specials=True)


# ---------------------------------------------------------------------------------------------------------------------
# Control tokens


@PROPERTY
@given(text=any_text)
def test_text_spells_no_control_token(qwen: Tokenizer, trained: Tokenizer, text: str) -> None:
    for tokenizer in (qwen, trained):
        controls = {tokenizer.token_id(piece) for piece in SPECIALS}
        assert not controls & set(tokenizer.encode(text))
        found = [i for i in tokenizer.encode(text, specials=True) if i in controls]
        assert len(found) == sum(text.count(piece) for piece in SPECIALS)


def hugging_face(directory: Path, **changes: Any) -> Tokenizer:
    """A byte-level tokenizer.json with everything that could come between a text and its tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "<bos>", "ab"])}
    library = Library(models.BPE(vocabulary, [("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("[END]", special=True)])
    library.add_tokens([AddedToken("    ", normalized=False), AddedToken("<tag>", lstrip=True, rstrip=True)])
    library.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    library.enable_truncation(3)
    library.enable_padding(length=20)
    data = json.loads(library.to_str()) | changes
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    listed = {"262": {"content": "<late>", "special": False}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    return Tokenizer.load(directory)


def test_added_tokens_of_every_kind(tmp_path: Path) -> None:
    tokenizer = hugging_face(tmp_path)
    assert tokenizer.encode("ab    ab") == [257, 259, 257]  # a run of spaces is a word, wherever it stands
    ids = {piece: tokenizer.token_id(piece) for piece in ("<bos>", "[END]", "<tag>", "<late>")}
    assert ids == {"<bos>": 256, "[END]": 258, "<tag>": 260, "<late>": 262}
    text = "<bos>ab[END] <late>"
    assert not set(ids.values()) & set(tokenizer.encode(text))
    assert tokenizer.encode(text, specials=True) == [256, 257, 258, *tokenizer.encode(" "), 262]
    assert tokenizer.encode("ab <tag>\nab", specials=True) == [257, 260, 257]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, specials=True), skip_specials=True) == "ab <late>"
    assert len(tokenizer.encode("x" * 50)) == 50  # neither cut nor filled up
    with pytest.raises(UserError, match="no token that ends a document"):
        _ = tokenizer.document_end_id


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_save_keeps_bytes_and_tokens(trained: Tokenizer, qwen: Tokenizer, tmp_path: Path) -> None:
    copy = tmp_path
    for tokenizer in (trained, qwen):
        copy = tmp_path / Path(tokenizer.source).parent.name
        tokenizer.save(copy)
        for original in Path(tokenizer.source).iterdir():
            assert (copy / original.name).read_bytes() == original.read_bytes()
    assert Tokenizer.load(copy).fingerprint == qwen.fingerprint != trained.fingerprint


def test_a_tokenizer_can_be_sent_to_another_process(trained: Tokenizer) -> None:
    sent = pickle.loads(pickle.dumps(trained))
    assert sent.fingerprint == trained.fingerprint
    assert sent.encode("a<think>", specials=True) == trained.encode("a<think>", specials=True)


def test_what_cannot_be_loaded_is_said_in_a_sentence(trained: Tokenizer, tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            Tokenizer.load(path).encode_chat([{"role": "user", "content": "x"}])
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "neither tokenizer.model nor tokenizer.json")
    for name, content, match in (
        ("tokenizer.model", b"\x00\x01nonsense", "damaged"),
        ("tokenizer.model", b"", "damaged"),
        ("tokenizer.json", b"{", "damaged"),
        ("tokenizer.json", b"[]", "damaged"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "ByteLevel"),
        ("tokenizer_config.json", b"{]", "not JSON"),
        ("tokenizer_config.json", b"3", "JSON object"),
        ("chat_template.jinja", b"{% if %}", "not valid, line 1"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ):
        trained.save(tmp_path)
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, match)
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    refused(tmp_path / "tokenizer.model", "is a file")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_control_tokens_come_first_and_are_atomic(trained: Tokenizer) -> None:
    assert trained.vocab_size == 480
    assert [trained.token_id(piece) for piece in SPECIALS] == list(range(1, 10))
    assert SPECIALS[:4] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")
    assert trained.stop_ids == (3, 1)
    assert trained.document_end_id == trained.pad_id == 1
    assert len(trained.encode("2024")) == 4
    assert len(trained.encode("little girl")) < 8


def test_training_repeats_itself(trained: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(CORPUS), 480, tmp_path / "again", progress=False)
    assert again.fingerprint == trained.fingerprint


def test_any_character_may_stand_in_the_corpus(tmp_path: Path) -> None:
    odd = ["a\0b \u2581 \u2585\t<|im_end|>\r\n\ud800 \ufeff e\u0301 \u2028\u3000", "word " * 3000, ""]
    tokenizer = train_tokenizer([*CORPUS, *odd], 400, tmp_path / "odd", progress=False)
    assert tokenizer.decode(tokenizer.encode(odd[0])) == odd[0].replace("\ud800", "\ufffd")
    assert len(tokenizer.encode(" word")) == 1  # a line of any length is learned from


def test_many_characters_leave_room_for_words(tmp_path: Path) -> None:
    rng = random.Random(0)
    rare = "".join(chr(0x4E00 + rng.randrange(6000)) for _ in range(8000))
    tokenizer = train_tokenizer([rare, "the same words again " * 2000], 400, tmp_path / "rare", progress=False)
    assert tokenizer.vocab_size == 400
    assert len(tokenizer.encode(" words again")) == 2
    assert tokenizer.decode(tokenizer.encode(rare)) == rare


def test_a_sample_of_a_large_corpus_is_enough(tmp_path: Path) -> None:
    corpus = (line for _ in range(200) for line in CORPUS)
    tokenizer = train_tokenizer(corpus, 400, tmp_path / "sampled", progress=False, sample_bytes=20_000)
    assert tokenizer.vocab_size == 400


def test_impossible_trainings_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for texts, size, match in (
        ([], 500, "corpus is empty"),
        (["", " \n"], 500, "corpus is empty"),
        (CORPUS, 100, f"at least {SMALLEST}"),
        (["abcd"], 5000, r"more than the corpus supports: at most 27\d"),
    ):
        with pytest.raises(UserError, match=match):
            train_tokenizer(texts, size, out, progress=False)
    assert SMALLEST > RESERVED
    assert list(tmp_path.iterdir()) == []


def test_only_a_tokenizer_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_tokenizer(CORPUS, 400, out, progress=False)
    assert train_tokenizer(CORPUS, 420, out, progress=False).vocab_size == 420
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        train_tokenizer(CORPUS, 400, out, progress=False)
    with pytest.raises(UserError, match="is a file"):
        train_tokenizer(CORPUS, 400, out / "thesis.txt", progress=False)
    assert Tokenizer.load(out).vocab_size == 420
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_verb_trains_measures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in CORPUS))
    words = [str(corpus), "--vocab-size", "450", "--out", str(tmp_path / "tok"), "--json", str(tmp_path / "tok.json")]
    assert tokenizer_main(words) == 0
    result = json.loads((tmp_path / "tok.json").read_text())
    assert result["vocab_size"] == 450
    assert result["documents"] == len(CORPUS)
    assert result["characters"] == sum(map(len, CORPUS))
    assert 1 < result["characters_per_token"] <= result["bytes_per_token"]
    assert result["fingerprint"] == Tokenizer.load(tmp_path / "tok").fingerprint
    assert "characters per token" in capsys.readouterr().out
    with pytest.raises(UserError, match="vocab-size"):
        tokenizer_main([str(corpus), "--out", "x", "--vocab-size", "many"])


def test_excerpts_are_an_even_sample() -> None:
    excerpts = Excerpts()
    assert len(list(excerpts.watch(str(i) for i in range(5000)))) == 5000
    kept = [int(text) for text in excerpts._kept]
    assert len(kept) == 256
    assert 2000 < sum(kept) / len(kept) < 3000
