"""A tokenizer as the files that transformers reads."""

from __future__ import annotations

from model.tokenizer import Tokenizer


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> bytes of a tokenizer directory for `AutoTokenizer`."""
    return dict(tokenizer.files)
