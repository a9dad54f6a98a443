"""Rows to tokens, in this process or in several, in the order of the rows."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import UserError
from train.data.conversations import BadRowError, Message, conversation, document_text
from train.data.pairs import LARGEST_WORD
from train.data.preferences import judged_of, pair_of
from train.data.sources import Row
from train.data.system import serve_parent

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from train.data.kinds import Kind

POOL_BYTES = 32 << 20
"""Inputs smaller than this are tokenised in this process: starting others would take longer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised document (uint16 or uint32 [n]), its loss mask (bool [n]), the UTF-8 bytes of its text."""

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    source_bytes: int


def encode_row(tokenizer: Tokenizer, kind: Kind, row: Row) -> Encoded | str | None:
    """A row as a document; why it is malformed; or None when its text is empty or its kind is another."""
    if row.problem:
        return row.problem
    try:
        return _ENCODERS[kind](tokenizer, row.value)
    except (BadRowError, UserError) as error:
        return str(error)


def _text(tokenizer: Tokenizer, value: dict[str, Any]) -> Encoded | None:
    text = document_text(value)
    if not text.strip():
        return None
    return _encoded(tokenizer, [*tokenizer.encode(text), tokenizer.document_end_id], None, len(text.encode()))


def _conversation(tokenizer: Tokenizer, value: dict[str, Any], *, last: bool = False) -> Encoded:
    """Every turn of the assistant whose weight is not 0, or the last turn if it is one."""
    messages, tools = conversation(value)
    learned = [message.get("weight", 1) == 1 for message in messages if message["role"] == "assistant"]
    if last:
        learned[:-1] = [False] * (len(learned) - 1)
    ids, mask = tokenizer.encode_conversation(_unweighted(messages), tools=tools, learned=learned)
    if not any(mask):
        raise BadRowError("no token of the assistant, so nothing to learn")
    return _encoded(tokenizer, ids, mask, _size(messages))


def _pair(tokenizer: Tokenizer, value: dict[str, Any]) -> Encoded | None:
    pair = pair_of(value)
    if pair is None:
        return None
    chosen = _reply(tokenizer, pair.prompt, pair.chosen, pair.tools)
    rejected = _reply(tokenizer, pair.prompt, pair.rejected, pair.tools)
    if chosen[0] == rejected[0]:
        raise BadRowError("chosen is equal to rejected, as the chat template writes them")
    if len(chosen[0]) > LARGEST_WORD:
        raise BadRowError(f"chosen has {len(chosen[0]):,} tokens, and the most is {LARGEST_WORD:,}")
    header = [len(chosen[0]), round(pair.margin * 100)]
    mask = [False] * len(header) + chosen[1] + rejected[1]
    size = _size([*pair.prompt, *pair.chosen, *pair.rejected])
    return _encoded(tokenizer, header + chosen[0] + rejected[0], mask, size)


def _judged(tokenizer: Tokenizer, value: dict[str, Any]) -> Encoded | None:
    judged = judged_of(value)
    if judged is None:
        return None
    ids, mask = _reply(tokenizer, judged.prompt, judged.reply, judged.tools)
    return _encoded(tokenizer, [int(judged.good), *ids], [False, *mask], _size([*judged.prompt, *judged.reply]))


_ENCODERS: dict[Kind, Callable[[Tokenizer, dict[str, Any]], Encoded | None]] = {
    "pretrain": _text,
    "sft": _conversation,
    "sft-last": functools.partial(_conversation, last=True),
    "preference": _pair,
    "kto": _judged,
}


def _reply(
    tokenizer: Tokenizer, prompt: list[Message], reply: list[Message], tools: list[dict[str, Any]] | None
) -> tuple[list[int], list[bool]]:
    """A conversation of which the assistant's turns in `reply` are judged, and one token that follows the last of them.

    The last token of a sequence is a target and no input. So that the token that ends the turn, where a reward model's
    score stands, is one, what the template writes next follows it, or else the same token again; neither is learned.
    """
    asked, answered = ([m for m in part if m["role"] == "assistant"] for part in (prompt, reply))
    learned = [False] * len(asked) + [True] * len(answered)
    ids, mask = tokenizer.encode_conversation(_unweighted([*prompt, *reply]), tools=tools, learned=learned)
    if not any(mask):
        raise BadRowError("no token of the assistant after the prompt, so nothing to judge")
    end = len(mask) - mask[::-1].index(True)
    return [*ids[:end], *(ids[end : end + 1] or ids[-1:])], [*mask[:end], False]


def _unweighted(messages: list[Message]) -> list[Message]:
    """Messages as a chat template expects them."""
    return [{name: value for name, value in message.items() if name != "weight"} for message in messages]


def _size(messages: list[Message]) -> int:
    return sum(len(message["content"].encode()) for message in messages)


def _encoded(tokenizer: Tokenizer, ids: list[int], mask: list[bool] | None, size: int) -> Encoded:
    width = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return Encoded(np.array(ids, width), None if mask is None else np.array(mask, bool), size)


_Job = list[tuple[int, Row]]
_Results = list["Encoded | str | None"]
_worker: Callable[[_Job], _Results] | None = None


def _start_worker(tokenizer: Tokenizer, kind: Kind) -> None:
    global _worker
    serve_parent()
    _worker = lambda job: [encode_row(tokenizer, kind, row) for _, row in job]  # noqa: E731


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
def encoder(tokenizer: Tokenizer, kind: Kind, workers: int) -> Iterator[Callable[..., Any]]:
    """A function from (source, row) pairs to ((source, row), result) in the same order, by `workers` processes or none.

    A result is as of `encode_row`.
    """
    if workers < 1:
        yield lambda rows: ((item, encode_row(tokenizer, kind, item[1])) for item in rows)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer, kind))
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
