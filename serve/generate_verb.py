"""`qmax generate` and `qmax chat`: a model in the terminal.

The reply goes to stdout and everything about it to stderr, so that both can be used in a pipe.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError, did_you_mean
from terminal import Parser, write_json

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from serve.engine import Engine
    from serve.sampling_params import SamplingParams

MAX_SLOTS = 16
"""Replies to one prompt that are generated at the same time."""

MODELS = "a run that `qmax train` made, a Hugging Face directory, a .gguf file or a llama2.c .bin file"

COMMANDS = {
    "/reset": "forget the conversation",
    "/help": "show this",
    "/exit": "leave (or Ctrl-D)",
}


def generate_main(argv: list[str]) -> int:
    """Runs `qmax generate`; returns the exit code. UserError for what the user can mend."""
    args = _generate_parser().parse_args(argv)
    text = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    params = sampling_of(args)
    if args.n < 1:
        raise UserError(f"--n {args.n} must be 1 or more")
    engine, tokenizer = open_model(args.model, min(args.n, MAX_SLOTS))
    prompt = chat_prompt(tokenizer, text, not args.no_thinking) if args.chat else tokenizer.encode(text)
    # What a reply begins with may complete a character or carry the space after the prompt's last word.
    context = () if args.chat else prompt
    started = time.monotonic()
    if args.n == 1:
        replies = [stream_reply(engine, tokenizer, prompt, params, context)]
        print(flush=True)
    else:
        replies = []
        for index, completion in enumerate(engine.generate([prompt] * args.n, params.variants(args.n))):
            said = text_of(tokenizer, completion.content, context)
            replies.append(Reply(said, completion.tokens, completion.logprobs, completion.finish_reason))
            print(f"--- {index + 1} of {args.n} ---\n{said}", flush=True)
    seconds = time.monotonic() - started
    count = sum(len(reply.tokens) for reply in replies)
    summary = f"{count:,} tokens, {count / seconds:.1f} tokens/s with compilation" if args.n > 1 else replies[0].speed
    print(f"[{summary}, seed {params.seed}]", file=sys.stderr)
    if args.json:
        result = {
            "model": str(args.model),
            "prompt": text,
            "chat": args.chat,
            "prompt_tokens": len(prompt),
            "sampling": asdict(params),
            "completions": [reply.record for reply in replies],
            "seconds": seconds,
        }
        write_json(args.json, result)
    return 0


def chat_main(argv: list[str]) -> int:
    """Runs `qmax chat`; returns the exit code. UserError for what the user can mend."""
    args = _chat_parser().parse_args(argv)
    params = sampling_of(args)
    engine, tokenizer = open_model(args.model, 1)
    chat = Chat(engine, tokenizer, params, system=args.system, thinking=not args.no_thinking)
    if args.prompt is not None:
        reply = chat.ask(args.prompt)
        print(f"[{reply.speed}]", file=sys.stderr)
    else:
        print(f"{args.model}: {engine.config.max_positions:,} positions. {help_text()}", file=sys.stderr)
        talk(chat)
    if args.json:
        write_json(args.json, {"model": str(args.model), "sampling": asdict(params), "messages": chat.messages})
    return 0


# ---- arguments --------------------------------------------------------------
def _generate_parser() -> Parser:
    parser = Parser(
        "generate",
        f"Continues a prompt. The continuation goes to stdout, its speed to stderr.\nMODEL is {MODELS}.",
        [
            'qmax generate runs/demo/pretrain --prompt "Once upon a time"',
            'qmax generate runs/demo/sft --chat --prompt "What is the capital of France?" --temperature 0',
            "qmax generate runs/demo/pretrain --prompt-file story.txt --n 4 --seed 1 --json out.json",
        ],
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run or model directory, .gguf or llama2.c file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="what to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="read it from a UTF-8 file; - is stdin")
    add_sampling(parser, max_tokens=256, top_k=0)
    parser.add_argument("--n", type=int, default=1, metavar="N", help="continuations, each with a seed of its own")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="the prompt is a user's turn; the reply is the assistant's")
    form.add_argument("--raw", action="store_false", dest="chat", help="the prompt is plain text (default)")
    parser.add_json()
    return parser


def _chat_parser() -> Parser:
    parser = Parser(
        "chat",
        "Talks to a model, turn after turn. Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands,\n"
        "a line that ends with a backslash goes on.\n"
        f"MODEL is {MODELS},\n"
        "best one trained on conversations.",
        [
            "qmax chat runs/demo/sft",
            'qmax chat runs/demo/sft --system "Answer in French." --temperature 0.3',
            'qmax chat SmolLM2-135M-Instruct.Q4_1.gguf --prompt "What is the capital of France?" --temperature 0',
        ],
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run or model directory, .gguf or llama2.c file")
    parser.add_argument("--system", metavar="TEXT", help="instruction that stands before the conversation")
    parser.add_argument("--prompt", metavar="TEXT", help="say this, print the reply and leave")
    add_sampling(parser, max_tokens=1024, top_k=20)
    parser.add_json()
    return parser


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int, top_k: int) -> None:
    """The options that say how to draw tokens."""

    def add(name: str, kind: type, default: Any, words: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        metavar = "N" if kind is int else "X"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=words + shown)

    add("max-tokens", int, max_tokens, "longest reply")
    add("temperature", float, 0.7, "0 takes the most likely token always; higher is more varied")
    add("top-p", float, 0.95, "draw from the most likely tokens that make up this probability")
    add("top-k", int, top_k, "draw from the k most likely tokens; 0 from all")
    add("min-p", float, 0.0, "draw from tokens at least this many times as likely as the best one")
    add("seed", int, None, "the same seed gives the same reply")
    parser.add_argument("--no-thinking", action="store_true", help="ask for the answer without thinking first")


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """What the options ask for, with a seed drawn where none was given."""
    from serve.sampling_params import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=secrets.randbelow(2**31) if args.seed is None else args.seed,
        max_tokens=args.max_tokens,
    )


def read_prompt(name: str) -> str:
    """The text of a file, or of stdin for `-`. UserError where it cannot be read."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UserError(f"{name} is not UTF-8 at byte {exc.start}; convert it first") from exc
    except OSError as exc:
        raise UserError(f"cannot read the prompt from {name}: {exc.strerror}") from exc


