"""llama2.c's .bin files (github.com/karpathy/llama2.c, MIT) as MODELs: seven numbers, then float32 weights.

The legacy form (version 0) alone, which holds Llama models with a theta of 10,000 and rotary pairs side by side.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np

from errors import UserError
from model.config import ModelConfig, RopeConfig
from model.gguf_tensors import model_rules
from model.hf.placing import Reading, TensorFiles, compare, expected_tensors
from model.hf.rules import Shapes
from model.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, Piece, sentencepiece_model
from model.tokenizer import Tokenizer

HEADER = struct.Struct("<7i")
VERSIONED = 0x616B3432
"""What later versions of the format begin with."""

UNKNOWN_ID, BOS, EOS = 0, 1, 2
"""Ids of the control tokens, in every tokenizer of llama2.c."""


class Llama2cSource(TensorFiles):
    """A model of llama2.c. Its tokenizer lies beside it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as stream:
                header = stream.read(HEADER.size)
            size = path.stat().st_size
        except OSError as exc:
            raise UserError(f"cannot read {path}: {exc.strerror}") from exc
        if len(header) < HEADER.size:
            raise UserError(f"{path} is no model of llama2.c: it has {len(header)} bytes")
        self.config, skipped = read_config(header, path)
        self.places: dict[str, tuple[tuple[int, ...], int]] = {}
        at = HEADER.size
        for name, shape in tensors(self.config, skipped):
            self.places[name] = shape, at
            at += 4 * prod(shape)
        if at != size:
            raise UserError(
                f"{path} is truncated or no model of llama2.c (version 0): {at:,} bytes by its header, {size:,} there"
            )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the file that has as many tokens as the model."""
        return beside(self.path, self.config.vocab_size)

    def read(self, name: str) -> np.ndarray:
        """A tensor, under the name that GGUF gives it, as a view of the file."""
        shape, at = self.places[name]
        return np.memmap(self.path, "<f4", "r", at, shape)

    def rules(self, shapes: Shapes) -> list[Reading]:
        """As `TensorFiles.rules`."""
        rules = model_rules(self.config, interleaved=True)
        found = {name: shape for name, (shape, _) in self.places.items()}
        tables = [name for name in found if name.startswith("freq_cis")]
        compare(expected_tensors(rules, shapes), found, str(self.path), ignored=tables)
        return rules


def read_config(header: bytes, path: Path) -> tuple[ModelConfig, int]:
    """The sizes in a header, and the rows of the rotary tables that follow. UserError where they are none."""
    width, hidden, layers, heads, kv_heads, vocab, positions = HEADER.unpack(header)
    if width == VERSIONED:
        raise UserError(f"{path} has a later version of llama2.c's format; export the model with --version 0")
    sizes = (width, hidden, layers, heads, kv_heads, abs(vocab), positions)
    if min(sizes) <= 0 or width % heads or heads % kv_heads or width // heads % 2:
        raise UserError(f"{path} is no model of llama2.c: its header says {', '.join(map(str, sizes))}")
    if 4 * layers > path.stat().st_size:
        raise UserError(f"{path} is truncated or no model of llama2.c: {layers} layers do not fit into it")
    config = ModelConfig(
        vocab_size=abs(vocab),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        intermediate_size=hidden,
        rope=RopeConfig(theta=10_000.0),
        qk_norm=False,
        tie_embeddings=vocab > 0,
        norm_eps=1e-5,
        max_positions=positions,
        layout="llama",
    )
    return config, positions


def tensors(config: ModelConfig, table_rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors in the order of the file, with their shapes; those of all layers come one kind after the other."""
    V, D, F, H = config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim
    NH, KH = config.num_heads * H, config.num_kv_heads * H
    yield "token_embd.weight", (V, D)
    kinds: list[tuple[str, tuple[int, ...]]] = [
        ("attn_norm", (D,)),
        ("attn_q", (NH, D)),
        ("attn_k", (KH, D)),
        ("attn_v", (KH, D)),
        ("attn_output", (D, NH)),
        ("ffn_norm", (D,)),
        ("ffn_gate", (F, D)),
        ("ffn_down", (D, F)),
        ("ffn_up", (F, D)),
    ]
    for kind, shape in kinds:
        for layer in range(config.num_layers):
            yield f"blk.{layer}.{kind}.weight", shape
    yield "output_norm.weight", (D,)
    for name in ("freq_cis_real", "freq_cis_imag"):
        yield name, (table_rows, H // 2)
    if not config.tie_embeddings:
        yield "output.weight", (V, D)


# ---- tokenizer --------------------------------------------------------------------
def beside(path: Path, size: int) -> Tokenizer:
    """The first tokenizer of `size` tokens beside a model; a sentencepiece model rather than llama2.c's own form.

    Raises:
        UserError: there is none, or one is damaged.
    """
    names = (f"tok{size}.model", "tokenizer.model", f"tok{size}.bin", "tokenizer.bin")
    there = [path.parent / name for name in names if (path.parent / name).is_file()]
    if not there:
        raise UserError(f"{path.parent} holds no tokenizer for {path.name}; put {' or '.join(names)} there")
    others = []
    for file in there:
        read: Callable[[Path, int], Tokenizer | None] = read_bin if file.suffix == ".bin" else _read_model
        found = read(file, size)
        if found is not None and found.vocab_size == size:
            return found
        others.append(file.name)
    raise UserError(f"{path} has {size} tokens, and the tokenizers beside it ({', '.join(others)}) have not")


def _read_model(file: Path, size: int) -> Tokenizer:
    return _tokenizer(file.read_bytes(), file)


def _tokenizer(model: bytes, file: Path) -> Tokenizer:
    config = b'{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": true}'
    return Tokenizer({"tokenizer.model": model, "tokenizer_config.json": config}, str(file.parent))


def read_bin(file: Path, size: int) -> Tokenizer | None:
    """The tokenizer in llama2.c's own form: the longest length, then score, length and bytes of each token.

    None if it does not have exactly `size` tokens, a number that it does not say itself. UserError for one with
    tokens that are not text.
    """
    raw = file.read_bytes()
    at, pieces = 4, []
    for i in range(size):
        if at + 8 > len(raw):
            return None
        score, length = struct.unpack_from("<fi", raw, at)
        at += 8 + length
        if length < 0 or at > len(raw):
            return None
        try:
            pieces.append(_piece(i, raw[at - length : at].decode(), score))
        except UnicodeDecodeError as exc:
            raise UserError(f"{file} is damaged: token {i} is not UTF-8") from exc
    return _tokenizer(sentencepiece_model(pieces), file) if at == len(raw) else None


def _piece(token_id: int, text: str, score: float) -> Piece:
    """A token with its type, which llama2.c leaves out, and spaces as sentencepiece spells them."""
    kinds = {UNKNOWN_ID: UNKNOWN, BOS: CONTROL, EOS: CONTROL}
    if token_id in kinds:
        return Piece(text.strip(), score, kinds[token_id])
    byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return Piece(text.replace(" ", "\u2581"), score, BYTE if byte else NORMAL)
