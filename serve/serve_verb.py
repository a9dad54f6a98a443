"""`qmax serve`: a model behind an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from serve.generate_verb import MODELS
from serve.placement import Placement, add_placement, placed
from sharding.hosts import find_hosts
from terminal import Parser

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from serve.api.app import Shared
    from serve.api.service import Service
    from serve.engine import Engine

KEYS = "QMAX_API_KEYS"
KEEP_ALIVE_SECONDS = 75
"""For the next request of a connection. Clients give theirs up after 5 to 60: who closes first must not be the server,
or a request that is on its way is lost."""


def serve_main(argv: list[str]) -> int:
    """Runs `qmax serve`; returns the exit code. UserError for what the user can mend."""
    args = _parser().parse_args(argv)
    keys = read_keys(args.api_key_file)
    if not keys and not args.allow_anyone and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} can be reached from other machines and there is no API key; put keys into {KEYS} or "
            "--api-key-file, or say --allow-anyone"
        )
    names_of(args)
    for path in args.model:
        if not path.exists():
            raise UserError(f"{path} does not exist; give {MODELS}")
    hosts = find_hosts((args.coordinator, args.processes, args.process))
    door = nullcontext() if hosts is not None and hosts.process else listen(args.host, args.port)
    with door as listening, placed(args, hosts) as placement:
        if placement.many and len(args.model) > 1:
            raise UserError("several processes serve one model; start a server for each")
        if placement.leads:
            assert listening is not None
            lead(args, placement, keys, listening)
        else:
            follow(args, placement)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "serve",
        "Serves one or more models over HTTP as OpenAI and Anthropic do, with a chat page at /.\n"
        "Endpoints: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/embeddings, /v1/models,\n"
        "/tokenize, /detokenize, /health, /metrics.\n"
        f"MODEL is {MODELS}.",
        [
            "qmax serve runs/demo/sft",
            "qmax serve models/Qwen3-0.6B --name qwen3 --slots 32 --context 8192",
            f"{KEYS}=secret qmax serve runs/demo/sft --host 0.0.0.0 --port 8000",
        ],
    )
    parser.add_argument(
        "model", type=Path, nargs="+", metavar="MODEL", help="run or model directory, .gguf or llama2.c file"
    )
    parser.add_argument(
        "--name",
        action="append",
        metavar="NAME",
        help="what requests call the model, of several once for each (default: the last part of its path)",
    )

    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIRECTORY",
        help="an adapter of low rank (a run with lora.rank, or a directory of PEFT's), and what requests call "
        "it; may be given several times",
    )

    def add(name: str, kind: Any, default: Any, words: str, metavar: str = "N") -> None:
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=words + shown)

    add("host", str, "127.0.0.1", "address to listen at", "ADDRESS")
    add("port", int, 8000, "port to listen at; 0 takes a free one")
    add("slots", int, 16, "requests that run at the same time")
    add("context", int, None, "most positions of a request (default: the model's)")
    add("pages", int, None, "pages of keys and values (default: enough, or as many as fit into half the free memory)")
    add(
        "snapshots",
        int,
        None,
        "memory for what linear layers remember of prompts, for others that begin alike; 0 for none "
        "(default: some for each slot, at most a tenth of the free memory)",
        "MIB",
    )
    add(
        "guesses",
        int,
        0,
        "tokens that a step may guess, with the model's block for multi-token prediction where it has one, "
        "or else from what came before: faster where replies repeat their prompt",
    )
    add("queue", int, 256, "requests that may wait; further ones get 429")
    add("timeout", float, 600.0, "seconds that a request may take", "SECONDS")
    add("max-body", int, 32 * 2**20, "bytes of a request", "BYTES")
    add("feedback", Path, None, "keep what people say of replies here, as rows that training reads", "FILE")
    add("api-key-file", Path, None, f"file with an API key on each line; {KEYS} takes keys too, with commas", "FILE")
    parser.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="pages from here may call; * for all"
    )
    parser.add_argument("--allow-anyone", action="store_true", help="listen beyond this machine without a key")
    parser.add_argument(
        "--deterministic", action="store_true", help="the same bits whatever else is asked, more slowly"
    )
    parser.add_argument(
        "--weights", choices=("same", "int8"), default="same", help="how matrices are kept (default: same, as they are)"
    )
    parser.add_argument(
        "--kv",
        choices=("same", "int8"),
        default="same",
        help="how keys and values are kept (default: same, as activations)",
    )
    add_placement(parser)
    return parser


def names_of(args: argparse.Namespace) -> list[str]:
    """What each model is called. UserError where that is not clear."""
    found = args.name or [path.resolve().name for path in args.model]
    if len(found) != len(args.model):
        raise UserError(f"{len(args.model)} models came with {len(found)} names; give --name once for each, or not")
    every = [*found, *(name for name, _ in adapters_of(args))]
    twice = next((name for name in every if every.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two models are called {twice!r}; give each a --name of its own")
    return found


def adapters_of(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Names and files of adapters. UserError for one without a name, and where it is not clear whose they are."""
    found = [(name, Path(path)) for name, _, path in (given.partition("=") for given in args.adapter)]
    for name, path in found:
        if not name or path == Path():
            raise UserError(f"--adapter takes NAME=DIRECTORY, such as tuned=runs/tuned, not {name or '='!r}")
        if not path.exists():
            raise UserError(f"the adapter {path} does not exist")
    if found and len(args.model) > 1:
        raise UserError("adapters are served beside one model; start a server for each model")
    return found


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The API keys of the environment and of a file. UserError where it cannot be read or holds none."""
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",")]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read API keys from {file}: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UserError(f"{file} holds no API key; put one on each line")
        keys += found
    return tuple(key for key in keys if key)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, before anything slow begins. UserError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, port))
            made.listen(1024)  # who comes while the model is loaded waits instead of being turned away
        except BaseException:
            made.close()
            raise
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}:{port}: {error}; choose another with --host and --port") from error
    return made


def follow(args: argparse.Namespace, placement: Placement) -> None:
    """Works on what process 0 says until that has ended, which is told to stop in its place."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    engine, _ = load_engine(args, args.model[0], placement)
    engine.device.programs.prepare()
    engine.device.follow()


