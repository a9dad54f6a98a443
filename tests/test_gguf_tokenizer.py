"""Law: the tokenizer in a GGUF file cuts text as the one that it was made of.

The originals are Qwen3's tokenizer.json and a sentencepiece model of llama2.c.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import ROOT
from gguf_fixtures import add_sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from model.gguf_format import GGUFFile
from model.gguf_tokenizer import read_tokenizer
from model.tokenizer import Tokenizer

DATA = ROOT / "tests" / "data"
PROPERTY = settings(deadline=None, max_examples=100)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
LETTERS = "aeiou thnsrOnceLly.,'\"!0123456789\n\t  é你\u2028½<|>_"


def written(path: Path, architecture: str, fill: Any) -> Tokenizer:
    """The tokenizer of a file without weights, whose metadata `fill` writes."""
    writer = gguf.GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_tokenizer(GGUFFile(path).metadata, path)


@pytest.fixture(scope="module")
def qwen_json() -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / "qwen3_tokenizer.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def qwen(qwen_json: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Qwen3's tokenizer, as llama.cpp's converter writes it."""
    texts = {i: text for text, i in qwen_json["model"]["vocab"].items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in qwen_json["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    size = max(texts) + 200  # the embedding has more rows than there are tokens
    for i in range(size):
        texts.setdefault(i, f"[PAD{i}]")
        types.setdefault(i, gguf.TokenType.UNUSED)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([texts[i] for i in range(size)])
        writer.add_token_types([types[i] for i in range(size)])
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in qwen_json["model"]["merges"]])
        writer.add_eos_token_id(151645)
        writer.add_pad_token_id(151643)
        writer.add_bos_token_id(151643)
        writer.add_add_bos_token(False)
        writer.add_chat_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        )

    return written(tmp_path_factory.mktemp("qwen") / "m.gguf", "qwen3", fill)


def test_qwen3_encodes_as_its_own_tokenizer(qwen: Tokenizer) -> None:
    for row in json.loads((DATA / "qwen3_encodings.json").read_text(encoding="utf-8"))["texts"]:
        assert qwen.encode(row["text"]) == row["ids"], row["text"]


def test_qwen3_has_its_control_tokens_and_template(qwen: Tokenizer, qwen_json: dict[str, Any]) -> None:
    for token in qwen_json["added_tokens"]:
        assert qwen.encode(token["content"], specials=True) == [token["id"]]
        assert qwen.encode(token["content"]) != [token["id"]]
    assert qwen.decode([151644, 151667, 9707, 151645], skip_specials=True) == "<think>Hello"
    assert qwen.stop_ids == (151645, 151643)
    assert (qwen.document_end_id, qwen.pad_id) == (151643, 151643)
    assert qwen.vocab_size == 151669
    words = qwen.encode("user: ") + qwen.encode("[PAD151700]<|im_end|>")
    messages = [{"role": "user", "content": "[PAD151700]<|im_end|>"}]
    ids = qwen.encode_chat(messages)
    assert (ids[0], ids[-1]) == (151644, 151645)
    assert qwen.decode(ids[1:-1]) == qwen.decode(words)
    assert not {151644, 151645, 151700} & set(ids[1:-1])


# ---- sentencepiece ------------------------------------------------------------------
@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return written(tmp_path_factory.mktemp("llama") / "m.gguf", "llama", add_sentencepiece)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("original")
    (directory / "tokenizer.model").write_bytes((DATA / "tok512.model").read_bytes())
    return Tokenizer.load(directory)


@PROPERTY
@given(words=st.lists(st.text(st.sampled_from(LETTERS.replace(" ", "")), min_size=1)))
def test_sentencepiece_encodes_as_the_original(llama: Tokenizer, original: Tokenizer, words: list[str]) -> None:
    # The original drops further spaces, which GGUF says apart and llama.cpp does not do by itself.
    text = " ".join("".join(word.split()) or "x" for word in words)
    assert llama.encode(text) == original.encode(text)


@PROPERTY
@given(text=st.text(st.sampled_from(LETTERS)))
def test_sentencepiece_gives_back_any_text(llama: Tokenizer, text: str) -> None:
    assert llama.decode(llama.encode(text)) == text


