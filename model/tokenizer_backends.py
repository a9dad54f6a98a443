"""Plain text to ids under sentencepiece or Hugging Face tokenizers, with control tokens kept out of their reach.

A backend reads any text as plain characters: "<|im_end|>" is eight letters and some signs. Control tokens are the
business of `model.tokenizer`, alike for both kinds.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from errors import UserError

MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Control tokens that people are shown, the assistant's own first: they survive `skip_specials`."""


@dataclass(frozen=True)
class Control:
    """A token that text cannot spell."""

    id: int
    special: bool
    """Left out by `skip_specials`."""
    lstrip: bool = False
    """Swallows white space before it."""
    rstrip: bool = False
    """Swallows white space after it."""


class Backend(Protocol):
    """Plain text to ids and back; see the module."""

    controls: dict[str, Control]
    pieces: list[bytes]
    """What each id stands for, in UTF-8: perhaps part of a character, or nothing."""
    adds_space: bool
    """Text is encoded with a space before it, which decoding takes away again."""

    def encode(self, text: str) -> list[int]: ...
    def piece_id(self, piece: str) -> int | None: ...


def open_backend(files: Mapping[str, bytes], config: Mapping[str, Any], source: str) -> Backend:
    """The backend for the files of a tokenizer directory; UserError when they cannot be read."""
    listed = _listed_tokens(config)
    if "tokenizer.json" in files:
        return HuggingFaceBackend(files["tokenizer.json"], listed, source)
    return SentencePieceBackend(files["tokenizer.model"], listed, source)


def _listed_tokens(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`added_tokens_decoder` of tokenizer_config.json as rows in the form of tokenizer.json's `added_tokens`."""
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, Mapping):
        return []
    return [dict(token) | {"id": int(key)} for key, token in decoder.items() if str(key).isdigit()]


def _is_control(token: Mapping[str, Any]) -> bool:
    """Special, or markup. Other added tokens are words of the vocabulary, such as runs of spaces."""
    content = token["content"]
    return bool(token.get("special")) or (len(content) > 2 and content[0] == "<" and content[-1] == ">")


