"""A vocabulary made larger for a new language: more pieces behind the old ones, which keep their ids and their texts.

New pieces are learned on top of the old ones (byte-pair encoding that goes on where the old vocabulary stopped): each
joins two neighbours that the old vocabulary left apart in the new text, or is a character that it spelled in bytes, and
is the one that saves most tokens. New joins are applied after all old ones, so that text is cut as before and then
joined further, and every new piece is reached.
"""

from __future__ import annotations

import collections
import heapq
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from errors import UserError
from model.protobuf import field, fields_of, number
from model.tokenizer import Tokenizer
from model.tokenizer_backends import byte_level_table
from model.tokenizer_training import check_place, even_sample, status, tokenizer_directory

BLOCK = "\u2581"
"""Sentencepiece's sign for a space."""
SAMPLE_BYTES = 16 << 20
LEAST = 2
"""A join that occurs less often is not learned."""
LONGEST = 32
"""Signs in a piece, as the vocabulary spells it."""
STRETCH = 64
"""Pieces in a word that joins are learned in; a longer one is cut."""
SIGNS = (
    r"!-/:-@\[-`{-~\u00a1-\u00bf\u2010-\u2027\u2030-\u205e\u3001-\u3003\u3008-\u3011\u3014-\u301f"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
WORD = re.compile(rf" ?[^\s\d\x00-\x1f\u2581{SIGNS}]+| ?[{SIGNS}]+")
"""What a piece may span where the vocabulary itself has no rule: letters and their marks, or punctuation."""

Merge = tuple[str, str]


class Vocabulary(Protocol):
    """What extending needs of a vocabulary. Words and pieces are spelled as it spells them."""

    known: set[str]
    """Pieces that text is cut into."""
    taken: set[str]
    """Spellings of tokens that are none: control tokens, bytes."""

    def words(self, text: str) -> Iterable[str]:
        """The stretches of a text that no piece goes beyond."""
        ...

    def split(self, word: str) -> list[str]:
        """The pieces of a word whose characters are all known."""
        ...

    def ids(self, raw: bytes) -> list[int]:
        """The tokens that spell these bytes, with nothing put in front."""
        ...

    def extended(self, pieces: Sequence[str], merges: Sequence[Merge]) -> dict[str, bytes]:
        """The files of the tokenizer with `pieces` behind the others, `merges` in the order in which they apply."""
        ...


def extend_tokenizer(
    old: Tokenizer,
    texts: Iterable[str],
    add: int,
    out: Path,
    *,
    progress: bool = True,
    sample_bytes: int = SAMPLE_BYTES,
) -> Tokenizer:
    """Adds exactly `add` pieces learned from `texts` to `old` and writes the result as the directory `out`.

    The same texts give the same bytes. `out` appears whole or not at all; a tokenizer that stands there is replaced.
    UserError when the vocabulary is of a kind that cannot be extended, when the texts do not support so many pieces
    (with the number that they do), and when `out` holds something else.
    """
    out = Path(out)
    if add < 1:
        raise UserError(f"{add} new tokens make no larger vocabulary; add at least 1")
    check_place(out)
    vocabulary = open_vocabulary(old)
    with status(progress) as say:
        words: collections.Counter[str] = collections.Counter()
        for text in even_sample(texts, sample_bytes, say):
            words.update(vocabulary.words(text))
        say(f"learning {add} tokens from {len(words):,} different words")
        pieces, merges = learn(_cut(words, vocabulary), add, vocabulary)
    if len(pieces) < add:
        raise UserError(
            f"{add} new tokens are more than the text supports: at most {len(pieces)}; add fewer, or give more text"
        )
    new = Tokenizer(vocabulary.extended(pieces, merges), str(out))
    if any(new.token_bytes(i) != old.token_bytes(i) for i in range(old.vocab_size)):
        raise UserError(f"the vocabulary of {old.source} cannot be extended: its ids would not stay as they are")
    with tokenizer_directory(out) as partial:
        new.save(partial)
    return Tokenizer.load(out)


def spelled_before(old: Tokenizer, new: Tokenizer) -> dict[int, tuple[int, ...]]:
    """For each token of `new` beyond those of `old`, the tokens of `old` that spell it; empty for what has no text."""
    vocabulary = open_vocabulary(old)
    added = range(old.vocab_size, new.vocab_size)
    return {token: tuple(vocabulary.ids(new.token_bytes(token))) for token in added}


def open_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer. UserError where it is not byte-pair encoding."""
    files = tokenizer.files
    if "tokenizer.json" in files:
        return HuggingFaceVocabulary(files, tokenizer.source)
    return SentencePieceVocabulary(files, tokenizer.source)


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def _cut(words: Mapping[str, int], vocabulary: Vocabulary) -> collections.Counter[tuple[str, ...]]:
    """Words as pieces of the old vocabulary and characters that it has not, and how often they occur."""
    found: collections.Counter[tuple[str, ...]] = collections.Counter()
    for word, count in words.items():
        pieces: list[str] = []
        for known, part in _runs(word, vocabulary.known):
            pieces += vocabulary.split(part) if known else part
        for start in range(0, len(pieces), STRETCH):
            found[tuple(pieces[start : start + STRETCH])] += count
    return found


def _runs(word: str, known: set[str]) -> Iterator[tuple[bool, str]]:
    """`word` cut where characters with a piece of their own follow characters without, or the other way round."""
    start = 0
    for end in range(1, len(word) + 1):
        if end == len(word) or (word[end] in known) != (word[start] in known):
            yield word[start] in known, word[start:end]
            start = end


def learn(words: Mapping[tuple[str, ...], int], add: int, vocabulary: Vocabulary) -> tuple[list[str], list[Merge]]:
    """At most `add` new pieces for `words`, and every join of two neighbours in its order.

    The next piece is the one that saves most tokens: two neighbours as one, or a character that was several bytes. A
    join that gives a piece which is there already costs no token, and is one of the joins all the same.
    """
    known, taken = set(vocabulary.known), vocabulary.taken
    spelled = {char for word in words for piece in word for char in piece} - known - taken
    sequences, counts = [list(word) for word in words], list(words.values())
    saves: collections.Counter[Merge] = collections.Counter()
    places: dict[Merge, set[int]] = collections.defaultdict(set)

    def options(row: int) -> Iterator[tuple[Merge, int]]:
        """What could be done in a word, and the tokens that it would save; ("", c): give a character a piece."""
        sequence = sequences[row]
        for pair in pairwise(sequence):
            if spelled.isdisjoint(pair):
                yield pair, counts[row]
        for char in spelled.intersection(sequence):
            yield ("", char), counts[row] * sequence.count(char) * (len(char.encode()) - 1)

    for row in range(len(sequences)):
        for option, saved in options(row):
            saves[option] += saved
            places[option].add(row)
    heap = [(-saved, option) for option, saved in saves.items()]
    heapq.heapify(heap)
    pieces: list[str] = []
    merges: list[Merge] = []
    while heap and len(pieces) < add:
        negative, chosen = heapq.heappop(heap)
        saved, joined = saves[chosen], "".join(chosen)
        if saved < LEAST or joined in taken or len(joined) > LONGEST:
            continue
        if saved != -negative:  # it was counted before other joins changed it
            heapq.heappush(heap, (-saved, chosen))
            continue
        if joined not in known:
            known.add(joined)
            pieces.append(joined)
        rows = sorted(places.pop(chosen))
        for row in rows:
            for option, lost in options(row):
                saves[option] -= lost
        if chosen[0]:
            merges.append(chosen)
            for row in rows:
                sequences[row] = _joined(sequences[row], chosen)
        else:
            spelled.discard(joined)
        grown: set[Merge] = set()
        for row in rows:
            for option, saved in options(row):
                saves[option] += saved
                places[option].add(row)
                if joined in option:
                    grown.add(option)
        for option in grown:
            heapq.heappush(heap, (-saves[option], option))
    return pieces, merges


def _joined(sequence: list[str], pair: Merge) -> list[str]:
    """`sequence` with every occurrence of `pair` as one piece, from the left."""
    found: list[str] = []
    at = 0
    while at < len(sequence):
        if tuple(sequence[at : at + 2]) == pair:
            found.append("".join(pair))
            at += 2
        else:
            found.append(sequence[at])
            at += 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of vocabularies


class SentencePieceVocabulary:
    """A sentencepiece model. It joins any neighbours that make a piece, the best score first."""

    BPE = 2

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        import sentencepiece

        self._files, self._raw = dict(files), files["tokenizer.model"]
        if _model_type(self._raw) != self.BPE:
            raise UserError(f"{source}/tokenizer.model is no byte-pair vocabulary; only those can be extended")
        # A message that follows another overrides it: no space in front, and none taken away.
        plain = self._raw + field(3, number(3, 0) + number(4, 0))
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=plain)
        pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
        self.known = {piece for piece, i in pieces.items() if self._is_text(i)}
        self.taken = pieces.keys() - self.known
        self._bytes = [model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]

    def _is_text(self, i: int) -> bool:
        model = self._model
        return not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i) or model.is_unused(i))

    def words(self, text: str) -> Iterable[str]:
        """Words and punctuation, with the space before them."""
        return (word.replace(" ", BLOCK) for word in WORD.findall(text))

    def split(self, word: str) -> list[str]:
        """Pieces of a word that is spelled with U+2581."""
        return [self._model.id_to_piece(i) for i in self._model.encode(word.replace(BLOCK, " "))]

    def ids(self, raw: bytes) -> list[int]:
        """Pieces, or bytes for what is no text."""
        try:
            return self._model.encode(raw.decode())
        except UnicodeDecodeError:
            return [self._bytes[byte] for byte in raw]

    def extended(self, pieces: Sequence[str], merges: Sequence[Merge]) -> dict[str, bytes]:
        """The model with scores below all others; what joins is told by the pieces alone."""
        del merges
        size = self._model.get_piece_size()
        lowest = min(0.0, *(self._model.get_score(i) for i in range(size)))
        step = max(1.0, 2.0 * float(np.spacing(np.float32(-lowest))))
        scored = (
            field(1, piece.encode()) + b"\x15" + struct.pack("<f", lowest - step * (rank + 1))
            for rank, piece in enumerate(pieces)
        )
        # Pieces that follow the message belong to the list in it: the old model is a prefix of the new one.
        model = self._raw + b"".join(field(1, piece) for piece in scored) + field(2, number(4, size + len(pieces)))
        return self._files | {"tokenizer.model": model}


class HuggingFaceVocabulary:
    """A tokenizer.json with byte-pair encoding, over bytes or over characters with bytes for the unknown."""

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        import tokenizers

        where = f"{source}/tokenizer.json"
        self._files = {name: content for name, content in files.items() if name != "tokenizer.model"}
        self._data: dict[str, Any] = json.loads(files["tokenizer.json"])
        model = self._data["model"]
        fixes = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
        if model.get("type", "BPE") != "BPE" or "merges" not in model or any(fixes):
            raise UserError(f"{where} is no plain byte-pair vocabulary; only those can be extended")
        self._vocabulary: dict[str, int] = model["vocab"]
        added = {token["content"]: token["id"] for token in self._data.get("added_tokens") or []}
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        listed = config.get("added_tokens_decoder") or {}
        self._added = {token["content"]: int(i) for i, token in listed.items()} | added
        self._size = 1 + max([*self._vocabulary.values(), *self._added.values()])
        # Added tokens are found in any text, and frames are put around it: neither is wanted here.
        bare = self._data | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._whole: Any = tokenizers.Tokenizer.from_str(json.dumps(bare))
        self._bare: Any = tokenizers.Tokenizer.from_str(json.dumps(bare | {"normalizer": None, "pre_tokenizer": None}))
        decoder = self._data.get("decoder") or {}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
        table = {byte: char for char, byte in byte_level_table().items()}
        self._chars = table if "ByteLevel" in kinds else None
        own_bytes = {f"<0x{byte:02X}>" for byte in range(256)} if self._chars is None else set()
        unknown = {model["unk_token"]} if model.get("unk_token") else set()
        self.taken = self._added.keys() | own_bytes | unknown
        self.known = self._vocabulary.keys() - self.taken
        self._space = BLOCK if any(piece.startswith(BLOCK) for piece in self.known) else " "

    def words(self, text: str) -> Iterable[str]:
        """What the tokenizer itself cuts text into, or words and punctuation with the space before them."""
        if self._chars is None:
            return (word.replace(" ", self._space) for word in WORD.findall(text))
        if self._whole.normalizer is not None:
            text = self._whole.normalizer.normalize_str(text)
        return (word for word, _ in self._whole.pre_tokenizer.pre_tokenize_str(text))

    def split(self, word: str) -> list[str]:
        """Pieces of a word."""
        return self._bare.encode(word, add_special_tokens=False).tokens

    def ids(self, raw: bytes) -> list[int]:
        """Pieces, or bytes for what is no text."""
        if self._chars is not None:
            spelled = "".join(self._chars[byte] for byte in raw)
        else:
            try:
                spelled = raw.decode().replace(" ", self._space)
            except UnicodeDecodeError:
                return [self._vocabulary[f"<0x{byte:02X}>"] for byte in raw]
        return self._bare.encode(spelled, add_special_tokens=False).ids

    def extended(self, pieces: Sequence[str], merges: Sequence[Merge]) -> dict[str, bytes]:
        """The file with pieces and merges at the end of its lists."""
        model = dict(self._data["model"])
        # The library numbers added tokens behind the vocabulary unless they stand in it.
        new = {piece: self._size + n for n, piece in enumerate(pieces)}
        model["vocab"] = self._vocabulary | self._added | new
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] = [*model["merges"], *(" ".join(pair) if as_text else list(pair) for pair in merges)]
        text = json.dumps(self._data | {"model": model}, ensure_ascii=False)
        return self._files | {"tokenizer.json": text.encode()}


def _model_type(model: bytes) -> int:
    """`trainer_spec.model_type` of a sentencepiece model; 1 (unigram) where it is not said."""
    found = 1
    for place, value in fields_of(model):
        if place == 2 and isinstance(value, bytes):
            found = next((v for n, v in fields_of(value) if n == 3 and isinstance(v, int)), found)
    return found
