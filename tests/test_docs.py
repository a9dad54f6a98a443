"""Law: what the pages say can be done can be done: links lead somewhere, commands are understood, examples run.

Every command of ours in a fenced block has to be understood: its verb, its options, the fields of its config, and that
they go together. Those of a block under `<!-- run -->` are executed too, in order, in a folder that has what pages take
for granted (`Place`); trainings take a few steps there (`CUT`). Blocks of Python are executed, unless `<!-- from FILE
-->` says that they are quoted: then they have to stand in that file.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard
from conftest import ROOT

import qmax
from configs.override import fields_of
from configs.run import Run
from tests import pages
from tests.pages import PAGES, Command
from tests.test_layout import sources
from tests.words import options_of, understand, understand_benchmark
from train.tasks import catalogue

COMMANDS = pages.commands()
DEMO = ROOT / "configs" / "demo_data"
STEPS = shlex.split(
    "--steps 2 --model.hidden-size 32 --model.num-layers 1 --model.num-heads 4 --model.num-kv-heads 2 "
    "--model.head-dim 8 --model.moe.num-experts 4 --model.moe.intermediate-size 16 --data.sequence-length 128 "
    "--data.batch-size 8 --data.validation-fraction 0 --validate-every 0 --validation-batches 1 --sample-tokens 4 "
    "--rl.prompts 4 --rl.samples 2 --rl.validation-problems 2 --optimizer.warmup-steps 1 "
    "--optimizer.schedule constant --optimizer.learning-rate 1e-3"  # so that most compile to one program
)
CUT = {
    "train": STEPS,
    "tokenizer": ["--vocab-size", "400"],
    "generate": ["--max-tokens", "4"],
}
"""What commands are cut down to; the last of two values wins."""


# ---- the folder that pages take for granted ---------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """configs/, my_config.py (that of README.md), texts and rows under the names that pages use."""
    place = tmp_path_factory.mktemp("docs")
    (place / "configs").symlink_to(ROOT / "configs")
    (place / "my_config.py").write_text(next(b.text for b in pages.blocks(Path("README.md")) if b.kind == "python"))
    shutil.copytree(DEMO / "tiny_tokenizer", place / "my_tokenizer")
    stories = demo_rows("pretrain_en_tinystories", 60)
    (place / "corpus").mkdir()
    (place / "corpus" / "a.jsonl.zst").write_bytes(zstandard.compress(lines(stories)))
    pairs = demo_rows("preferences_en", 40)
    chats = demo_rows("sft_instructions_en", 40)
    judged = [{"messages": row["messages"], "label": bool(index % 2)} for index, row in enumerate(chats)]
    rows = {
        "chats": chats,
        "pairs": pairs,
        "judged": judged,
        "rows": [{"text": row["text"][:200]} for row in stories[:3]],
    }
    for name, found in rows.items():
        (place / f"{name}.jsonl").write_bytes(lines(found))
    return place


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """The same folder with the runs and models that pages take for granted."""
    with contextlib.chdir(place):
        call("train", "configs/tiny.py", "--out", "runs/base", *STEPS)
        call("convert", "runs/base", "models/Qwen3-0.6B", "--dtype", "float32")
        Path("runs/demo").mkdir()
        Path("runs/demo/sft").symlink_to(place / "runs/base")
    return place


def demo_rows(name: str, count: int) -> list[dict[str, Any]]:
    with gzip.open(DEMO / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def call(*words: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = qmax.main(list(words))
    assert code == 0, f"qmax {' '.join(words)}\n{said.getvalue()}"


# ---- links ------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page.parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in pages.anchors(target.relative_to(ROOT)), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_are_named_exist(page: Path) -> None:
    """`step.py` beside the page or in a folder of it, or `train/step.py` from the root."""
    own = {"my_config.py"}
    for code in pages.inline(page):
        if re.fullmatch(r"[\w/.-]+\.(py|md|sh|yaml|jinja)", code) and code not in own:
            here = [ROOT / code, *(ROOT / page.parent).rglob(code)]
            assert any(path.exists() for path in here), f"{page} names {code}"


# ---- commands ---------------------------------------------------------------------------
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_understood(command: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = list(command.words)
    monkeypatch.chdir(place)
    if words[:1] == ["-m"]:
        understand_benchmark(words[1], words[2:], monkeypatch)
    elif words[:1] == ["test"]:
        script = (ROOT / "run.sh").read_text()
        assert all(f"{word})" in script for word in words[1:] if word.startswith("--"))
    elif words:
        understand(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_options_in_sentences_exist(page: Path) -> None:
    """In code within a sentence or a table, where commands are seldom whole: of its verb, or of any."""
    verbs = [verb.name for verb in qmax.VERBS]
    script = re.findall(r"(--\w+)\)", (ROOT / "run.sh").read_text())
    benchmarks = [found for path in sources("bench") for found in re.findall(r'"(--[\w-]+)"', pages.read(path))]
    everything = frozenset().union(*map(options_of, verbs), script, benchmarks)
    for code in pages.inline(page):
        words = re.sub(r"[\[\]|]", " ", code).split()
        asked = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
        if words[:1] in (["qmax"], ["./run.sh"]) and len(words) > 1 and words[1] not in ("VERB", "--help", "test"):
            assert words[1] in verbs, f"{page}: {code}"
            unknown = asked - options_of(words[1])
        elif words and words[0].startswith("--"):
            unknown = {option for option in asked - everything if not re.fullmatch(r"--\w+\.", option)}
        else:
            continue
        assert not unknown, f"{page}: {code}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_fields_in_sentences_exist(page: Path) -> None:
    """`data.max_bad_rows` and the like, also with a value."""
    known = {name for name, _ in fields_of(Run)}
    sections = {field.name for field in fields(Run) if is_dataclass(getattr(Run(), field.name))}
    endings = ("py", "jsonl", "jinja", "txt", "md", "npz")
    for code in pages.inline(page):
        found = re.match(r"([a-z_]+)((?:\.[a-z_0-9]+)+)(?:[=\s]|$)", code)
        if found and found[1] in sections and not code.endswith(endings):
            name = found[1] + found[2]
            assert name in known or any(other.startswith(f"{name}.") for other in known), f"{page}: {code}"


# ---- what runs --------------------------------------------------------------------------
def marked() -> list[Path]:
    return list(dict.fromkeys(command.page for command in COMMANDS if command.marked))


@pytest.mark.parametrize("page", marked(), ids=str)
def test_marked_commands_run(page: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    for command in COMMANDS:
        if command.page == page and command.marked:
            words = list(command.words)
            if "--help" not in words:
                words += [*CUT.get(words[0], []), *(["--steps", "3"] if "--resume" in words else [])]
            call(*words)


def in_python(page: Path) -> list[pages.Block]:
    return [block for block in pages.blocks(page) if block.kind == "python" or block.mark.startswith(pages.FROM)]


@pytest.mark.parametrize("page", [page for page in PAGES if in_python(page)], ids=str)
def test_python_runs(page: Path, runs: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, as in one session; quoted ones stand where they are from."""
    monkeypatch.chdir(runs)
    monkeypatch.setattr(catalogue, "TASKS", dict(catalogue.TASKS))  # a page adds one, which is not for other tests
    names = vars(sys.modules.setdefault("page", types.ModuleType("page")))
    names.clear()
    names["__name__"] = "page"  # dataclasses look up the module that they are made in
    said = io.StringIO()
    for block in in_python(page):
        if block.mark.startswith(pages.FROM):
            source = pages.read(Path(block.mark.removeprefix(pages.FROM)))
            assert block.text in source, f"{page}:{block.line} is no longer in {block.mark.removeprefix(pages.FROM)}"
            continue
        code = block.text.replace("http://127.0.0.1:8000", address)
        with contextlib.redirect_stdout(said):
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)
            if callable(make := names.pop("run", None)):  # the block is a config
                assert isinstance(make(), Run)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server with a small random model under the name that pages use; it is started when it is first needed."""
    from serve.api.app import Settings
    from serve.api.service import Defaults
    from tests.serving import Served, serving

    with serving(Served(Settings(keys=("secret",))), models={"sft": Defaults(temperature=0.0)}) as served:
        yield served.address


# ---- tables that must keep up ------------------------------------------------------------
def test_the_table_of_compiled_functions_is_whole() -> None:
    """Every file in which something is compiled stands in model/README.md."""
    section = pages.read(Path("model/README.md")).partition("## Compiled functions")[2].partition("\n## ")[0]
    for path in sources("model", "serve", "sharding", "train"):
        if re.search(r"\bjax\.jit\(", pages.read(path)):
            assert f"`{path}`" in section, f"the table lacks {path}"


def test_the_readme_names_every_verb() -> None:
    table = pages.read(Path("README.md")).partition("## Verbs")[2].partition("\n## ")[0]
    assert all(f"| `qmax {verb.name}" in table for verb in qmax.VERBS)


def test_every_room_has_a_page_that_the_readme_links() -> None:
    linked = set(pages.links(Path("README.md")))
    rooms = {f"{path.parent.as_posix()}/README.md" for path in pages.files() if path.suffix == ".py"}
    there = {page.as_posix() for page in PAGES} - {"README.md"}
    assert {page for page in rooms & there if not page.startswith("tests/")} <= linked
    assert len(pages.read(Path("README.md")).splitlines()) < 300
