"""Law: a file of llama2.c is the model that llama2.c runs, and a damaged one is one sentence.

The reference logits and texts are those of a float32 program written without this repository.
"""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from gguf_fixtures import weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

import qmax
from errors import UserError
from model.forward import Batch, forward, unembed
from model.llama2c import HEADER, Llama2cSource, read_bin
from model.load import load_model, open_model
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from serve.engine import Engine
from serve.sampling_params import SamplingParams

DATA = ROOT / "tests" / "data"
MODEL = DATA / "stories260K.bin"
REFERENCE = json.loads((DATA / "stories260K_reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stories() -> tuple[Transformer, Tokenizer]:
    return load_model(MODEL)


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["prompt"])
def test_logits_and_text_are_the_reference(stories: tuple[Transformer, Tokenizer], case: dict) -> None:
    model, tokenizer = stories
    assert [tokenizer.token_id("<s>"), *tokenizer.encode(case["prompt"])] == case["ids"]
    tokens = jnp.asarray([case["ids"]])
    batch = Batch(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
    logits = np.asarray(unembed(model, forward(model, batch).hidden_BTD)[0])
    assert logits[-1] == pytest.approx(case["last_logits"], abs=1e-4)
    assert logits.argmax(-1).tolist() == case["argmax_each"]
    greedy = SamplingParams(temperature=0, max_tokens=len(case["greedy"]))
    (reply,) = Engine(model, tokenizer).generate([case["ids"]], greedy)
    assert reply.tokens == case["greedy"]
    assert tokenizer.decode(reply.tokens) == case["greedy_text"]


def test_every_verb_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(MODEL), "--prompt", "Once upon a time", "--temperature", "0", "--max-tokens", "8"]
    assert qmax.main(words) == 0
    assert capsys.readouterr().out.startswith(", there was a little")


# ---- the file -----------------------------------------------------------------------
def file_of(width: int, layers: int, heads: int, kv_heads: int, vocab: int, positions: int) -> tuple[bytes, dict]:
    """A random file with an untied head, as llama2.c's legacy_export writes it, and its tensors."""
    draw = np.random.default_rng(0)
    hidden, each, keys = 3 * width, width // heads, width // heads * kv_heads
    shapes = {
        "embedding": (vocab, width),
        "attention_norm": (layers, width),
        "q": (layers, width, width),
        "k": (layers, keys, width),
        "v": (layers, keys, width),
        "o": (layers, width, width),
        "ffn_norm": (layers, width),
        "w1": (layers, hidden, width),
        "w2": (layers, width, hidden),
        "w3": (layers, hidden, width),
        "norm": (width,),
        "cos": (positions, each // 2),
        "sin": (positions, each // 2),
        "head": (vocab, width),
    }
    arrays = {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    header = struct.pack("<7i", width, hidden, layers, heads, kv_heads, -vocab, positions)
    return header + b"".join(array.tobytes() for array in arrays.values()), arrays


def test_an_untied_head_and_every_weight_in_its_place(tmp_path: Path) -> None:
    raw, arrays = file_of(16, 2, 4, 2, 300, 10)
    (tmp_path / "m.bin").write_bytes(raw)
    source = open_model(tmp_path / "m.bin")
    config = source.config
    assert (config.tie_embeddings, config.vocab_size, config.max_positions, config.head_dim) == (False, 300, 10, 4)
    ours = weights_of(source)
    np.testing.assert_array_equal(ours["head_DV"], arrays["head"].T)
    np.testing.assert_array_equal(ours["embedding_VD"], arrays["embedding"])
    np.testing.assert_array_equal(ours["norm.weight"], arrays["norm"])
    for layer in range(2):
        theirs = {name: array[layer] for name, array in arrays.items() if len(array) == 2}
        # Four heads of four channels; pairs side by side become pairs half a head apart.
        q, k, v = (theirs[name].reshape(-1, 4, 16).transpose(2, 0, 1) for name in "qkv")
        expected = {
            "attention.q_DNH": q[..., [0, 2, 1, 3]],
            "attention.k_DKH": k[..., [0, 2, 1, 3]],
            "attention.v_DKH": v,
            "attention.o_NHD": theirs["o"].T.reshape(4, 4, 16),
            "feed_forward.gate_DF": theirs["w1"].T,
            "feed_forward.down_FD": theirs["w2"].T,
            "feed_forward.up_DF": theirs["w3"].T,
            "attention_norm.weight": theirs["attention_norm"],
            "feed_forward_norm.weight": theirs["ffn_norm"],
        }
        for name, array in expected.items():
            np.testing.assert_array_equal(ours[f"stacks.0.blocks.{layer}.{name}"], array, err_msg=name)


REFUSED = [
    (lambda raw: raw[:20], r"is no model of llama2.c: it has 20 bytes"),
    (lambda raw: raw[:-4], r"is truncated or no model of llama2.c \(version 0\): 1,056,540 bytes by its header"),
    (lambda raw: raw + b"more", r"1,056,540 bytes by its header, 1,056,544 there"),
    (lambda raw: b"24ka" + raw[4:], r"later version of llama2.c's format; export the model with --version 0"),
    (lambda raw: HEADER.pack(64, 172, 5, 7, 4, 512, 512) + raw[28:], r"its header says 64, 172, 5, 7"),
    (lambda raw: HEADER.pack(64, 172, 2**31 - 1, 8, 4, 512, 512) + raw[28:], r"2147483647 layers do not fit"),
    (lambda raw: HEADER.pack(64, 172, 0, 8, 4, 512, 512) + raw[28:], r"its header says 64, 172, 0"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_a_damaged_file_is_one_sentence(change, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(change(MODEL.read_bytes()))
    with pytest.raises(UserError, match=said) as caught:
        open_model(tmp_path / "m.bin")
    assert str(tmp_path / "m.bin") in str(caught.value) and "\n" not in str(caught.value)


# ---- the tokenizer beside it ----------------------------------------------------------
def llama2c_encode(raw: bytes, text: str) -> list[int]:
    """`encode` of llama2.c's run.c, without its BOS: characters, then the best merge of two until there is none."""
    vocabulary: dict[str, tuple[int, float]] = {}
    at = 4
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        vocabulary[raw[at + 8 : at + 8 + length].decode()] = len(vocabulary), score
        at += 8 + length
    ids: list[int] = []
    for char in f" {text}" if text else "":
        ids += [vocabulary[char][0]] if char in vocabulary else [byte + 3 for byte in char.encode()]
    names = list(vocabulary)
    while True:
        pairs = [(names[a] + names[b], i) for i, (a, b) in enumerate(itertools.pairwise(ids))]
        found = [(vocabulary[pair][1], -i, vocabulary[pair][0]) for pair, i in pairs if pair in vocabulary]
        if not found:
            return ids
        _, place, merged = max(found)
        ids[-place : -place + 2] = [merged]


@pytest.fixture(scope="module")
def tok512() -> Tokenizer:
    found = read_bin(DATA / "tok512.bin", 512)
    assert found is not None
    return found


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("aeiou thnsrOnceLly.,'\"!\n  é你\u2028"), max_size=40))
def test_the_own_form_cuts_text_as_llama2c_does(tok512: Tokenizer, text: str) -> None:
    raw = (DATA / "tok512.bin").read_bytes()
    assert tok512.encode(text) == llama2c_encode(raw, text)
    assert tok512.decode(tok512.encode(text)) == text


def test_both_forms_are_one_vocabulary(tok512: Tokenizer) -> None:
    original = Llama2cSource(MODEL).tokenizer()
    assert "tokenizer.model" in original.files and original.files != tok512.files
    assert tok512.vocab_size == original.vocab_size == 512
    assert [tok512.token_bytes(i) for i in range(512)] == [original.token_bytes(i) for i in range(512)]
    assert tok512.stop_ids == original.stop_ids == (2,)
    for case in REFERENCE["cases"]:
        assert tok512.encode(case["prompt"]) == original.encode(case["prompt"]) == case["ids"][1:]


def test_the_tokenizer_that_fits_is_taken(tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path)
    source = open_model(tmp_path / MODEL.name)
    with pytest.raises(UserError, match=r"holds no tokenizer for stories260K.bin; put tok512.model or tokenizer.model"):
        source.tokenizer()
    shutil.copy(DATA / "tok512.bin", tmp_path / "tokenizer.bin")
    assert source.tokenizer().encode("Once upon a time") == [403, 407, 261, 378]
    (tmp_path / "tokenizer.bin").write_bytes((DATA / "tok512.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"has 512 tokens, and the tokenizers beside it \(tokenizer.bin\) have not"):
        source.tokenizer()
    shutil.copy(DATA / "tok512.model", tmp_path)
    assert "tokenizer.model" in source.tokenizer().files
    (tmp_path / "small.bin").write_bytes(file_of(16, 1, 4, 2, 300, 10)[0])
    shutil.copy(DATA / "tok512.model", tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"has 300 tokens, .* \(tokenizer.model, tokenizer.bin\) have not"):
        open_model(tmp_path / "small.bin").tokenizer()
