"""Text to tokens and back: one class for sentencepiece models and tokenizer.json; chats, with a mask for the loss.

Control tokens (<|im_start|>, <think>, ...) are structure. Text cannot spell them unless the caller says that it may
(`specials=True`), and a message of a chat never can; see `model.chat_template`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import UserError
from model.chat_template import SPAN_CLOSE, SPAN_OPEN, ChatTemplate, clean, default_template
from model.tokenizer_backends import open_backend

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|return|>", "<|call|>", "<end_of_turn>")

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


class Tokenizer:
    """A vocabulary, its control tokens and its chat template. Cheap to send to another process (it pickles its files).

    `files` are the bytes of a tokenizer directory by file name; `source` names it in errors. Use `load`.
    """

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        self.source = source
        self._files = dict(files)
        self._config = _parse_config(self._files.get("tokenizer_config.json"), source)
        self._backend = open_backend(self._files, self._config, source)
        self._controls = self._backend.controls
        self._pieces = self._backend.pieces
        self._skipped = {control.id for control in self._controls.values() if control.special}

    @property
    def files(self) -> dict[str, bytes]:
        """The files that `load` read, by name, and the chat template in force."""
        return self._files | {"chat_template.jinja": self._template_source.encode()}

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._files, self.source)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a directory: tokenizer.json or tokenizer.model, and what stands beside it.

        tokenizer_config.json and chat_template.jinja are optional; without a chat template it is Qwen3's form.
        UserError when the directory, the tokenizer or a readable file is missing.
        """
        directory = Path(path)
        if not directory.exists():
            raise UserError(f"tokenizer directory {directory} does not exist")
        if not directory.is_dir():
            raise UserError(f"{directory} is a file; give the directory that holds tokenizer.model or tokenizer.json")
        try:
            files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
        except OSError as error:
            raise UserError(f"cannot read the tokenizer in {directory}: {error}") from error
        if not files.keys() & {"tokenizer.json", "tokenizer.model"}:
            raise UserError(f"{directory} holds neither tokenizer.model nor tokenizer.json")
        return cls(files, str(directory))

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load` read, byte for byte, and the chat template in force."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        files = self.files
        for name, content in files.items():
            partial = target / f".{name}.{os.getpid()}"
            partial.write_bytes(content)
            os.replace(partial, target / name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides tokens: the vocabulary, the control tokens, the chat template."""
        digest = hashlib.sha256()
        files = self.files
        for name in sorted(files):
            digest.update(f"{name} {len(files[name])}\n".encode())
            digest.update(files[name])
        return digest.hexdigest()

    # -----------------------------------------------------------------------------------------------------------------
    # Ids

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._pieces)

    def token_id(self, piece: str) -> int | None:
        """Id of a control token, or of a piece as the vocabulary spells it."""
        control = self._controls.get(piece)
        return control.id if control else self._backend.piece_id(piece)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of all control tokens: those of the frame and those of the markup."""
        return frozenset(control.id for control in self._controls.values())

    @cached_property
    def document_end_id(self) -> int:
        """The token that ends a document; UserError when the vocabulary has none."""
        found = self._first_control((*DOCUMENT_ENDS, self._named("eos_token")))
        if found is None:
            raise UserError(f"the tokenizer in {self.source} has no token that ends a document, such as <|endoftext|>")
        return found

    @property
    def document_start_id(self) -> int | None:
        """The token that texts began with when the model was trained; None where the vocabulary names none."""
        return self._first_control((self._named("bos_token"),))

    @cached_property
    def pad_id(self) -> int:
        """What fills rows; never read."""
        found = self._first_control((self._named("pad_token"),))
        return self.document_end_id if found is None else found

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens after which an assistant has nothing to add: the end of a turn, the end of a document."""
        names = (*TURN_ENDS, self._named("eos_token"), *DOCUMENT_ENDS)
        found = (self._controls[name].id for name in names if name in self._controls)
        return tuple(dict.fromkeys(found))

    def _first_control(self, names: Iterable[str]) -> int | None:
        return next((self._controls[name].id for name in names if name in self._controls), None)

    def _named(self, role: str) -> str:
        """`bos_token` and the like in tokenizer_config.json, which gives a string or an object."""
        token = self._config.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        return content if isinstance(content, str) else ""

    # -----------------------------------------------------------------------------------------------------------------
    # Text

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of `text`. Control tokens in it are plain characters, unless `specials`.

        Lone surrogates, which are no text, become U+FFFD. No token is put in front or behind.
        """
        text = clean(text)
        return self._encode_structure(text) if specials else self._backend.encode(text)

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, and ids outside of the vocabulary nothing.

        `skip_specials` leaves out the frame (<|im_end|>, <|endoftext|>) and keeps the markup (<think>, <tool_call>).
        """
        raw = b"".join(map(self.token_bytes, self._kept(ids, skip_specials)))
        if self._backend.adds_space and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for: part of a character, or several."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def _kept(self, ids: Iterable[int], skip_specials: bool) -> Iterator[int]:
        return (i for i in ids if not (skip_specials and i in self._skipped))

    @cached_property
    def _structure(self) -> re.Pattern[str]:
        """Finds control tokens; in marked text only those that are structure."""
        patterns: list[str] = []
        for piece in sorted(self._controls, key=len, reverse=True):
            control = self._controls[piece]
            before, after = r"\s*" if control.lstrip else "", r"\s*" if control.rstrip else ""
            patterns.append(before + self._template.pattern(piece) + after)
        return re.compile("|".join(patterns) or r"(?!)")

    def _control_id(self, match: re.Match[str]) -> int:
        return self._controls[self._template.unmark(match.group()).strip()].id

    def _encode_structure(self, text: str) -> list[int]:
        """Ids of marked text: structure as control tokens, the rest as plain characters."""
        ids: list[int] = []
        at = 0
        for match in self._structure.finditer(text):
            ids += self._encode_words(text[at : match.start()])
            ids.append(self._control_id(match))
            at = match.end()
        return ids + self._encode_words(text[at:])

    def _encode_words(self, marked: str) -> list[int]:
        return self._backend.encode(self._template.unmark(marked)) if marked else []

    # -----------------------------------------------------------------------------------------------------------------
    # Chats

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
    ) -> str:
        """The conversation as the text that `encode_chat` reads; UserError naming a malformed message."""
        marked = self._template.render(
            messages, tools, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking
        )
        return self._template.unmark(marked)

    def encode_chat(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
    ) -> list[int]:
        """Ids of a conversation. Only the template writes control tokens: contents cannot.

        What an assistant said is encoded apart from the header before it, as it was when the model wrote it.
        """
        marked = self._template.render(
            messages, tools, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking
        )
        texts = (
            text for part, own in self._parts(marked) for text, _ in (self._opening(part) if own else [(part, own)])
        )
        return [i for text in texts for i in self._encode_structure(text)]

    def encode_conversation(
        self, messages: Messages, *, tools: Tools = None, learned: Sequence[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them the assistant has to produce.

        Those are its thoughts, words and calls and the token that ends its turn, in every turn as it is shown (Qwen3
        shows earlier turns without thoughts); with `learned`, which has a word for each turn of the assistant in their
        order, in those turns alone. The empty block that a turn without thoughts begins with is the assistant's too, so
        that a model that never learnt to think answers the prompt that chats end with (arXiv 2505.09388, 4.3, has it
        write the block for "/no_think"); but where the last of "/think" and "/no_think" that it was told is "/think",
        which such a turn does not do, the block is not learned.

        UserError when the template does not tell turns apart.
        """
        parts = self._parts(self._template.render(messages, tools))
        switches = _told_to_think(messages)
        own = sum(begins for _, begins in parts)
        if not own and switches:
            raise UserError(
                f"the chat template of {self.source} does not say where an assistant's turn begins; "
                "enclose what the model produces in {% generation %} and {% endgeneration %}"
            )
        if own != len(switches):
            if learned is not None and not all(learned):
                raise UserError(
                    f"the chat template of {self.source} shows {len(switches)} turns of the assistant in {own} parts, "
                    "so it cannot be said which of them are learned"
                )
            switches, learned = [False] * own, None
        turns = zip(switches, learned or [True] * own, strict=True)
        ids: list[int] = []
        owned: list[bool] = []
        for part, is_own in parts:
            switch, learn = next(turns) if is_own else (False, False)
            for text, opened in self._opening(part) if is_own else [(part, False)]:
                tokens = self._encode_structure(text)
                ids += tokens
                owned += [learn and not (opened and switch)] * len(tokens)
        return ids, owned

    def _parts(self, marked: str) -> list[tuple[str, bool]]:
        """Marked text cut where an assistant's own part begins and ends: (text, is it the assistant's)."""
        if SPAN_OPEN in marked:
            cut = re.split(f"{SPAN_OPEN}(.*?){SPAN_CLOSE}", marked, flags=re.DOTALL)
            return [(text, n % 2 == 1) for n, text in enumerate(cut) if text]
        if not self._assistant_header:
            return [(marked, False)]
        head, *turns = marked.split(self._assistant_header)
        parts = [(head, False)]
        for turn in turns:
            stops = (m.end() for m in self._structure.finditer(turn) if self._control_id(m) in self.stop_ids)
            end = next(stops, len(turn))
            parts += [(self._assistant_header, False), (turn[:end], True), (turn[end:], False)]
        return [(text, own) for text, own in parts if text]

    def _opening(self, part: str) -> list[tuple[str, bool]]:
        """An assistant's own part, cut behind an empty block of thoughts that it begins with: (text, is it that)."""
        empty = self._no_thoughts
        return [(empty, True), (part[len(empty) :], False)] if empty and part.startswith(empty) else [(part, False)]

    @cached_property
    def _assistant_header(self) -> str:
        """What stands before an assistant's own part, such as "<|im_start|>assistant\\n"; empty when unknown.

        It is what a generation prompt adds, up to the thoughts that some templates begin there. It must hold a control
        token, or a message could forge it.
        """
        probe = [{"role": "user", "content": "x"}]
        try:
            before = self._template.render(probe)
            after = self._template.render(probe, add_generation_prompt=True)
        except UserError:
            return ""
        header = after.removeprefix(before).split("<think>")[0] if after.startswith(before) else ""
        return header if self._structure.search(header) else ""

    @cached_property
    def _no_thoughts(self) -> str:
        """The empty block of thoughts that a prompt ends with where thinking is off; empty where there is none."""
        probe = [{"role": "user", "content": "x"}]
        try:
            prompt = self._template.render(probe, add_generation_prompt=True, enable_thinking=False)
        except UserError:
            return ""
        block = re.search(r"<think>\s*</think>\s*$", prompt)
        return block.group() if block else ""

    @cached_property
    def _template(self) -> ChatTemplate:
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        variables = {name: self._named(name) for name in names}
        return ChatTemplate(self._template_source, self._controls, variables, self.source)

    @cached_property
    def _template_source(self) -> str:
        try:
            if "chat_template.jinja" in self._files:
                return self._files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.source}/chat_template.jinja is not UTF-8") from error
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else default_template()


SWITCH = re.compile(r"(?<![A-Za-z0-9_./-])/(?:no_)?think(?![A-Za-z0-9_/-])")
"""Qwen3's words to the model, in what users and the system say: the last one holds until the next."""


def _told_to_think(messages: Messages) -> list[bool]:
    """For each turn of the assistant, whether the last switch that it was told is "/think"."""
    found: list[bool] = []
    on = False
    for message in messages:
        if message["role"] == "assistant":
            found.append(on)
        elif message["role"] in ("system", "user"):
            content = message.get("content")
            texts = [content] if isinstance(content, str) else [part["text"] for part in content or []]
            on = next((word == "/think" for word in reversed(SWITCH.findall("\n".join(texts)))), on)
    return found


def _parse_config(raw: bytes | None, source: str) -> dict[str, Any]:
    try:
        config = json.loads(raw or b"{}")
    except ValueError as error:
        raise UserError(f"{source}/tokenizer_config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{source}/tokenizer_config.json must hold a JSON object")
    return config


class StreamDecoder:
    """Text of tokens as they come: never half of a character, and in the end what `decode` gives for all of them."""

    def __init__(self, tokenizer: Tokenizer, *, skip_specials: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_specials = skip_specials
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer._backend.adds_space

    def push(self, token_id: int) -> str:
        """The text that is certain now; may be empty."""
        raw = b"".join(map(self._tokenizer.token_bytes, self._tokenizer._kept((token_id,), self._skip_specials)))
        if raw and self._at_start:
            self._at_start = False
            raw = raw.removeprefix(b" ")
        return self._utf8.decode(raw)

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)
