"""The tokenizer inside a GGUF file, as the files that `model.tokenizer` reads.

GGUF keeps tokens, their types and scores or merges, and names the rule by which text is cut into words; what those
names stand for is published with each tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError, did_you_mean
from model.sentencepiece_model import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, Piece, sentencepiece_model
from model.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
"""Roles in tokenizer_config.json -> in metadata."""
TURN_ROLES = ("eot", "eom")
NO_TOKEN = 2**32 - 1
"""The id of a role that no token plays: -1, without its sign."""

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _words(digits: str) -> dict[str, Any]:
    """Words by a pattern that takes so many digits together, as Qwen's and Llama 3's tokenizer.json have it."""
    pattern = {"Regex": rf"{ENDINGS}|{LETTERS}|{digits}|{SIGNS}"}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _bytes(*, words: bool) -> dict[str, Any]:
    """Text to byte letters; `words`: cut by GPT-2's pattern first."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": words}


def _in_turn(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


QWEN = _in_turn(_words(r"\p{N}"), _bytes(words=False))
LLAMA = _in_turn(_words(r"\p{N}{1,3}"), _bytes(words=False))
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "qwen2": QWEN,
    "deepseek-r1-qwen": QWEN,
    "llama-bpe": LLAMA,
    "llama3": LLAMA,
    "llama-v3": LLAMA,
    "smollm": _in_turn({"type": "Digits", "individual_digits": True}, _bytes(words=True)),
    "gpt-2": _bytes(words=True),
}
NORMALISED = ("qwen2",)
"""Pre-tokenizers of tokenizers that bring text into Unicode's form NFC first."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""Those that take a word that is a token before they try merges."""


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        UserError: the file has none, one of a kind that is not read, or a damaged one.
    """
    kind = metadata.get(f"{PREFIX}model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        what = "holds no tokenizer" if kind is None else f"holds a tokenizer of the kind {kind!r}"
        raise UserError(f"{path} {what}; the kinds that are read are {', '.join(makers)}")
    tokens = Tokens(metadata, path)
    files = makers[kind](tokens)
    config = tokens.config()
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False).encode()
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return Tokenizer(files, str(path))


class Tokens:
    """The vocabulary of a file, checked: texts, types and roles of its tokens."""

    def __init__(self, metadata: Mapping[str, Any], path: Path):
        self.metadata, self.path = metadata, path
        self.texts: list[str] = self.column("tokens", list)
        types = metadata.get(f"{PREFIX}token_type")
        self.types = [NORMAL] * len(self.texts)
        if types is not None:
            self.types = [int(kind) for kind in self.column("token_type", np.ndarray)]
        self.roles = {name: i for name in (*ROLES.values(), *TURN_ROLES) if (i := self._role(name)) is not None}
        # Some files call the ends of turns and documents words like any other.
        ends = {i for name, i in self.roles.items() if name in ("eos", *TURN_ROLES)}
        self.types = [CONTROL if i in ends and kind == NORMAL else kind for i, kind in enumerate(self.types)]

    def column(self, name: str, form: type) -> Any:
        """A list with an entry for each token."""
        found: Any = self.metadata.get(f"{PREFIX}{name}")
        if not isinstance(found, form) or (name != "tokens" and len(found) != len(self.texts)):
            raise UserError(f"{self.path} lacks {PREFIX}{name}, or it has not an entry for each token")
        return found

    def _role(self, name: str) -> int | None:
        """The id of the token in a role."""
        key = f"{PREFIX}{name}_token_id"
        found = self.metadata.get(key)
        if found is None or found == NO_TOKEN:
            return None
        if not isinstance(found, int) or not 0 <= found < len(self.texts):
            raise UserError(f"{self.path} has {key}={found}, which is none of its {len(self.texts)} tokens")
        return found

    def flag(self, name: str, default: bool) -> bool:
        """A yes or no."""
        return bool(self.metadata.get(f"{PREFIX}{name}", default))

    def config(self) -> dict[str, Any]:
        """tokenizer_config.json: who plays which role."""
        roles = {ours: self.texts[self.roles[name]] for ours, name in ROLES.items() if name in self.roles}
        return {**roles, "add_bos_token": self.flag("add_bos_token", False)}


# ---- byte-level BPE ---------------------------------------------------------------
def _byte_level(tokens: Tokens) -> dict[str, bytes]:
    """tokenizer.json of a vocabulary with merges."""
    name = _pre_tokenizer(tokens)
    added = [
        _added(i, text, kind == CONTROL)
        for i, (text, kind) in enumerate(zip(tokens.texts, tokens.types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    # Tokens that only fill up the embedding must not be found in any text.
    vocabulary = {text: i for i, text in enumerate(tokens.texts) if tokens.types[i] != UNUSED}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": name in WHOLE_WORDS,
        "vocab": vocabulary,
        "merges": _merges(tokens, vocabulary),
    }
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if name in NORMALISED else None,
        "pre_tokenizer": PRE_TOKENIZERS[name],
        "post_processor": None,
        "decoder": _bytes(words=False),
        "model": model,
    }
    return {"tokenizer.json": json.dumps(data, ensure_ascii=False).encode()}


def _added(token_id: int, text: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": text, **flags}


def _pre_tokenizer(tokens: Tokens) -> str:
    """The name of the rule for words; files older than these names get that of their architecture."""
    name = tokens.metadata.get(f"{PREFIX}pre", "default")
    if name == "default":
        qwen = str(tokens.metadata.get("general.architecture")).startswith("qwen")
        name = "qwen2" if qwen else "gpt-2"
    if name not in PRE_TOKENIZERS:
        hint = did_you_mean(str(name), PRE_TOKENIZERS)
        raise UserError(
            f"{tokens.path} cuts text into words by the rule {name!r}{hint}; known are "
            f"{', '.join([*PRE_TOKENIZERS, 'default'])}"
        )
    return name


def _merges(tokens: Tokens, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens in the order in which they are joined."""
    lines = tokens.metadata.get(f"{PREFIX}merges")
    if not isinstance(lines, list):
        raise UserError(f"{tokens.path} lacks {PREFIX}merges")
    pairs = []
    for line in lines:
        # A space stands between the two; neither begins with one, for bytes are spelled by letters.
        cut = line.find(" ", 1)
        pair = line[:cut], line[cut + 1 :]
        if cut < 0 or any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise UserError(f"{tokens.path} is damaged: the merge {line!r} is none of two tokens into a third")
        pairs.append(pair)
    return pairs


# ---- sentencepiece ----------------------------------------------------------------
def _sentencepiece(tokens: Tokens) -> dict[str, bytes]:
    """tokenizer.model of a vocabulary with scores."""
    scores = tokens.column("scores", np.ndarray).tolist()
    kinds = [kind if NORMAL <= kind <= BYTE else NORMAL for kind in tokens.types]
    pieces = [Piece(text, score, kind) for text, score, kind in zip(tokens.texts, scores, kinds, strict=True)]
    charsmap = tokens.metadata.get(f"{PREFIX}precompiled_charsmap")
    model = sentencepiece_model(
        pieces,
        add_space=tokens.flag("add_space_prefix", True),
        remove_spaces=tokens.flag("remove_extra_whitespaces", False),
        charsmap=charsmap.tobytes() if isinstance(charsmap, np.ndarray) else b"",
    )
    return {"tokenizer.model": model}
