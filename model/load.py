"""A MODEL as every verb takes it: a run, a Hugging Face directory, a GGUF or a llama2.c file, behind one interface."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from errors import UserError
from model.checkpoint.checkpoints import Checkpoints
from model.config import ModelConfig
from model.hf.placing import Keep, Progress, Shardings
from model.hf.reading import Checkpoint
from model.lora import BASE, SCALE, VALUES, merge, widen
from model.lora_config import LoraConfig
from model.quantization import stored_form
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.tree import Skeleton, list_names, make_skeleton, unstack
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import DECODE, Table, array_sharding, in_shape
from sharding.runtime import default_dtype

T = TypeVar("T")


class Source(Protocol):
    """A MODEL that is open: its sizes are known and checked, its weights not read yet."""

    path: Path
    config: ModelConfig

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. UserError where there is none."""
        ...

    def weights(
        self, shardings: Shardings, dtype: Any, progress: Progress | None = None, keep: Keep | None = None
    ) -> dict[str, Any]:
        """All weights and selection biases in list form, laid out as asked, or what `keep` makes of each."""
        ...


class RunSource:
    """A run directory, at its newest good checkpoint."""

    def __init__(self, path: Path):
        self.path = run_directory(path)
        self.config, self.lora = read_config(self.path), read_lora(self.path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep=1)
        step = self.checkpoints.latest_good(warn)
        if step is None:
            raise UserError(f"{path} has no complete checkpoint")
        self.step = step
        self._stacked, self._stored = self._stored_form()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer kept in the run."""
        return Tokenizer.load(self.path / "tokenizer")

    def weights(
        self, shardings: Shardings, dtype: Any, progress: Progress | None = None, keep: Keep | None = None
    ) -> dict[str, Any]:
        """As `Source.weights`; arrays that the run holds stacked are cut into layers on the device."""
        if self.lora.rank:
            plain = make_skeleton(self.config, stacked=False)
            groups = iter([merge(widen(self._read(shardings), plain.shapes), plain.sums, self.lora)])
        else:
            groups = self._pieces(shardings, alone=keep is not None)
        found: dict[str, Any] = {}
        for arrays in groups:
            if progress is not None:
                progress(sum(array.nbytes for array in arrays.values()))
            for name in list(arrays):
                array = jnp.astype(arrays.pop(name), dtype)
                found[name] = array if keep is None else jax.block_until_ready(keep(name, array))
        return found

    def adapter(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Both factors of each adapter, by the path of its weight in list form."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        arrays = self._read({"": here}, (".a", ".b"))
        found = {name.rpartition(".")[0] for name in arrays}
        return {name: (arrays[f"{name}.a"], arrays[f"{name}.b"]) for name in found}

    def _read(self, shardings: Shardings, ends: tuple[str, ...] = ("",)) -> dict[str, jax.Array]:
        """The arrays whose names end so, in list form."""
        (arrays,) = self._pieces(shardings, ends)
        return arrays

    def _pieces(
        self, shardings: Shardings, ends: tuple[str, ...] = ("",), *, alone: bool = False
    ) -> Iterator[dict[str, jax.Array]]:
        """As `_read`; with `alone` one stored array is read after the other."""
        saved, skeleton = self.checkpoints.leaves(self.step), self._stored
        asked = {}
        for name, shape in skeleton.shapes.items():
            if not name.endswith(ends):
                continue
            kind = "params" if name in skeleton.weights else "extra"
            own = list_names(name, self.config) if self._stacked else [name]
            sharding = _layout_of(own[0], shardings, self.config)
            sharding = sharding if len(own) == 1 else _over_layers(sharding)
            path = f"{kind}.{name}"
            stored = saved[path].dtype if path in saved else jnp.float32
            asked[path] = jax.ShapeDtypeStruct(shape, stored, sharding=sharding)
        for piece in [{path: leaf} for path, leaf in asked.items()] if alone else [asked]:
            found = self.checkpoints.restore(self.step, piece, part=True)
            arrays = {name.partition(".")[2]: array for name, array in found.items()}
            yield unstack(arrays, self.config) if self._stacked else arrays

    def _stored_form(self) -> tuple[bool, Skeleton]:
        """Whether the checkpoint holds layers stacked, and the model as it holds it."""
        saved = self.checkpoints.leaves(self.step)
        for stacked in (False, True):
            form = self._form(stacked)
            if _fits(form, saved):
                return stacked, form
        raise UserError(f"checkpoint {self.step} of {self.path} is of another architecture than its config.json")

    def _form(self, stacked: bool) -> Skeleton:
        if not self.lora.rank:
            return make_skeleton(self.config, stacked=stacked)
        key = jax.random.key(0)
        return Skeleton(jax.eval_shape(lambda: Transformer(self.config, key, stacked=stacked, lora=self.lora)))


def _layout_of(name: str, shardings: Shardings, config: ModelConfig) -> jax.sharding.Sharding:
    """Where an array goes; the parts of an adapter go everywhere where the arrays of the model go."""
    stem = name.removesuffix(VALUES).removesuffix(SCALE)
    plain = stem.removesuffix(BASE)
    if plain in shardings:
        whole = shardings[plain]
        if stem == name or not isinstance(whole, jax.sharding.NamedSharding):
            return whole
        skeleton = make_skeleton(config, stacked=False)
        shape = skeleton.shapes[plain]
        cut = (*whole.spec, *(None for _ in shape))[: len(shape)]
        form = stored_form(shape, cut, skeleton.sums[plain])
        return whole.update(spec=in_shape(P(*form.axes), form.values if name.endswith(VALUES) else form.scale))
    some = next(iter(shardings.values()))
    if isinstance(some, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(some.mesh, jax.sharding.PartitionSpec())
    return some


def _fits(form: Skeleton, saved: Mapping[str, Any]) -> bool:
    found = (saved.get(f"params.{name}") for name in form.weights)
    wanted = (form.shapes[name] for name in form.weights)
    return all(leaf is not None and leaf.shape == shape for leaf, shape in zip(found, wanted, strict=True))


def _over_layers(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The layout of an array of several layers, each of which is laid out as asked."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec))
    return sharding


def open_model(path: str | Path) -> Source:
    """The MODEL at `path`; what kind it is, is told from what is there.

    Raises:
        UserError: it is none, or is damaged; the sentence names what and where.
    """
    path = Path(path)
    if path.is_dir() and (path / "checkpoints").is_dir():
        return RunSource(path)
    if path.is_dir() and (path / "config.json").is_file():
        return Checkpoint(path)
    if path.is_dir() or not path.exists():
        what = "holds neither a run nor a config.json" if path.is_dir() else "does not exist"
        raise UserError(
            f"{path} {what}; name a run made by `qmax train`, a Hugging Face model directory, a .gguf file or a "
            "llama2.c .bin file"
        )
    if path.suffix == ".gguf":
        from model.gguf_file import GGUFSource

        return GGUFSource(path)
    if path.suffix == ".bin":
        from model.llama2c import Llama2cSource

        return Llama2cSource(path)
    raise UserError(f"{path} is a file of an unknown kind; .gguf and llama2.c's .bin are read, or a directory")


def run_directory(path: str | Path) -> Path:
    """`path` if it is a run directory. Raises UserError otherwise."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; name a run made by `qmax train`")
    if not (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is not a run: it has no config.json with checkpoints/ beside it")
    return path


def read_config(run: Path) -> ModelConfig:
    """The model of a run, from its `config.json`. Raises UserError where that is damaged."""
    return _read(run, lambda values: ModelConfig.from_dict(values["model"], str(run / "config.json")))


def read_lora(run: Path) -> LoraConfig:
    """The adapters of a run, from its `config.json`. Raises UserError where that is damaged."""

    def parse(values: dict[str, Any]) -> LoraConfig:
        given: dict[str, Any] = values.get("lora", {})
        fields: dict[str, Any] = {name: tuple(value) if name == "targets" else value for name, value in given.items()}
        return LoraConfig(**fields)

    return _read(run, parse)


def read_origin(run: Path) -> tuple[str, str]:
    """The model that a run started from ("" for none) and how. UserError where its `config.json` is damaged."""
    return _read(run, lambda values: (str(values.get("init_from", "")), str(values.get("init_how", "same"))))


def _read(run: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        return parse(json.loads((run / "config.json").read_text())["run"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as exc:
        raise UserError(
            f"{run / 'config.json'} is damaged ({exc}); `qmax train` writes it, and --resume again"
        ) from exc


def warn(sentence: str) -> None:
    """One line on stderr."""
    print(sentence, file=sys.stderr, flush=True)


def layout(skeleton: Skeleton, mesh: jax.sharding.Mesh, table: Table = DECODE) -> dict[str, jax.sharding.Sharding]:
    """Where each array of a model goes on a mesh."""
    axes = skeleton.axes
    return {name: array_sharding(axes[name], len(shape), mesh, table) for name, shape in skeleton.shapes.items()}


def read_model(
    source: Source, mesh: jax.sharding.Mesh, *, dtype: Any = None, progress: Progress | None = None
) -> Transformer:
    """The model of an open source, one array per layer, laid out for decoding; `dtype`: what it computes in."""
    dtype = jnp.dtype(default_dtype(mesh.devices.flat[0]) if dtype is None else dtype)
    skeleton = make_skeleton(source.config, stacked=False, dtype=dtype)
    found = source.weights(layout(skeleton, mesh), dtype, progress)
    weights = {name: array for name, array in found.items() if name in skeleton.weights}
    # Selection biases decide between close scores: they stay as exact as they are.
    extra = {name: jnp.astype(array, jnp.float32) for name, array in found.items() if name not in skeleton.weights}
    return skeleton.merge(weights, extra)


def check_language_model(source: Source) -> None:
    """Refuses a model that gives no next tokens."""
    if source.config.num_labels:
        raise UserError(
            f"{source.path} is a model for sequence classification (num_labels={source.config.num_labels}): it scores "
            "a text and writes none; name a language model"
        )


@dataclass(frozen=True)
class Unread:
    """A MODEL whose weights are still to be read: what only needs its sizes can be done meanwhile.

    dtype: what it will compute in.
    """

    source: Source
    mesh: jax.sharding.Mesh
    dtype: jnp.dtype

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""
        return self.source.config

    def read(self) -> Transformer:
        """The model, one array per layer, laid out for decoding."""
        return read_model(self.source, self.mesh, dtype=self.dtype)


def open_decoder(path: str | Path, mesh: MeshConfig | None = None) -> tuple[Unread, Tokenizer]:
    """The language model at `path`, still to be read, and its tokenizer.

    Args:
        path: any MODEL, see `open_model`.
        mesh: devices to lay it over; one by default.

    Raises:
        UserError: no model, no tokenizer, or a damaged file; the sentence names it.
    """
    source = open_model(path)
    check_language_model(source)
    tokenizer = source.tokenizer()
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model {source.config.vocab_size}"
        )
    devices = make_mesh(mesh or MeshConfig())
    return Unread(source, devices, jnp.dtype(default_dtype(devices.devices.flat[0]))), tokenizer


def load_model(path: str | Path, mesh: MeshConfig | None = None) -> tuple[Transformer, Tokenizer]:
    """The model of `open_decoder`, read, and its tokenizer."""
    model, tokenizer = open_decoder(path, mesh)
    return model.read(), tokenizer
