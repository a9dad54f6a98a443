"""Small texts, and a tokenizer whose tokens are bytes, for the tests of the data pipeline."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import zstandard

from model.tokenizer import Tokenizer
from train.data.store import Store

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")


@cache
def byte_tokenizer(extra: str = "") -> Tokenizer:
    """A Hugging Face tokenizer without merges: a token a byte. `extra` is one more token, for another fingerprint."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    model.add_special_tokens([*SPECIALS, *([extra] if extra else [])])
    return Tokenizer({"tokenizer.json": model.to_str().encode()}, "bytes")


def sentences(count: int) -> list[str]:
    """Texts of 10 to 200 characters, all different, in several scripts."""
    words = ["the river", "une maison", "红楼梦", "été", "def f(x):\n    return x", "🙂", "Ελλάδα", "quietly"]
    return [f"{i}: " + " ".join(words[(i * 7 + j) % len(words)] for j in range(1 + i % 17)) for i in range(count)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as .jsonl, or .jsonl.gz by the name; strings are put under "text"."""
    lines = [json.dumps({"text": row} if isinstance(row, str) else row, ensure_ascii=False) + "\n" for row in rows]
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns in OpenAI's form; what the assistant says is in capitals."""
    return [
        {"messages": [turn for t in range(1 + i % 3) for turn in _turns(f"question {i} {t}", f"ANSWER {i} {t}")]}
        for i in range(count)
    ]


def _turns(question: str, answer: str) -> Sequence[dict[str, str]]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def texts_of(store: Store) -> list[str]:
    """The documents of a store of bytes, without the token that ends each."""
    tokenizer = byte_tokenizer()
    assert all(store[i].tokens[-1] == tokenizer.document_end_id for i in range(len(store)))
    return [tokenizer.decode(store[i].tokens[:-1].tolist()) for i in range(len(store))]


def write_form(path: Path, form: str, texts: list[str]) -> Path:
    """`texts` in a file of one of the supported forms."""
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    file = path / f"corpus{form}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if form == ".jsonl.zst":
        half = len(lines) // 2
        frames = [zstandard.ZstdCompressor().compress(part) for part in (lines[:half], lines[half:])]
        file.write_bytes(b"".join(frames))
    elif form == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, file, row_group_size=30)
    elif form == ".arrayrecord":
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for i, text in enumerate(texts):
            writer.write(json.dumps({"text": text}).encode() if i % 2 else text.encode())
        writer.close()
    else:
        file.write_bytes(gzip.compress(lines) if form.endswith(".gz") else b"\xef\xbb\xbf" + lines + b"\n")
    return file
