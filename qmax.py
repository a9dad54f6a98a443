"""The front door: `qmax VERB ...`. A verb's modules are imported when it is called, so `qmax --help` is instant."""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
import traceback
from typing import NamedTuple

from errors import UserError, did_you_mean

__version__ = "0.1.0"


class Verb(NamedTuple):
    """One thing that qmax does."""

    name: str
    help: str
    target: str
    """`module:function`; the function takes the words after the verb and returns the exit code."""


VERBS = (
    Verb("demo", "the whole pipeline on the embedded data, from raw text to a chat reply", "train.demo:demo_main"),
    Verb("tokenizer", "train a tokenizer on text files, or add tokens to one", "train.tokenizer_verb:tokenizer_main"),
    Verb("prepare", "tokenise a corpus once into sharded ArrayRecord", "train.data.prepare_verb:prepare_main"),
    Verb("train", "train on text, chats, preferences, rewards or a teacher, as a config says", "train.main:train_main"),
    Verb("generate", "continue a prompt", "serve.generate_verb:generate_main"),
    Verb("chat", "talk to a model in the terminal", "serve.generate_verb:chat_main"),
    Verb("serve", "an OpenAI- and Anthropic-compatible server, with a chat page", "serve.serve_verb:serve_main"),
    Verb("score", "log-probabilities of given tokens, and perplexity", "train.score_verb:score_main"),
    Verb("eval", "examine a model: graded tasks with standard errors", "train.evaluation.verb:eval_main"),
    Verb("convert", "write a Hugging Face directory, or one of PEFT's", "model.convert_verb:convert_main"),
    Verb("plan", "compile the training step for TPUs that are not here: does it fit", "train.plan:plan_main"),
    Verb("report", "render what runs measured as one page", "train.report:report_main"),
    Verb("doctor", "what is on this machine, and what will be slow", "train.doctor:doctor_main"),
)

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141
OWN_PACKAGES = ("model", "sharding", "train", "serve", "configs", "errors", "terminal")
MEMORY_HELP = "lower data.batch_size or data.sequence_length, raise accumulate, or set remat to block"


def run() -> int:
    """The program: `main` in a process whose memory suits it."""
    from sharding.runtime import restart_with_huge_pages

    if set(sys.argv[1:]).isdisjoint(("-h", "--help", "--version")) and len(sys.argv) > 1:
        restart_with_huge_pages()
    code = main()
    if code and "sharding.hosts" in sys.modules:
        from sharding.hosts import leave

        leave(code)
    return code


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0 done, 1 failed, 2 for what the user can mend."""
    words, debug = _take_debug(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as exc:  # argparse leaves this way after --help
        return exc.code if isinstance(exc.code, int) else EXIT_USER if exc.code else 0
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (Exception, KeyboardInterrupt) as exc:
        code, sentence = _explain(exc)
        if debug:
            traceback.print_exception(exc)
        elif sentence:
            print(f"qmax: {sentence}", file=sys.stderr)
        return code


def usage() -> str:
    """What `qmax --help` prints."""
    width = max(len(verb.name) for verb in VERBS)
    lines = [f"  {verb.name:{width}}  {verb.help}" for verb in VERBS]
    return "\n".join(
        [
            "usage: qmax VERB ...",
            "",
            "Trains and serves mixture-of-experts language models in JAX.",
            "",
            *lines,
            "",
            "qmax VERB --help explains a verb; --debug shows the traceback of an error; --version prints the version.",
            "example: qmax demo --fast",
        ]
    )


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) > 1 and words[0] == "help":
            return _dispatch([words[1], "--help"])
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"qmax {__version__}")
        return 0
    by_name = {verb.name: verb for verb in VERBS}
    verb = by_name.get(words[0])
    if verb is None:
        hint = did_you_mean(words[0], by_name)
        raise UserError(f"there is no verb {words[0]!r}{hint or '; qmax --help lists the verbs'}")
    module, _, function = verb.target.partition(":")
    return int(getattr(importlib.import_module(module), function)(words[1:]))


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """`argv` without `--debug`, which may stand anywhere before a `--`, and whether it stood there."""
    end = argv.index("--") if "--" in argv else len(argv)
    words = [word for word in argv[:end] if word != "--debug"]
    return words + argv[end:], len(words) < end


def _explain(exc: BaseException) -> tuple[int, str]:
    """Exit code and sentence for an exception; no sentence when there is nothing to say."""
    if isinstance(exc, UserError):
        return EXIT_USER, str(exc)
    if isinstance(exc, KeyboardInterrupt):
        return EXIT_INTERRUPTED, ""
    text = " ".join(str(exc).split())
    if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
        where = f" while writing {exc.filename}" if exc.filename else ""
        return EXIT_FAILED, f"the disk is full{where}; free some space or name another place, and run it again"
    if isinstance(exc, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return EXIT_FAILED, f"out of memory{_largest_buffer(text)}; {MEMORY_HELP}"
    if isinstance(exc, ModuleNotFoundError) and (exc.name or "").partition(".")[0] not in OWN_PACKAGES:
        return EXIT_USER, f"the Python package {exc.name!r} is not installed; ./run.sh installs what is needed"
    first = text[:300] + ("..." if len(text) > 300 else "")
    return EXIT_FAILED, f"unexpected {type(exc).__name__}: {first}; run it again with --debug and report what it prints"


def _largest_buffer(text: str) -> str:
    """` (asked for 12.3 GiB)` from the words of the XLA runtime, or nothing."""
    sizes = [int(size) for size in re.findall(r"(?:allocat\w+|trying to allocate)\s+(\d+)\s*(?:bytes|B\b)", text)]
    sizes += [
        int(float(size) * 1024 ** ("KMGT".index(unit) + 1))
        for size, unit in re.findall(r"(?:allocat\w+|Used|requested)\s+(\d+(?:\.\d+)?)\s?([KMGT])i?B?\b", text)
    ]
    if not sizes:
        return ""
    from terminal import human_bytes

    return f" (asked for {human_bytes(max(sizes))})"


if __name__ == "__main__":
    sys.exit(run())