def open_model(path: Path, slots: int) -> tuple[Engine, Tokenizer]:
    """A MODEL and its tokenizer, ready to generate."""
    from sharding.runtime import configure_jax

    configure_jax()
    from model.load import open_decoder
    from serve.engine import Engine
    from serve.kept import Kept

    model, tokenizer = open_decoder(path)
    return Engine(model, tokenizer, slots=slots, kept=Kept.beside_jax()), tokenizer


# ---- replies ----------------------------------------------------------------
@dataclass
class Reply:
    """What a model said; times are in seconds since the request."""

    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "interrupted"
    first: float = 0.0
    last: float = 0.0

    @property
    def speed(self) -> str:
        """Tokens, their rate after the first one, and how long the first one took."""
        count = len(self.tokens)
        rate = f", {(count - 1) / (self.last - self.first):.1f} tokens/s" if self.last > self.first else ""
        ending = {"length": ", cut at --max-tokens", "interrupted": ", stopped"}.get(self.finish_reason, "")
        return f"{count:,} tokens{rate}, first after {self.first:.2f} s{ending}"

    @property
    def record(self) -> dict[str, Any]:
        """What `--json` holds of a reply."""
        return {name: getattr(self, name) for name in ("text", "tokens", "logprobs", "finish_reason")}


