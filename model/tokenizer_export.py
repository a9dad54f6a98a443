"""A tokenizer as the files that transformers reads.

A directory with a tokenizer.json is one already. A sentencepiece model becomes a tokenizer.json here, for which three
things have to be translated without changing a single id:

- Sentencepiece joins whichever neighbours make a piece, the best score first; the `tokenizers` library wants each such
  merge spelled out and ranked. Whatever surrounds it, a piece that comes about at all does so in one way, the way it
  does on its own (a merge across its edges would have kept it from coming about), so each piece has one merge: the last
  of its own encoding. Pieces that their own encoding does not reach are never made from text, and get none.
- Sentencepiece writes a space as U+2581. `Tokenizer` spells a text's own U+2581 in bytes where it can; in the
  vocabulary that is written for such a model a space is a space, so that nothing has to be told apart.
- What sentencepiece does to a text before it is read becomes a normalizer.

What the library cannot do exactly is refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from errors import UserError
from model.hf.writing import to_json
from model.protobuf import fields_of
from model.sentencepiece_model import BPE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece
from model.tokenizer import Tokenizer
from model.tokenizer_backends import Control, open_backend

BLOCK = "\u2581"
"""Sentencepiece's sign for a space."""
MODEL_TYPES = {1: "unigram", BPE: "BPE", 3: "word", 4: "char"}
KEPT_SETTINGS = ("model_max_length", "padding_side", "truncation_side")
AS_WRITTEN = {"unk_token": None, "trust_remote_code": True}
"""Makes transformers 5 take tokenizer.json as it is.

For some model types (qwen2, qwen3_5_moe and others) its `AutoTokenizer` believes no tokenizer_class and rebuilds the
byte-level tokenizer of that model around any vocabulary, unless this flag stands among the tokenizer's arguments. It
gives no permission there: code is run, if there were any, only when the caller of `from_pretrained` says so.
"""
PROBE = (
    "Once upon a time, in 1984:\n\tdef f(x):\r\n        return x  # ok\n\n\n L'été à Zürich... 从前有一只小鸟，"
    "ひらがな 한국어 🙂👩‍👩‍👧 e\u0301 \x00\x7f\u00a0\u2581\u2581 \u2581x\u2003 <0x0A> <unk> <s> \ufffd  "
)


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> bytes of a directory that `AutoTokenizer.from_pretrained` loads and `Tokenizer.load` reads back.

    What a directory with a tokenizer.json holds stays as it is, byte for byte; a chat template and a
    tokenizer_config.json are added where there is none. For a sentencepiece model a tokenizer.json is built.

    Any text gets the ids of `Tokenizer.encode`, with one difference that is meant: in transformers a text can spell
    control tokens, as with `encode(text, specials=True)`. UserError for a sentencepiece model that the `tokenizers`
    library cannot follow exactly.
    """
    files = tokenizer.files
    if {"tokenizer.json", "tokenizer_config.json"} <= files.keys():
        return files
    settings: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
    controls = open_backend(files, settings, tokenizer.source).controls
    config = to_json(_tokenizer_config(tokenizer, controls, settings))
    if "tokenizer.json" in files:
        return files | {"tokenizer_config.json": config}
    model = _parse_model(files["tokenizer.model"])
    try:
        data = _tokenizer_json(model, controls)
    except _InexactError as error:
        raise _refusal(tokenizer, str(error)) from error
    files |= {"tokenizer.json": to_json(data, indent=None), "tokenizer_config.json": config}
    _check(files, tokenizer, model)
    return files


class _InexactError(Exception):
    """Why the library cannot encode as a sentencepiece model does."""


def _refusal(tokenizer: Tokenizer, why: str) -> UserError:
    return UserError(
        f"{tokenizer.source}/tokenizer.model cannot become a tokenizer.json that encodes alike: {why}; "
        "put a tokenizer.json of the same vocabulary beside it"
    )


def _check(files: Mapping[str, bytes], tokenizer: Tokenizer, model: _Model) -> None:
    """UserError unless the new files encode every piece, and some awkward text, as the old ones do."""
    written = Tokenizer(files, tokenizer.source)
    pieces = [piece.text.replace(BLOCK, " ") for piece in model.pieces if piece.kind == NORMAL]
    for text in ("".join(pieces), " ".join(pieces), PROBE):
        if written.encode(text) != tokenizer.encode(text):
            raise _refusal(tokenizer, "the two disagree on a sample of text")


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer_config.json


def _tokenizer_config(
    tokenizer: Tokenizer, controls: Mapping[str, Control], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What transformers has to know beside tokenizer.json; of `settings` only what holds for the new files.

    transformers adds named tokens to the vocabulary, or finds them in text, so none are named but control tokens.
    """
    names = {control.id: name for name, control in controls.items()}
    named = {role: _content(settings.get(role)) for role in ("bos_token", "eos_token", "pad_token")}
    defaults: dict[str, int | None] = {"eos_token": next(iter(tokenizer.stop_ids), None)}
    try:
        defaults["pad_token"] = tokenizer.pad_id
    except UserError:  # nothing ends a document, so nothing can fill rows
        defaults["pad_token"] = None
    for role, default in defaults.items():
        if named[role] not in controls and default is not None:
            named[role] = names[default]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: name for role, name in named.items() if name in controls},
        "clean_up_tokenization_spaces": False,
        **{key: settings[key] for key in KEPT_SETTINGS if key in settings},
        **AS_WRITTEN,
    }