def lead(args: argparse.Namespace, placement: Placement, keys: tuple[str, ...], listening: socket.socket) -> None:
    """Serves until it is told to stop."""
    import uvicorn

    from serve.api.app import Settings, Shared, make_app, watch
    from serve.feedback import Feedback

    feedback = None if args.feedback is None else Feedback(args.feedback)
    settings = Settings(keys, tuple(args.cors), args.max_body, args.timeout)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    shared = Shared(settings, feedback=feedback)
    failed: list[BaseException] = []

    async def start(shared: Shared) -> None:
        loop = asyncio.get_running_loop()
        try:
            loaded = [
                one for path in args.model for one in await asyncio.to_thread(load, args, path, placement, shared, loop)
            ]
            shared.services = {service.name: service for service in loaded}
            shared.state = "ready"
            watch(shared.metrics, loaded)
            made = [one for service in loaded for one in service.engine.device.programs.prepare()]
            print(f"serving {' and '.join(shared.services)}", file=sys.stderr, flush=True)
            await asyncio.wait([asyncio.wrap_future(one) for one in made])
            # What is there now stays, and most of it is jax's: every full collection would look at all of it, and
            # all streams would wait for an eighth of a second.
            gc.collect()
            gc.freeze()
        except Exception as error:  # it is told by the main thread, as every verb's errors are
            failed.append(error)
            server.should_exit = True

    app = make_app(shared, start)
    # Clients that wait longer than this when the server ends are cut off.
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.timeout) or 1,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if shared.state == "ready":
                shared.state = "draining"
                print("stopping: replies that have begun are finished; Ctrl-C again leaves at once", file=sys.stderr)
            # uvicorn would raise the signal again when it has ended, and this process would seem to have died of it.
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    server = Server(config)
    host, port = listening.getsockname()[:2]
    print(f"listening at http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    server.run(sockets=[listening])
    if failed:
        raise failed[0]


def load_engine(args: argparse.Namespace, path: Path, placement: Placement) -> tuple[Engine, Tokenizer]:
    """A model on its devices."""
    from model.adapters import read_adapter
    from model.load import open_decoder
    from serve.engine import Engine
    from serve.kept import Kept
    from sharding.mesh import make_mesh

    model, tokenizer = open_decoder(path, placement.mesh)
    adapters = [read_adapter(file, model.config) for _, file in adapters_of(args)]
    engine = Engine(
        model,
        tokenizer,
        mesh=make_mesh(placement.mesh) if placement.mesh.num_devices > 1 else None,
        slots=args.slots,
        context=args.context,
        pages=args.pages,
        snapshot_memory=None if args.snapshots is None else args.snapshots << 20,
        deterministic=args.deterministic,
        weight_type=args.weights,
        kv_type=args.kv,
        guesses=args.guesses,
        adapters=adapters,
        led=True,
        kept=Kept.beside_jax(),
    )
    return engine, tokenizer


def load(
    args: argparse.Namespace, path: Path, placement: Placement, shared: Shared, loop: asyncio.AbstractEventLoop
) -> list[Service]:
    """The service of a model, its first programs compiled; then those with its adapters."""
    from serve.api.runner import Runner
    from serve.api.service import Defaults, Service

    began = time.monotonic()

    def tell(words: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {words}", file=sys.stderr, flush=True)

    tell(f"reading {path}{placement.hint}")
    engine, tokenizer = load_engine(args, path, placement)
    slots = engine.limits.slots
    tell(f"{slots} slots, {engine.pages:,} pages of {engine.page} positions, {engine.context:,} for each request")
    first = engine.device.programs.prepare(engine.device.programs.shapes[:2])
    for number, made in enumerate(first, 1):
        made.result()
        tell(f"compiled {number} of the {len(first)} programs that are needed first")
    runner = Runner(engine, loop, args.queue)
    name = dict(zip(args.model, names_of(args), strict=True))[path]
    base = Service(name, engine, tokenizer, runner, shared.metrics, Defaults.of(generation_config(path)))
    return [base, *(replace(base, name=own, adapter=i) for i, (own, _) in enumerate(adapters_of(args), 1))]


def generation_config(path: Path) -> dict[str, Any]:
    """What generation_config.json says beside a model, if it has one. UserError where it is no JSON object."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object")
    return found
