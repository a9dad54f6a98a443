"""Law: the `tokenizers` library, given the files that we write for transformers, encodes any text as we do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as protocol

from errors import UserError
from model.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from model.tokenizer import Tokenizer
from model.tokenizer_backends import MARKUP
from model.tokenizer_export import hugging_face_files
from model.tokenizer_training import FRAME, SPECIALS, train_tokenizer
from tests.text_fixtures import byte_tokenizer
from tests.tokenizer_fixtures import (
    DEMO,
    FORMS,
    PROPERTY,
    any_text,
    control_text,
    demo_texts,
    model_tokenizer,
    plain_model,
)

DATA = Path(__file__).parent / "data"
SIZES = (340, 1000, 8000)
MESSAGES = [
    {"role": "system", "content": "Sois bref."},
    {"role": "user", "content": "2 + 3 从前?"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\n5"},
    {"role": "user", "content": "<|im_end|> again"},
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Tokenizers of every origin, by name."""
    directory = tmp_path_factory.mktemp("tokenizers")
    made = {f"trained {n}": train_tokenizer(demo_texts(), n, directory / str(n), progress=False) for n in SIZES}
    made["demo"] = Tokenizer.load(DEMO / "tiny_tokenizer")
    made["llama"] = Tokenizer({"tokenizer.model": (DATA / "tok512.model").read_bytes()}, "llama")
    words = ("▁▁", "▁▁▁▁", "\n\n", "the", "<|im_end|>", "<think>")
    made["words"] = model_tokenizer(plain_model(**FORMS[1], user_defined_symbols=words))
    for form in FORMS:
        made[str(form)] = model_tokenizer(plain_model(**form))
    made["bytes"] = byte_tokenizer()
    return made


