"""Rows to tokens, in this process or in several, in the order of the rows."""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import UserError
from train.data.conversations import BadRowError, conversation, document_text
from train.data.sources import Row
from train.data.system import serve_parent

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

POOL_BYTES = 32 << 20
"""Inputs smaller than this are tokenised in this process: starting others would take longer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised document (uint16 or uint32 [n]), its loss mask (bool [n]), the UTF-8 bytes of its text."""

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    source_bytes: int


def encode_row(tokenizer: Tokenizer, objective: str, row: Row) -> Encoded | str | None:
    """A row as a document; why it is malformed; or None when its text is empty."""
    if row.problem:
        return row.problem
    width = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    try:
        if objective == "pretrain":
            text = document_text(row.value)
            if not text.strip():
                return None
            tokens = np.array([*tokenizer.encode(text), tokenizer.document_end_id], width)
            return Encoded(tokens, None, len(text.encode()))
        messages, tools = conversation(row.value)
        ids, mask = tokenizer.encode_conversation(messages, tools=tools)
        if not any(mask):
            return "no token of the assistant, so nothing to learn"
        size = sum(len(message["content"].encode()) for message in messages)
        return Encoded(np.array(ids, width), np.array(mask, bool), size)
    except (BadRowError, UserError) as error:
        return str(error)


_Job = list[tuple[int, Row]]
_Results = list["Encoded | str | None"]
_worker: Callable[[_Job], _Results] | None = None


def _start_worker(tokenizer: Tokenizer, objective: str) -> None:
    global _worker
    serve_parent()
    _worker = lambda job: [encode_row(tokenizer, objective, row) for _, row in job]  # noqa: E731


def _work(job: _Job) -> _Results:
    assert _worker is not None
    return _worker(job)


def _jobs(rows: Iterable[tuple[int, Row]]) -> Iterator[_Job]:
    """Rows in groups of at most 64 or about a megabyte of text."""
    job: _Job = []
    size = 0
    for source, row in rows:
        job.append((source, row))
        text = row.value.get("text", "")
        size += len(text) if isinstance(text, str) else 0
        if len(job) >= 64 or size >= 1 << 20:
            yield job
            job, size = [], 0
    if job:
        yield job


@contextlib.contextmanager
def encoder(tokenizer: Tokenizer, objective: str, workers: int) -> Iterator[Callable[..., Any]]:
    """A function from (source, row) pairs to ((source, row), result) in the same order, by `workers` processes or none.

    A result is as of `encode_row`.
    """
    if workers < 1:
        yield lambda rows: ((item, encode_row(tokenizer, objective, item[1])) for item in rows)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer, objective))
    try:
        yield lambda rows: _ordered(pool, rows, 2 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ordered(pool: ProcessPoolExecutor, rows: Iterable[tuple[int, Row]], ahead: int) -> Iterator[tuple[Any, Any]]:
    """Results of the pool in the order of rows, with at most `ahead` groups under way."""
    waiting: collections.deque[tuple[_Job, Future[_Results]]] = collections.deque()
    for job in itertools.chain(_jobs(rows), itertools.repeat(None)):
        if job is not None:
            waiting.append((job, pool.submit(_work, job)))
        if waiting and (job is None or len(waiting) > ahead):
            done, future = waiting.popleft()
            try:
                results = future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a tokenising process ended unexpectedly (out of memory?); run the same again with --workers 0"
                ) from error
            yield from zip(done, results, strict=True)
        if job is None and not waiting:
            return