def chat_prompt(tokenizer: Tokenizer, text: str, thinking: bool) -> list[int]:
    """Tokens of one user's turn and the beginning of the reply to it."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.encode_chat(messages, add_generation_prompt=True, enable_thinking=thinking)


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], context: Sequence[int]) -> str:
    """The text of `tokens` where they follow `context`."""
    from model.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer, skip_specials=True)
    for token in context:
        decoder.push(token)
    return "".join(map(decoder.push, tokens)) + decoder.finish()


def stream_reply(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    params: SamplingParams,
    context: Sequence[int] = (),
    stop: threading.Event | None = None,
) -> Reply:
    """Prints a reply as it comes, without the token that ends it, until it ends or `stop` is set."""
    from model.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer, skip_specials=True)
    for token in context:
        decoder.push(token)
    reply, pieces = Reply(""), []
    stops = tokenizer.stop_ids if params.stop_ids is None else params.stop_ids

    def show(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    started = time.monotonic()
    for token, logprob in engine.stream(prompt, params):
        reply.last = time.monotonic() - started
        reply.first = reply.first or reply.last
        reply.tokens.append(token)
        reply.logprobs.append(logprob)
        if token in stops:
            reply.finish_reason = "stop"
            break
        show(decoder.push(token))
        if stop is not None and stop.is_set():
            break
    else:
        reply.finish_reason = "length"
    show(decoder.finish())
    reply.text = "".join(pieces)
    return reply


# ---- chat -------------------------------------------------------------------
class Chat:
    """A conversation with a model: its messages, and how to ask for the next one."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, params: SamplingParams, *, system: str | None, thinking: bool
    ):
        self.engine, self.tokenizer, self.params, self.thinking = engine, tokenizer, params, thinking
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._opening)

    def reset(self) -> None:
        """Forgets what was said; the system's instruction stays."""
        self.messages = list(self._opening)

    def ask(self, text: str) -> Reply:
        """Prints the reply to `text` and keeps both. UserError where no reply fits: then neither is kept."""
        asked = [*self.messages, {"role": "user", "content": text}]
        messages, prompt = self._fitting(asked)
        room = self.engine.config.max_positions - len(prompt)
        params = replace(self.params, max_tokens=max(1, min(self.params.max_tokens, room)))
        with interruptible() as stop:
            reply = stream_reply(self.engine, self.tokenizer, prompt, params, stop=stop)
        print(flush=True)
        self.messages = [*messages, {"role": "assistant", "content": reply.text}]
        return reply

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The messages, without the oldest exchanges if they leave the reply no quarter of the positions."""
        positions, opening = self.engine.config.max_positions, len(self._opening)
        wanted, dropped = min(self.params.max_tokens, positions // 4), 0
        while True:
            prompt = self.tokenizer.encode_chat(messages, add_generation_prompt=True, enable_thinking=self.thinking)
            if len(prompt) + wanted <= positions or len(messages) <= opening + 1:
                break
            messages = [*messages[:opening], *messages[opening + 2 :]]
            dropped += 1
        if len(prompt) >= positions:
            raise UserError(f"this turn takes {len(prompt):,} of the model's {positions:,} positions; say it in less")
        if dropped:
            print(f"[forgot the first {dropped} exchange(s): they no longer fit]", file=sys.stderr)
        return messages, prompt


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """In this block the first Ctrl-C sets the event; the second acts as ever."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def talk(chat: Chat) -> None:
    """Asks for lines and answers them until the user leaves."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() history and editing
    while True:
        try:
            text = read_turn()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        if text.startswith("/") and len(text.split()) == 1:
            if not obey(chat, text.strip()):
                return
        elif text.strip():
            try:
                print(f"[{chat.ask(text).speed}]", file=sys.stderr)
            except UserError as exc:
                print(f"qmax: {exc}", file=sys.stderr)


def read_turn() -> str:
    """What the user says: a line, or several of which all but the last end with a backslash."""
    interactive = sys.stdin.isatty()
    lines = [input("> " if interactive else "")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". " if interactive else ""))
    return "\n".join(lines)


def obey(chat: Chat, command: str) -> bool:
    """Does what a /command says; False to leave."""
    if command == "/exit":
        return False
    if command == "/reset":
        chat.reset()
        print("[forgotten]", file=sys.stderr)
    elif command == "/help":
        print(help_text(), file=sys.stderr)
    else:
        hint = did_you_mean(command, COMMANDS) or "; /help lists the commands"
        print(f"qmax: there is no command {command}{hint}", file=sys.stderr)
    return True


def help_text() -> str:
    """The commands, on one line."""
    return ", ".join(f"{name}: {words}" for name, words in COMMANDS.items()) + ", Ctrl-C: stop a reply"