class SentencePieceBackend:
    """A sentencepiece model; control pieces are never made from text."""

    def __init__(self, model: bytes, listed: list[dict[str, Any]], source: str) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            size = self._model.get_piece_size() if model else 0
            if not size:
                raise RuntimeError("no pieces")
        except (RuntimeError, OSError) as error:
            raise UserError(f"{source}/tokenizer.model is not a sentencepiece model, or is damaged") from error
        special = {token["id"]: bool(token.get("special")) for token in listed}
        self.controls = {}
        self.pieces = []
        userdefined: list[str] = []
        for i in range(size):
            piece = self._model.id_to_piece(i)
            if self._model.is_control(i) or self._is_user_defined(i, piece):
                self.controls[piece] = Control(i, special.get(i, piece not in MARKUP))
                if not self._model.is_control(i):
                    userdefined.append(piece)
            self.pieces.append(self._bytes(i, piece))
        first = self._model.encode("a")
        self.adds_space = bool(first) and self.pieces[first[0]].startswith(b" ")
        # Sentencepiece writes a space as U+2581, so a text's own U+2581 would come back as a space: spell it in bytes.
        self._block = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        self._spells_block = not self.adds_space and all(self._model.is_byte(i) for i in self._block)
        # User-defined pieces are found in any text; cutting the text inside them keeps them from being found.
        inside = "|".join(f"(?<={re.escape(p[0])})(?={re.escape(p[1:])})" for p in userdefined)
        self._cuts = re.compile(inside) if inside else None

    def _is_user_defined(self, i: int, piece: str) -> bool:
        """A markup piece with the score 0 of pieces that were not learned (the library does not tell their type)."""
        model = self._model
        markup = len(piece) > 2 and piece[0] == "<" and piece[-1] == ">"
        return (
            markup and model.get_score(i) == 0 and not (model.is_byte(i) or model.is_unknown(i) or model.is_unused(i))
        )

    def _bytes(self, i: int, piece: str) -> bytes:
        if self._model.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(i):
            return "\ufffd".encode()
        return piece.encode() if piece in self.controls else piece.replace("\u2581", " ").encode()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain characters."""
        ids: list[int] = []
        for part in self._cuts.split(text) if self._cuts else (text,):
            words = part.split("\u2581") if self._spells_block else (part,)
            for n, word in enumerate(words):
                ids += self._block if n else ()
                ids += self._model.encode(word)
        return ids

    def piece_id(self, piece: str) -> int | None:
        """Id of a piece of the vocabulary, as sentencepiece spells it."""
        i = self._model.piece_to_id(piece)
        return i if self._model.id_to_piece(i) == piece else None


class HuggingFaceBackend:
    """A tokenizer.json, whose control tokens are renamed to something that nobody can type.

    The library finds added tokens in any text, so they must not be there under their names.
    """

    def __init__(self, raw: bytes, listed: list[dict[str, Any]], source: str) -> None:
        import tokenizers

        where = f"{source}/tokenizer.json"
        try:
            data = json.loads(raw)
            added: list[dict[str, Any]] = list(data.get("added_tokens") or [])
            known = {token["id"] for token in added} | {token["content"] for token in added}
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            added += [flags | t for t in listed if t["id"] not in known and t["content"] not in known]
            added.sort(key=lambda token: token["id"])
            self.controls = {
                t["content"]: Control(t["id"], bool(t.get("special")), bool(t.get("lstrip")), bool(t.get("rstrip")))
                for t in added
                if _is_control(t)
            }
            joins = _decoder_kind(data.get("decoder"), where)
            self._model = tokenizers.Tokenizer.from_str(json.dumps(self._rename(data, added), ensure_ascii=False))
            vocabulary = self._model.get_vocab(with_added_tokens=True)
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise UserError(f"{where} is not a tokenizer of Hugging Face's library, or is damaged: {error}") from error
        self.pieces = [b""] * (1 + max(*vocabulary.values(), *(c.id for c in self.controls.values()), 0))
        spell = _byte_level_speller() if joins == "ByteLevel" else _space_mark_speller
        for piece, i in vocabulary.items():
            self.pieces[i] = spell(piece)
        for token in added:
            self.pieces[token["id"]] = token["content"].encode()
        if any(self._model.token_to_id(t["content"]) != t["id"] for t in added if t["content"] not in self.controls):
            raise UserError(f"{where} gives its added tokens ids that do not follow its vocabulary")
        first = self._model.encode("a", add_special_tokens=False).ids
        self.adds_space = bool(first) and self.pieces[first[0]].startswith(b" ")

    def _rename(self, data: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
        """`data` with control tokens under secret names, and without what would cut, pad or frame a text."""
        secret = secrets.token_hex(16)
        names = {content: f"\x00{secret} {control.id}" for content, control in self.controls.items()}
        model = data["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            vocabulary = {names.get(piece, piece): i for piece, i in vocabulary.items()}
        else:
            vocabulary = [[names.get(row[0], row[0]), *row[1:]] for row in vocabulary]
        model = model | {"vocab": vocabulary}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        renamed = [t | {"content": names.get(t["content"], t["content"])} for t in added]
        cleared = {"truncation": None, "padding": None, "post_processor": None}
        return data | cleared | {"model": model, "added_tokens": renamed}

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain characters."""
        return self._model.encode(text, add_special_tokens=False).ids

    def piece_id(self, piece: str) -> int | None:
        """Id of a piece of the vocabulary, as tokenizer.json spells it."""
        return self._model.token_to_id(piece)


def _decoder_kind(decoder: Any, where: str) -> str:
    """ByteLevel, or Metaspace for vocabularies that write a space as U+2581; UserError for others."""
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return "ByteLevel"
    replaces = any(p.get("type") == "Replace" and p.get("pattern") == {"String": "\u2581"} for p in parts)
    if "Metaspace" in kinds or replaces:
        return "Metaspace"
    raise UserError(f"{where} decodes by {sorted(map(str, kinds))}; only ByteLevel and Metaspace vocabularies are read")


def byte_level_table() -> dict[str, int]:
    """How byte-level vocabularies spell each byte: printable ones stand for themselves, others for U+0100 and up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level_speller() -> Callable[[str], bytes]:
    """Function from a byte-level piece to its bytes."""
    table = byte_level_table()

    def spell(piece: str) -> bytes:
        try:
            return bytes([table[char] for char in piece])
        except KeyError:
            return piece.encode()

    return spell


def _space_mark_speller(piece: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
