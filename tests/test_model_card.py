"""Law: a card says what the files beside it say, and repeats of its source's card only what stands there."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_hf import CONFIGS, write

from errors import UserError
from model.convert_verb import convert
from model.load import open_model
from model.model_card import CARD, inherited, model_card, page, read_card, tokens_seen
from model.tree import make_skeleton

THEIRS = """---
library_name: transformers
license: other  # as its authors say
license_name: "a: licence"
license_link: 'https://example.org/LICENSE'
tags: [one, two]
base_model:
- Org/Base-1B
- Org/Base-2B
---

# A model

license: none of this is read
"""


def header(folder: Path) -> dict[str, Any]:
    """What Hugging Face reads of a card."""
    text = (folder / CARD).read_text(encoding="utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_tells_the_sizes(tmp_path: Path) -> None:
    """By hand: 2 layers of 1584 (attention, norms), 64 (router), 4 experts of 480; 1552 outside; 2 experts a token."""
    write(tmp_path / "a", CONFIGS["qwen3_moe"])
    convert(open_model(tmp_path / "a"), tmp_path / "b", "bfloat16")
    assert header(tmp_path / "b") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qmax", "qwen3_moe", "mixture-of-experts"],
    }
    said = (tmp_path / "b" / CARD).read_text()
    for words in (
        "# b\n",
        "| architecture | `Qwen3MoeForCausalLM` |",
        "| parameters | 8,688, of which a token uses 6,768 |",
        "| experts | 4 in 2 layers, 2 a token |",
        "| context | 4,096 positions |",
        "| weights | bfloat16 |",
        "| tokenizer | none |",
        "Converted from `a` by `qmax convert`.",
        'AutoModelForCausalLM.from_pretrained("b")',
        "There is no tokenizer here",
    ):
        assert words in said, words
    assert str(tmp_path) not in said


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_a_card(name: str, tmp_path: Path) -> None:
    """With a tokenizer, and every kind of attention and experts; what it names is what is written."""
    write(tmp_path / "a", CONFIGS[name])
    source = open_model(tmp_path / "a")
    card = model_card(source, "b", 48, "float32").decode()
    shapes = make_skeleton(source.config, stacked=False).shapes
    total = sum(prod(shape) for key, shape in shapes.items() if not key.startswith("mtp.") and ".bias_E" not in key)
    assert f"| parameters | {total:,}" in card
    assert "| tokenizer | 48 tokens |" in card and "qmax chat b\n" in card and "AutoTokenizer.from_pretrained" in card
    assert ("multi-token prediction" in card) == bool(source.config.mtp_layers)


def test_weights_that_keep_their_type_are_told(tmp_path: Path) -> None:
    write(tmp_path / "a", CONFIGS["qwen3"], dtype="float32")
    convert(open_model(tmp_path / "a"), tmp_path / "b")
    assert "| weights | float32 |" in (tmp_path / "b" / CARD).read_text()


def test_a_classifier_is_told_by_its_head(tmp_path: Path) -> None:
    write(tmp_path / "a", replace(CONFIGS["qwen3"], num_labels=3))
    convert(open_model(tmp_path / "a"), tmp_path / "b")
    assert header(tmp_path / "b")["pipeline_tag"] == "text-classification"
    said = (tmp_path / "b" / CARD).read_text()
    assert "| labels | 3 |" in said and "AutoModelForSequenceClassification" in said and "qmax chat" not in said


def test_licence_and_base_model_are_those_of_the_source(tmp_path: Path) -> None:
    write(tmp_path / "a", CONFIGS["qwen3"])
    (tmp_path / "a" / CARD).write_text(THEIRS)
    convert(open_model(tmp_path / "a"), tmp_path / "b")
    convert(open_model(tmp_path / "b"), tmp_path / "c")
    for name in ("b", "c"):
        found = header(tmp_path / name)
        assert (found["license"], found["license_name"]) == ("other", "a: licence")
        assert found["license_link"] == "https://example.org/LICENSE"
        assert found["base_model"] == ["Org/Base-1B", "Org/Base-2B"]


@pytest.mark.parametrize(
    "text", ["", "no header", "---\nlicense: mit", "---\nlicense: [mit]\nbase_model: {a: b}\nlicense_name:\n---\n"]
)
def test_what_is_not_understood_is_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(text)
    assert read_card(tmp_path, ("license", "license_name", "base_model")) == {}


@pytest.mark.parametrize("value", ["yes", "1.0", "a: b", "mit", "- x", 'a "b"', "é", "null", "C:\\models"])
def test_a_header_is_yaml(value: str) -> None:
    text = page({"license": value, "tags": [value, "x"]}, ["# x"]).decode()
    assert yaml.safe_load(text.split("---\n")[1]) == {"license": value, "tags": [value, "x"]}


def test_what_stands_in_the_destination_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a", CONFIGS["qwen3"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / CARD).write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert(open_model(tmp_path / "a"), tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == [CARD]
    assert (tmp_path / "b" / CARD).read_text() == "mine"


def test_tokens_are_counted_or_estimated() -> None:
    assert tokens_seen([{"step": 1, "tokens": 1000}, {"step": 2, "tokens": 234}], 2) == "1,234"
    assert tokens_seen([{"step": 5, "tokens": 1000}, {"step": 10, "tokens": 900}], 10) == "about 9,500"
    assert tokens_seen([{"step": 1}], 1) == ""


def test_a_directory_without_a_card_gives_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a", CONFIGS["qwen3"])
    assert inherited(open_model(tmp_path / "a")) == {}