class Exported:
    """What was written of a tokenizer, as the library and as we read it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.files = hugging_face_files(tokenizer)
        self.library = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
        self.ours = Tokenizer(self.files, "exported")
        added = json.loads(self.files["tokenizer.json"])["added_tokens"]
        self.controls = [token["content"] for token in added if tokenizer.token_id(token["content"]) == token["id"]]

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text).ids


@pytest.fixture(scope="module")
def exported(kinds: dict[str, Tokenizer]) -> dict[str, Exported]:
    return {name: Exported(tokenizer) for name, tokenizer in kinds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Any text


@PROPERTY
@given(text=any_text)
def test_any_text_gets_the_same_ids(kinds: dict[str, Tokenizer], exported: dict[str, Exported], text: str) -> None:
    for name, tokenizer in kinds.items():
        written = exported[name]
        ids = tokenizer.encode(text)
        assert written.ours.encode(text) == ids, name
        if not any(control in text for control in SPECIALS):
            assert written.encode(text) == ids, name


@PROPERTY
@given(text=control_text)
def test_control_tokens_in_a_text_are_found_as_we_find_them(
    kinds: dict[str, Tokenizer], exported: dict[str, Exported], text: str
) -> None:
    for name, tokenizer in kinds.items():
        ids = tokenizer.encode(text, specials=True)
        assert exported[name].encode(text) == ids, name
        assert exported[name].ours.encode(text, specials=True) == ids, name


@PROPERTY
@given(text=st.one_of(any_text, control_text), skip=st.booleans())
def test_ids_of_a_text_decode_to_the_same_text(
    kinds: dict[str, Tokenizer], exported: dict[str, Exported], text: str, skip: bool
) -> None:
    for name, tokenizer in kinds.items():
        ids = tokenizer.encode(text, specials=True)
        if tokenizer.token_id("<unk>") not in ids:  # we show U+FFFD for it, the library its name
            shown = tokenizer.decode(ids, skip_specials=skip)
            assert exported[name].library.decode(ids, skip_special_tokens=skip) == shown, name
            assert exported[name].ours.decode(ids, skip_specials=skip) == shown, name


def test_whole_documents_and_every_piece(kinds: dict[str, Tokenizer], exported: dict[str, Exported]) -> None:
    for name, tokenizer in kinds.items():
        raw = [tokenizer.token_bytes(i) for i in range(0, tokenizer.vocab_size, 1 + tokenizer.vocab_size // 5000)]
        pieces = [piece.decode("utf-8", "ignore") for piece in raw if not piece.startswith(b"<")]
        for text in (*demo_texts()[::5], "".join(pieces), " ".join(pieces), *pieces[:1000]):
            assert exported[name].encode(text) == tokenizer.encode(text), name


# ---------------------------------------------------------------------------------------------------------------------
# Any vocabulary


def built(pieces: Sequence[tuple[str, float, int]], **options: Any) -> bytes:
    """A sentencepiece model of these (text, score, kind), with <unk>, </s> and the bytes before them."""
    proto: Any = protocol.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.trainer_spec.model_type = options.pop("model_type", 2)
    proto.trainer_spec.byte_fallback = options.pop("byte_fallback", True)
    proto.trainer_spec.treat_whitespace_as_suffix = options.pop("suffix", False)
    for name, value in ({"add_dummy_prefix": False, "remove_extra_whitespaces": False} | options).items():
        setattr(proto.normalizer_spec, name, value)
    spelled = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256) if proto.trainer_spec.byte_fallback]
    for text, score, kind in [("<unk>", 0.0, UNKNOWN), ("</s>", 0.0, CONTROL), *spelled, *pieces]:
        proto.pieces.add(piece=text, score=score, type=kind)
    return proto.SerializeToString()


@st.composite
def vocabularies(draw: st.DrawFn) -> bytes:
    """Models that nothing has learned: pieces in an order that makes no sense, many of them out of reach."""
    words = draw(st.lists(st.text("ab\u2581", min_size=2, max_size=6), unique=True, max_size=25))
    order = draw(st.permutations(["a", "b", "\u2581", *words]))
    options = draw(st.sampled_from(FORMS))
    whole = draw(st.booleans()) and options == FORMS[1]
    rows: list[tuple[str, float, int]] = []
    for place, text in enumerate(order):
        is_word = whole and len(text) > 1 and draw(st.integers(0, 9)) == 0
        rows.append((text, 0.0, USER_DEFINED) if is_word else (text, -1.0 - place, NORMAL))
    return built(rows, **options)


@settings(PROPERTY, max_examples=300)
@given(model=vocabularies(), texts=st.lists(st.text("ab c\u2581", max_size=60), min_size=1, max_size=8))
def test_any_vocabulary_merges_alike(model: bytes, texts: list[str]) -> None:
    tokenizer = model_tokenizer(model)
    written = Exported(tokenizer)
    for text in texts:
        assert written.encode(text) == tokenizer.encode(text)


def test_each_piece_has_one_merge_at_most(exported: dict[str, Exported]) -> None:
    merges = json.loads(exported["trained 8000"].files["tokenizer.json"])["model"]["merges"]
    made = [left + right for left, right in merges]
    assert len(made) == len(set(made)) > 3000


def test_a_vocabulary_without_a_space(tmp_path: Path) -> None:
    tokenizer = model_tokenizer(built([("a", -2, NORMAL), ("aa", -1, NORMAL)]))
    written = Exported(tokenizer)
    for text in ("a a", "aaa", " ", "\u2581 a"):
        assert written.encode(text) == tokenizer.encode(text) == written.ours.encode(text)


# ---------------------------------------------------------------------------------------------------------------------
# Reading back


def test_what_is_read_back_is_the_same_tokenizer(
    kinds: dict[str, Tokenizer], exported: dict[str, Exported], tmp_path: Path
) -> None:
    for n, (name, tokenizer) in enumerate(kinds.items()):
        directory = tmp_path / str(n)
        directory.mkdir()
        for file, content in exported[name].files.items():
            (directory / file).write_bytes(content)
        again = Tokenizer.load(directory)
        assert again.vocab_size == tokenizer.vocab_size, name
        assert again.stop_ids == tokenizer.stop_ids, name
        assert (again.document_end_id, again.pad_id) == (tokenizer.document_end_id, tokenizer.pad_id), name
        assert [again.token_id(p) for p in exported[name].controls] == [
            tokenizer.token_id(p) for p in exported[name].controls
        ]
        assert again.render(MESSAGES) == tokenizer.render(MESSAGES), name
        assert again.encode_chat(MESSAGES) == tokenizer.encode_chat(MESSAGES), name
        if "trained" in name:
            assert again.encode_conversation(MESSAGES) == tokenizer.encode_conversation(MESSAGES), name


def test_markup_is_shown_and_the_frame_is_not(exported: dict[str, Exported]) -> None:
    added = json.loads(exported["trained 1000"].files["tokenizer.json"])["added_tokens"]
    assert {token["content"]: token["special"] for token in added} == {
        **dict.fromkeys(FRAME, True),
        **dict.fromkeys(MARKUP, False),
    }
    library = exported["trained 1000"].library
    text = "<|im_start|>assistant\n<think>\nx</think><|im_end|>"
    assert library.decode(library.encode(text).ids) == "assistant\n<think>\nx</think>"


def test_named_tokens_are_control_tokens(exported: dict[str, Exported]) -> None:
    def named(name: str) -> dict[str, str]:
        config = json.loads(exported[name].files["tokenizer_config.json"])
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        return {key: value for key, value in config.items() if key.endswith("_token") and value is not None}

    assert named("trained 340") == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} == named("bytes")
    assert named("llama") == {"eos_token": "</s>", "pad_token": "</s>"}


def test_settings_that_would_change_ids_are_left_behind() -> None:
    old = {"add_bos_token": True, "eos_token": {"content": "</s>"}, "pad_token": "[PAD]", "model_max_length": 2048}
    old |= {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "additional_special_tokens": ["[X]"]}
    files = {"tokenizer.model": (DATA / "tok512.model").read_bytes(), "tokenizer_config.json": json.dumps(old).encode()}
    config = json.loads(hugging_face_files(Tokenizer(files, "llama"))["tokenizer_config.json"])
    assert config["eos_token"] == config["pad_token"] == "</s>"
    assert config["model_max_length"] == 2048
    assert config["unk_token"] is None
    assert not config.keys() & {"add_bos_token", "additional_special_tokens"}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_tokenizer_json_and_its_settings_stay_as_they_are() -> None:
    raw = gzip.decompress((DATA / "qwen3_tokenizer.json.gz").read_bytes())
    files: Mapping[str, bytes] = {"tokenizer.json": raw, "tokenizer_config.json": b'{"eos_token":  "<|im_end|>"}'}
    written = hugging_face_files(Tokenizer(files, "qwen3"))
    assert {name: written[name] for name in files} == files
    assert written.keys() - files.keys() == {"chat_template.jinja"}
    assert byte_tokenizer().files.items() <= hugging_face_files(byte_tokenizer()).items()


def test_the_sentencepiece_model_goes_along(kinds: dict[str, Tokenizer], exported: dict[str, Exported]) -> None:
    for name, tokenizer in kinds.items():
        for file, content in tokenizer.files.items():
            if file != "tokenizer_config.json":
                assert exported[name].files[file] == content, name
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= exported[name].files.keys()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: plain_model(model_type="unigram"), "unigram"),
        (lambda: plain_model(model_type="char"), "char"),
        (lambda: plain_model(normalization_rule_name="nmt_nfkc"), "normalises"),
        (lambda: plain_model(treat_whitespace_as_suffix=True), "white space"),
        (lambda: built([("\u2581", -1, NORMAL)], escape_whitespaces=False), "white space"),
        (lambda: built([("\u2581", -1, NORMAL), ("a", -2, UNUSED)]), "unused"),
        (lambda: built([("\u2581", -1, NORMAL), ("a b", -2, NORMAL)]), "plain space"),
        (lambda: built([("\u2581", -1, NORMAL), ("ab", 0, USER_DEFINED)], add_dummy_prefix=True), "'ab'"),
        (lambda: built([("a", -1, NORMAL)], add_dummy_prefix=True), "no piece for a space"),
        (lambda: built([("\u2581", -1, NORMAL), ("a", -2, NORMAL), ("ab", -3, NORMAL)]), "'b', which is no piece"),
        (
            lambda: built([(p, -9, NORMAL) for p in "\u2581abc"] + [("ab", -1, NORMAL), ("bc", -1, NORMAL)]),
            "'ab' and 'bc' have the same score",
        ),
    ],
)
def test_what_the_library_cannot_do_is_refused_in_a_sentence(model: Any, why: str) -> None:
    with pytest.raises(UserError, match=f"tokenizer.model cannot become .*{why}.*put a tokenizer.json") as caught:
        hugging_face_files(model_tokenizer(model()))
    assert "\n" not in str(caught.value)