def _content(token: Any) -> Any:
    """A token of tokenizer_config.json, which gives a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def _tokenizer_json(model: _Model, controls: Mapping[str, Control]) -> dict[str, Any]:
    """tokenizer.json of a sentencepiece model, as an object; _InexactError when it could not be exact."""
    _check_kind(model, controls)
    spaced = model.spells_block and model.has_space
    vocabulary: dict[str, int] = {}
    for i, piece in enumerate(model.pieces):
        is_text = piece.text not in controls
        vocabulary[piece.text.replace(BLOCK, " ") if spaced and is_text else piece.text] = i
    merges = _merges(model.pieces)
    if spaced:
        merges = [(left.replace(BLOCK, " "), right.replace(BLOCK, " ")) for left, right in merges]
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model, controls, vocabulary),
        "normalizer": _normalizer(model, spaced),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(model),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _check_kind(model: _Model, controls: Mapping[str, Control]) -> None:
    """_InexactError for models that work by other rules than those that are translated here."""
    if model.model_type != BPE:
        kind = MODEL_TYPES.get(model.model_type, str(model.model_type))
        raise _InexactError(f"it is a {kind} model, and only BPE can be followed to the last bit")
    if model.charsmap:
        raise _InexactError("it normalises text by a table of its own")
    if model.suffix or not model.escapes:
        raise _InexactError("it treats white space as no common model does")
    if any(piece.kind == UNUSED for piece in model.pieces):
        raise _InexactError("it has unused pieces")
    if any(" " in piece.text for piece in model.pieces):
        raise _InexactError("it has pieces with a plain space")
    if model.dummy_prefix and model.byte_fallback and not model.has_space:
        raise _InexactError("it puts a space in front of text and has no piece for a space")
    words = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED and piece.text not in controls]
    if words and (model.strips or not (model.spells_block and model.has_space)):
        raise _InexactError(f"its user-defined pieces, such as {words[0]!r}, are words among changed spaces")


def _added_tokens(
    model: _Model, controls: Mapping[str, Control], vocabulary: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Tokens that the library finds in a text before anything else: control tokens and user-defined words."""
    words = {i for i, piece in enumerate(model.pieces) if piece.kind == USER_DEFINED}
    special = {control.id: control.special for control in controls.values()}
    return [
        {
            "id": i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special.get(i, False),
        }
        for content, i in vocabulary.items()
        if i in words or i in special
    ]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizer(model: _Model, spaced: bool) -> dict[str, Any] | None:
    """What happens to a stretch of text before it is cut into pieces.

    The trained kind changes nothing. Others leave out spaces at both ends and all but one of several, put one space in
    front, and turn spaces into U+2581. A text's own U+2581 cuts it in two where it is spelled in bytes, so that there
    are ends beside it; elsewhere it is a space, though not one that is left out before the end.
    """
    steps: list[dict[str, Any]] = []
    if model.strips:
        cut, whole = rf"(?:\A|(?<={BLOCK})) +| +(?=\z|{BLOCK})", rf"\A +|[ {BLOCK}]+\z"
        ends = cut if model.spells_block else whole
        steps += [_replace({"Regex": ends}, ""), _replace({"Regex": " {2,}"}, " ")]
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": BLOCK})
    if not spaced:
        steps.append(_replace({"String": " "}, BLOCK))
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _decoder(model: _Model) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace({"String": BLOCK}, " ")]
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


