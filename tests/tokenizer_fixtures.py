"""Texts that put tokenizers to the test, and sentencepiece models of every form made of the demo's data."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from model.tokenizer_training import SPECIALS

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs" / "demo_data"
PROPERTY = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
FORMS = [
    {"add_dummy_prefix": prefix, "remove_extra_whitespaces": strips, "byte_fallback": falls_back}
    for prefix, strips, falls_back in itertools.product((False, True), repeat=3)
]
"""What a sentencepiece model may do to text before it is cut, and to characters that it has no piece for."""


@cache
def demo_texts() -> tuple[str, ...]:
    """The demo's languages and code, a little of each file."""
    texts: list[str] = []
    for path in sorted(DEMO.glob("pretrain_*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"][:8000] for line in itertools.islice(file, 12)]
    return tuple(texts)


@cache
def plain_model(**options: Any) -> bytes:
    """A sentencepiece model that its own trainer made of the demo's texts."""
    model = io.BytesIO()
    settled: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 1500 if options.get("byte_fallback") else 3000,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "num_threads": 1,
        "minloglevel": 2,
    }
    settled |= {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    lines = [line for text in demo_texts() for line in text.splitlines(keepends=True)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settled)
    return model.getvalue()


def model_tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer({"tokenizer.model": model}, "model")


def cuttings(draw: st.DrawFn) -> str:
    """Stretches of the demo's texts, glued where they happen to end."""
    text = draw(st.sampled_from(demo_texts()))
    places = draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(1, 40)), max_size=6))
    return "".join(text[at : at + size] for at, size in places)


ODD = ["\u2581", "\u2581\u2581", " ", "  ", "     ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\x00", "\x7f", "12345"]
ODD += [
    "e\u0301",
    "é",
    "从前",
    "🙂",
    "👩‍👩‍👧",
    "the ",
    " the",
    "<0x0A>",
    "<unk>",
    "<",
    "|>",
    "im_end",
    "\ufffd",
    "\u200b",
    "a",
]
any_text = st.one_of(
    st.text(), st.lists(st.sampled_from(ODD)).map("".join), st.composite(cuttings)(), st.text(" \u2581\nab1é")
)
control_text = st.lists(st.sampled_from([*SPECIALS, "</s>", "<s>", *ODD])).map("".join)
