"""Law: the tour is kept without outputs, defines nothing, and runs from top to bottom, without a hub too."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import qmax

TOUR = ROOT / "notebooks" / "tour.ipynb"
LONGEST_CELL = 25
QWEN = "models--Qwen--Qwen3-0.6B"
"""Its folder in the cache of Hugging Face's hub."""
FACTS = """
import json

print(json.dumps({"out": str(OUT), "losses": losses, "held_out": [r["validation_loss"] for r in held_out],
    "chat_losses": chat_losses, "served": [m.id for m in client.models.list()], "replies": replies, "rates": rates}))
"""


def read() -> Any:
    return nbformat.read(TOUR, as_version=4)


def code_cells() -> dict[str, str]:
    """Source by id."""
    return {cell.id: cell.source for cell in read().cells if cell.cell_type == "code"}


CELLS = code_cells()


def test_it_is_a_notebook_without_outputs() -> None:
    raw = json.loads(TOUR.read_text(encoding="utf-8"))
    nbformat.validate(raw)
    assert (raw["nbformat"], raw["metadata"]["kernelspec"]["name"]) == (4, "python3")
    for cell in raw["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
        assert not cell["metadata"], f"{cell['id']} carries what an editor has left"


def test_ruff_reads_it_and_finds_nothing() -> None:
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, TOUR], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "No Python files" not in done.stderr


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_short_define_nothing_and_import_what_there_is(name: str) -> None:
    tree = ast.parse(CELLS[name])
    assert len(CELLS[name].splitlines()) <= LONGEST_CELL
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)), "belongs into the library"
        if isinstance(node, ast.Import):
            for alias in node.names:
                importable(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importable(node.module or "")
            for alias in node.names:
                assert module is None or hasattr(module, alias.name) or importable(f"{node.module}.{alias.name}")


def importable(name: str) -> Any:
    """The module; None where it is matplotlib's and that is not here."""
    if name.partition(".")[0] == "matplotlib":
        return importlib.import_module(name) if importlib.util.find_spec("matplotlib") else None
    return importlib.import_module(name)


def test_prose_stands_before_every_part() -> None:
    cells = read().cells
    assert [cell.cell_type for cell in cells[:2]] == ["markdown", "markdown"]
    parts = [cell.source.splitlines()[0] for cell in cells if cell.source.startswith("## ")]
    assert [re.sub(r"\D", "", part) for part in parts] == ["", "1", "2", "3", "4", "5", ""]


def test_the_badge_opens_this_notebook_of_the_repository_that_it_clones() -> None:
    (link,) = re.findall(r"\]\((https://colab\.research\.google\.com/github/[^)]*)\)", (ROOT / "README.md").read_text())
    found = re.fullmatch(r"https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/(.+)", link)
    assert found is not None
    owner, path = found.groups()
    assert ROOT / path == TOUR
    assert f'"https://github.com/{owner}"' in CELLS["install"]


# ---- installing -----------------------------------------------------------------------
def install(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the first cell where nothing but qmax is missing."""
    hide = "import importlib.util as util\nutil.find_spec = lambda name: None if name == 'qmax' else name\n"
    words = [sys.executable, "-c", f"{hide}{CELLS['install']}\nprint(sys.path[0])"]
    kept = {name: value for name, value in os.environ.items() if name != "COLAB_RELEASE_TAG"}
    return subprocess.run(words, cwd=folder, env={**kept, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_colab_clones_the_repository_that_the_environment_names_and_lets_it_install_itself(tmp_path: Path) -> None:
    fork, content = tmp_path / "fork", tmp_path / "content"
    content.mkdir()
    subprocess.run(["git", "init", "--quiet", str(fork)], check=True)
    script = fork / "run.sh"
    script.write_text('#!/bin/sh\necho "$QMAX_PYTHON" "$@" >>"$(dirname "$0")/called"\n')
    script.chmod(0o755)
    git = ["git", "-C", str(fork), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "run.sh"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "A fork"], check=True)
    for _ in range(2):  # a restarted runtime has the clone already
        done = install(content, COLAB_RELEASE_TAG="release", QMAX_REPOSITORY=fork.as_uri())
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(content / "qmax")]
    assert (content / "qmax" / "called").read_text() == f"{sys.executable} --version\n" * 2


def test_elsewhere_it_says_how_to_install(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"RuntimeError: qmax is not installed here: .* `pip install .*`", done.stderr.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


# ---- running --------------------------------------------------------------------------
def execute(notebook: Any, folder: Path, hub: Path) -> None:
    """Runs all cells in a process of its own, on the CPU and without a network; their outputs are in `notebook`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "HF_HUB_CACHE")}
    environment |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder), "TMPDIR": str(folder)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hub)}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)


def text_of(cell: Any) -> str:
    """What a cell has printed; warnings and progress go elsewhere."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def toured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The executed cells by id, and under `facts` what the notebook knows in the end."""
    pytest.importorskip("matplotlib")
    notebook, folder = read(), tmp_path_factory.mktemp("tour")
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS, id="facts"))
    execute(notebook, folder, folder / "hub")
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    return {**cells, "facts": json.loads(text_of(cells["facts"]))}


def test_it_runs_from_top_to_bottom(toured: dict[str, Any]) -> None:
    facts = toured.pop("facts")
    for name, cell in toured.items():
        assert not [output for output in cell.outputs if output.output_type == "error"], name
        if "plt.show()" in cell.source:
            assert [output.output_type for output in cell.outputs] == ["display_data"], name
    toured["facts"] = facts
    losses, chat_losses = facts["losses"], facts["chat_losses"]
    assert 5 < losses[0] < 7 and losses[-1] < losses[0] - 2 and facts["held_out"][-1] < facts["held_out"][0]
    assert min(chat_losses[-5:]) < 1 < chat_losses[0] / 2
    assert facts["served"] == ["story", "chat"] == list(facts["replies"])
    assert facts["replies"]["chat"].startswith("Hello! How can I help you") and facts["replies"]["story"]
    assert text_of(toured["stream"]) and list(facts["rates"]) == ["8", "1", "2", "4"]


def test_without_a_hub_the_open_model_is_skipped_in_one_sentence(toured: dict[str, Any]) -> None:
    (sentence,) = text_of(toured["qwen"]).splitlines()
    assert sentence.startswith("Qwen/Qwen3-0.6B is skipped") and sentence.endswith(".")
    assert not toured["qwen-chat"].outputs and not toured["qwen-again"].outputs


def test_with_the_open_model_at_hand_one_talks_to_it(toured: dict[str, Any], tmp_path: Path) -> None:
    """In its place stands the tour's own model, as a directory of Hugging Face's kind, where the hub's cache has it."""
    folder = tmp_path / "hub" / QWEN
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    story = Path(toured["facts"]["out"]) / "story"
    assert qmax.main(["convert", str(story), str(folder / "snapshots" / ("0" * 40))]) == 0
    notebook = read()
    chosen = ("install", "eight", "mesh", "qwen", "qwen-chat", "qwen-again")
    notebook.cells = [cell for cell in notebook.cells if cell.id in chosen]
    execute(notebook, tmp_path, tmp_path)
    said = {cell.id: text_of(cell) for cell in notebook.cells}
    assert not said["qwen"] and said["qwen-chat"].strip() and said["qwen-again"].strip()
