"""Law: the house stands as its READMEs draw it; imports run one way, files stay short, and every field is read."""

from __future__ import annotations

import ast
import dataclasses
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {"errors", "terminal"}
FLOORS = ("sharding", "model", "serve", "train")
"""Each may import those before it."""
CONFIG_IMPORTS = {"configs", "errors", "model.config", "model.lora_config", "model.sizes", "sharding.mesh"}
WITHOUT_JAX = ("serve/scheduler.py", "serve/pages.py", "model/config.py", "configs/run.py", "configs/override.py")
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "sentencepiece", "tokenizers", "tensorboardX", "pyarrow"}
FILE_LINES, FUNCTION_LINES = 450, 80
KERNEL_FILE_LINES, KERNEL_FUNCTION_LINES = 600, 150
FILE_BYTES, REPOSITORY_BYTES = 4 * 2**20, 20 * 2**20
FOUND_BY_UVICORN = {"httptools", "uvloop"}
"""Faster parts that uvicorn takes where they are installed."""
IMPORT_NAMES = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "tensorboardx": "tensorboardX",
    "lm-eval": "lm_eval",
    "ml-dtypes": "ml_dtypes",
    "prometheus-client": "prometheus_client",
}
TREE_LEAVES = ("tests", "bench", "notebooks", "configs/demo_data", "serve/ui", ".ci")
"""Folders that the trees name as a whole."""
ROOMS = ("configs", "model", "sharding", "serve", "train")
"""Folders whose own README.md draws what is in them."""


@cache
def files() -> tuple[Path, ...]:
    """Files of the repository relative to its root: those that git knows or would add."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split("\0")
        return tuple(sorted(Path(name) for name in names if name and (ROOT / name).is_file()))
    hidden = re.compile(r"(^|/)(\.venv.*|__pycache__|\.[a-z]+_cache|runs|build|dist|.*\.egg-info)(/|$)")
    names = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return tuple(sorted(name for name in names if not hidden.search(name.as_posix())))


def sources(*folders: str) -> list[Path]:
    """Python files, in `folders` or everywhere."""
    return [path for path in files() if path.suffix == ".py" and (not folders or path.parts[0] in folders)]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imports_of(path: Path, *, deferred: bool = True) -> Iterator[str]:
    """Dotted names that a file imports; without `deferred`, only those that importing the file imports."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.parent.parts[: len(path.parent.parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if deferred or not (inside or typing_only):
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    return walk(tree_of(path))


def allowed(path: Path) -> set[str]:
    """Packages of ours that a file may import."""
    top = path.parts[0]
    if top in FLOORS:
        below = set(FLOORS[: FLOORS.index(top) + 1]) | GROUND
        return below | {"configs"} if top == "train" else below
    if top == "configs":
        return CONFIG_IMPORTS
    if top in ("errors.py", "terminal.py"):
        return GROUND
    return {*FLOORS, *GROUND, "configs", "qmax", "bench", "tests"}


OURS = {*FLOORS, *GROUND, "configs", "qmax", "tests", "bench"}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_run_one_way(path: Path) -> None:
    for name in imports_of(path):
        if name.partition(".")[0] in OURS:
            heads = {".".join(name.split(".")[: i + 1]) for i in range(name.count(".") + 1)}
            # `from model import config` names model first and model.config second; the second decides.
            permitted = heads & allowed(path) or any(entry.startswith(f"{name}.") for entry in allowed(path))
            assert permitted, f"{path} imports {name}"


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_light_modules_stay_light(name: str) -> None:
    seen: set[Path] = set()
    waiting = [Path(name)] if (ROOT / name).exists() else []
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imports_of(path, deferred=False):
            assert module.partition(".")[0] not in HEAVY, f"{name} reaches {module} through {path}"
            file = Path(*module.split(".")).with_suffix(".py")
            waiting += [file] if (ROOT / file).exists() else []


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]]
    declared = {IMPORT_NAMES.get(name, name) for name in names}
    used = {
        name.partition(".")[0]: path
        for path in sources(*FLOORS, "configs", "qmax.py", "errors.py", "terminal.py")
        for name in imports_of(path)
    }
    foreign = {name: path for name, path in used.items() if name not in OURS | set(sys.stdlib_module_names)}
    extras = [line for extra in ("quantized", "harness") for line in project["optional-dependencies"][extra]]
    optional = {IMPORT_NAMES.get(name, name) for name in (re.split(r"[<>=\[ ]", line)[0] for line in extras)}
    undeclared = foreign.keys() - declared - optional
    assert not undeclared, {name: str(foreign[name]) for name in undeclared}
    unused = declared - foreign.keys() - FOUND_BY_UVICORN
    assert not unused, f"declared and never imported: {unused}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_budgets(path: Path) -> None:
    kernel = "kernels" in path.parts
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= (KERNEL_FILE_LINES if kernel else FILE_LINES), f"{path} has {lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = KERNEL_FUNCTION_LINES if kernel else FUNCTION_LINES
            assert length <= limit, f"{path}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", sources(*FLOORS, "configs", "qmax.py", "errors.py", "terminal.py"), ids=str)