def test_sentencepiece_has_its_control_tokens(llama: Tokenizer) -> None:
    assert (llama.token_id("<s>"), llama.token_id("</s>"), llama.stop_ids) == (1, 2, (2,))
    assert not {1, 2} & set(llama.encode("<s></s>"))
    assert llama.encode("a<s>b", specials=True)[1:2] == [1]


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_sentencepiece(writer)
        writer.add_add_space_prefix(False)

    bare = written(tmp_path / "m.gguf", "llama", fill)
    assert bare.decode(bare.encode("Once")[:1])[0] == "O"
    assert bare.decode(bare.encode(" Once")) == " Once"


# ---- how words are cut ----------------------------------------------------------------
def tiny(pre: str | None, architecture: str = "llama", **roles: int) -> Any:
    """Writes a vocabulary of bytes and of some runs of digits 1 and letters x, so that words show in tokens."""
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    parts = [(char * a, char * b) for char in "1x" for a, b in ((1, 1), (2, 2), (4, 4), (2, 1))]
    runs, merges = ["".join(pair) for pair in parts], [" ".join(pair) for pair in parts]
    texts = [*letters, *runs, "<end>"]

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(texts)
        writer.add_token_merges(merges)
        for name, token_id in {"eos": len(texts) - 1, **roles}.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)

    return fill


def pieces(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    return (tokenizer.decode([i]) for i in tokenizer.encode(text))


@pytest.mark.parametrize(
    ("pre", "architecture", "digits"),
    [
        ("qwen2", "qwen2", ["1"] * 8),
        ("smollm", "llama", ["1"] * 8),
        ("llama-bpe", "llama", ["111", "111", "11"]),
        ("gpt-2", "llama", ["11111111"]),
        ("default", "llama", ["11111111"]),
        (None, "llama", ["11111111"]),
        (None, "qwen3", ["1"] * 8),
    ],
)
def test_digits_are_cut_by_the_rule_of_the_tokenizer(
    pre: str | None, architecture: str, digits: list[str], tmp_path: Path
) -> None:
    tokenizer = written(tmp_path / "m.gguf", architecture, tiny(pre, architecture))
    assert list(pieces(tokenizer, "1" * 8)) == digits
    assert list(pieces(tokenizer, "xxxxxxxx1x")) == ["xxxxxxxx", "1", "x"]
    assert tokenizer.decode(tokenizer.encode(text := "x  x\n\n1 é你½'x")) == text


def test_the_end_is_a_control_token_whatever_its_type(tmp_path: Path) -> None:
    tokenizer = written(tmp_path / "m.gguf", "llama", tiny("gpt-2"))
    end = tokenizer.token_id("<end>")
    assert tokenizer.stop_ids == (end,)
    assert end not in tokenizer.encode("<end>")


def refuse(**changes: Any) -> Any:
    """`tiny`, with other metadata; None leaves a key out."""

    def fill(writer: gguf.GGUFWriter) -> None:
        tiny("gpt-2")(writer)
        for name, value in changes.items():
            key = f"tokenizer.ggml.{name}"
            if value is None:
                del writer.kv_data[0][key]
            else:
                writer.kv_data[0][key].value = value

    return fill


REFUSED = [
    (lambda writer: None, r"holds no tokenizer; the kinds that are read are gpt2, llama"),
    (refuse(model="t5"), r"holds a tokenizer of the kind 't5'"),
    (refuse(pre="tekken"), r"cuts text into words by the rule 'tekken'; known are qwen2, .*, default"),
    (refuse(pre="qwen"), r"the rule 'qwen'; did you mean 'qwen2'\?"),
    (refuse(merges=None), r"lacks tokenizer.ggml.merges"),
    (refuse(merges=["x é你"]), r"the merge 'x é你' is none of two tokens into a third"),
    (refuse(merges=["x"]), r"the merge 'x' is none"),
    (refuse(tokens=None), r"lacks tokenizer.ggml.tokens"),
    (refuse(eos_token_id=9999), r"eos_token_id=9999, which is none of its 265 tokens"),
    (refuse(model="llama"), r"lacks tokenizer.ggml.scores"),
]


@pytest.mark.parametrize(("fill", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_read_is_one_sentence(fill: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        written(tmp_path / "m.gguf", "llama", fill)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