# ---------------------------------------------------------------------------------------------------------------------
# Merges


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """The merge that makes each piece which can come about, the best score first.

    _InexactError when two of them have the same score: sentencepiece then takes the leftmost, the library the one that
    is listed first. And when a piece holds a character that is no piece: the library cannot merge it.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges: list[tuple[str, str]] = []
    before = ""
    for text, score in sorted(scores.items(), key=lambda item: -item[1]):
        merge = _last_merge(text, scores)
        if merge is None:
            continue
        lacking = next((part for part in merge if len(part) == 1 and part not in scores), None)
        if lacking is not None:
            raise _InexactError(f"its piece {text!r} holds {lacking!r}, which is no piece")
        if before and scores[before] == score:
            raise _InexactError(f"its pieces {before!r} and {text!r} have the same score")
        merges.append(merge)
        before = text
    return merges


def _last_merge(text: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """The two parts that are joined last when `text` stands alone; None when it does not become one piece."""
    parts = list(text)
    if len(parts) < 2:
        return None
    while len(parts) > 2:
        best, at = float("-inf"), -1
        for i in range(len(parts) - 1):
            score = scores.get(parts[i] + parts[i + 1])
            if score is not None and score > best:
                best, at = score, i
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


# ---------------------------------------------------------------------------------------------------------------------
# The file of a sentencepiece model


@dataclass(frozen=True)
class _Model:
    """What decides how a sentencepiece model encodes."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    """Characters that are no pieces are spelled in bytes."""
    suffix: bool
    """The added space comes behind the text."""
    charsmap: bytes
    """Table of replacements."""
    dummy_prefix: bool
    """A space is put in front of the text."""
    strips: bool
    """Spaces at the ends, and all but one of several, are left out."""
    escapes: bool
    """A space is written as U+2581."""

    @property
    def has_space(self) -> bool:
        return any(piece.text == BLOCK and piece.kind == NORMAL for piece in self.pieces)

    @property
    def spells_block(self) -> bool:
        """`Tokenizer` spells a text's own U+2581 in bytes and gives the library what stands between."""
        return self.byte_fallback and not self.dummy_prefix


def _parse_model(raw: bytes) -> _Model:
    """A model's protocol buffer, ModelProto of sentencepiece_model.proto. It has been opened before, so it is sound.

    Read here, as the sentencepiece library does not tell how a model normalises.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in fields_of(raw):
        if number == 1:
            piece = dict(fields_of(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append(Piece(bytes(piece[1]).decode(), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer |= dict(fields_of(value))
        elif number == 3:
            normalizer |= dict(fields_of(value))
    return _Model(
        pieces=pieces,
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, False)),
        suffix=bool(trainer.get(24, False)),
        charsmap=bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, True)),
        strips=bool(normalizer.get(4, True)),
        escapes=bool(normalizer.get(5, True)),
    )
