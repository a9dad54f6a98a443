"""Law: `AutoTokenizer` loads what we write of a tokenizer, and then encodes, decodes and renders chats as we do."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from model.hf.families import FAMILIES
from model.tokenizer import Tokenizer
from model.tokenizer_export import hugging_face_files
from model.tokenizer_training import SPECIALS, train_tokenizer

from ..tokenizer_fixtures import FORMS, PROPERTY, any_text, control_text, demo_texts, model_tokenizer, plain_model

pytestmark = [
    pytest.mark.skipif(os.environ.get("QMAX_PARITY") != "1", reason="./run.sh test --parity"),
    pytest.mark.filterwarnings("default"),
]

DATA = Path(__file__).parent.parent / "data"
MODEL_TYPES = sorted({family.model_type for family in FAMILIES} | {"qwen3_5_moe", "llama"})
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "é": "从前"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Bonjour, été ?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\nI add.", "tool_calls": [CALL]},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "five"},
        {"role": "assistant", "reasoning_content": "done", "content": "从前: 5"},
        {"role": "user", "content": " thanks\n"},
    ],
]


def load(tokenizer: Tokenizer, directory: Path, model_type: str = "") -> Any:
    """What `AutoTokenizer` makes of the files, beside the config of a model where one is named."""
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    for name, content in hugging_face_files(tokenizer).items():
        (directory / name).write_bytes(content)
    if model_type:
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Each tokenizer, ours and theirs."""
    directory = tmp_path_factory.mktemp("parity")
    qwen = {"tokenizer.json": gzip.decompress((DATA / "qwen3_tokenizer.json.gz").read_bytes())}
    ours = {
        "trained": train_tokenizer(demo_texts(), 2000, directory / "trained", progress=False),
        "llama": Tokenizer({"tokenizer.model": (DATA / "tok512.model").read_bytes()}, "llama"),
        "qwen3": Tokenizer(qwen, "qwen3"),
    } | {str(form): model_tokenizer(plain_model(**form)) for form in FORMS}
    return {name: (tokenizer, load(tokenizer, directory / f"{name} files")) for name, tokenizer in ours.items()}


@PROPERTY
@given(text=any_text)
def test_a_text_gets_the_same_ids(pairs: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    if not any(control in text for control in SPECIALS):
        for name, (ours, theirs) in pairs.items():
            assert theirs(text)["input_ids"] == ours.encode(text), name


@PROPERTY
@given(text=control_text)
def test_ids_decode_to_the_same_text(pairs: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    for name, (ours, theirs) in pairs.items():
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text, specials=True), name
        if ours.token_id("<unk>") not in ids:  # we show U+FFFD for it, the library its name
            for skip in (False, True):
                shown = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert shown == ours.decode(ids, skip_specials=skip), name


def test_sizes_and_named_tokens_agree(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    for name, (ours, theirs) in pairs.items():
        assert len(theirs) == ours.vocab_size, name
        assert theirs.eos_token_id == ours.stop_ids[0], name
        assert theirs.pad_token_id == ours.pad_id, name


@pytest.mark.parametrize("messages", CHATS, ids=["short", "tools"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["none", "given"])
def test_chats_are_rendered_alike(
    pairs: dict[str, tuple[Tokenizer, Any]], messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    for name, (ours, theirs) in pairs.items():
        for prompt, thinking in ((False, True), (True, True), (True, False)):
            options = {"tools": tools, "add_generation_prompt": prompt, "enable_thinking": thinking}
            shown = ours.render(messages, **options)
            assert theirs.apply_chat_template(messages, tokenize=False, **options) == shown, name
            ids = theirs.apply_chat_template(messages, return_dict=False, **options)
            assert ids == ours.encode(shown, specials=True), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_model_beside_it_changes_nothing(
    pairs: dict[str, tuple[Tokenizer, Any]], model_type: str, tmp_path: Path
) -> None:
    """`AutoTokenizer` has a class for each type of model, which knows better for some of them."""
    for name in ("trained", "llama"):
        ours, _ = pairs[name]
        theirs = load(ours, tmp_path / name, model_type)
        assert len(theirs) == ours.vocab_size
        for text in (*demo_texts()[::9], "  a\u2581 b\n\n\t12 <|im_end|>", "<|endoftext|><think>e\u0301"):
            ids = theirs(text)["input_ids"]
            assert ids == ours.encode(text, specials=True)
            assert theirs.decode(ids) == ours.decode(ids)