def test_modules_say_what_they_are(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not text or path.name == "__init__.py" or ast.get_docstring(tree_of(path)), f"{path} has no docstring"
    assert not re.search(r"\b(TO" + r"DO|FIX" + r"ME)\b", text), f"{path} puts something off"


def config_classes() -> Iterator[type]:
    from configs.run import Run

    waiting: list[type] = [Run]
    while waiting:
        cls = waiting.pop()
        yield cls
        hints = typing.get_type_hints(cls)
        waiting += [
            hints[field.name] for field in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[field.name])
        ]


def names_read() -> set[str]:
    """Attributes that code outside configs/ reads; a check in __post_init__ is no use of a field."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        for child in ast.iter_child_nodes(node):
            walk(child)

    for path in sources(*FLOORS):
        walk(tree_of(path))
    return found


@pytest.mark.parametrize("cls", list(config_classes()), ids=lambda cls: cls.__name__)
def test_every_config_field_is_explained_and_read(cls: type) -> None:
    from configs.override import explanations

    notes, read = explanations(cls), names_read()
    names = [field.name for field in dataclasses.fields(typing.cast(typing.Any, cls))]
    assert [name for name in names if not notes.get(name)] == [], "fields without an explanation"
    assert [name for name in names if name not in read] == [], "fields that nothing reads"


def drawn() -> dict[str, str]:
    """Path -> words of the trees in README.md and in those of the rooms."""
    entries = tree_in(ROOT / "README.md")
    for room in ROOMS:
        entries |= {f"{room}/{path}": words for path, words in tree_in(ROOT / room / "README.md").items()}
    return entries


def tree_in(page: Path) -> dict[str, str]:
    """Path -> words of a page's tree: a code block under a heading with the word Tree, two spaces a level."""
    text = page.read_text(encoding="utf-8")
    match = re.search(r"^## [^\n]*tree[^\n]*\n.*?```[a-z]*\n(.*?)```", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    assert match, f"{page} has no tree"
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in match.group(1).splitlines():
        name, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        if not name or depth > len(folders):  # the explanation goes on
            continue
        folders = [*folders[:depth], name.rstrip("/")]
        entries["/".join(folders)] = words.strip()
    return entries


def test_readmes_draw_every_file() -> None:
    entries = drawn()
    missing = []
    for path in files():
        top, name = path.parts[0], path.as_posix()
        leaf = next((folder for folder in TREE_LEAVES if name.startswith(f"{folder}/")), None)
        wanted = {top} if leaf is None else {leaf}
        if leaf is None and path.name not in ("__init__.py", ".gitignore"):
            wanted.add(name)
        missing += sorted(wanted - entries.keys() - {".gitignore"})
    assert not missing, f"the trees lack {sorted(set(missing))}"
    stale = [name for name in entries if not (ROOT / name).exists()]
    assert not stale, f"the trees draw what is not there: {stale}"
    assert [name for name, words in entries.items() if len(words.split()) < 2] == [], "entries without a line"


def test_files_are_small() -> None:
    sizes = {path: (ROOT / path).stat().st_size for path in files()}
    assert not {str(path): size for path, size in sizes.items() if size > FILE_BYTES}
    assert sum(sizes.values()) < REPOSITORY_BYTES
