"""`qmax convert SRC DST`: any MODEL to a Hugging Face directory, or a run's adapters to one of PEFT's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from terminal import Parser, human_bytes, progress_bar, write_json

if TYPE_CHECKING:
    from model.load import Source

DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "f32": "float32", "float32": "float32", "f16": "float16"}


def convert_main(argv: list[str]) -> int:
    """Runs the verb; returns its exit code."""
    args = make_parser().parse_args(argv)
    from sharding.runtime import configure_jax

    configure_jax()
    from model.load import open_model

    source = open_model(args.source)
    dtype = DTYPES[args.dtype] if args.dtype else ""
    if args.adapter:
        from model.adapter_export import convert_adapter

        written = convert_adapter(source, args.target, dtype)
    else:
        written = convert(source, args.target, dtype)
    size = human_bytes(written["bytes"])
    print(f"{args.target}: {written['architecture']}, {written['parameters']:,} parameters, {size}")
    if args.json:
        write_json(args.json, written)
    return 0


def make_parser() -> Parser:
    """What the verb takes."""
    parser = Parser(
        "convert",
        "Writes a model as a Hugging Face directory, which transformers, vLLM and llama.cpp's converter read.\n"
        "SRC is a run directory, a Hugging Face directory, a .gguf file or a llama2.c .bin file. Nothing is visible\n"
        "under DST until all of it is there; a card (README.md) says what it is and where it comes from. A run that\n"
        "trained adapters is written with them added to its weights, or with --adapter they alone, as PEFT reads them.",
        [
            "qmax convert runs/demo/sft models/demo",
            "qmax convert models/Qwen3-0.6B models/Qwen3-0.6B-f32 --dtype float32",
            "qmax convert runs/tuned adapters/tuned --adapter",
        ],
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="the model to convert")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights (default: what they are; bfloat16 for a run)"
    )
    parser.add_argument("--adapter", action="store_true", help="write the adapters of a run alone, for PEFT")
    parser.add_json()
    return parser


def convert(source: Source, target: Path, dtype: str = "") -> dict[str, Any]:
    """Writes `source` to `target`; `dtype` empty keeps types that are known. Returns what was written, for a table.

    Raises:
        UserError: as the reader and the writer do.
    """
    import jax

    from model.hf.families import family_of_config
    from model.hf.placing import TensorFiles
    from model.hf.reading import Checkpoint
    from model.hf.writing import common_type, tensor_bytes, write_checkpoint
    from model.load import layout
    from model.model_card import CARD, model_card
    from model.tree import make_skeleton
    from sharding.mesh import MeshConfig, make_mesh

    config = source.config
    family = family_of_config(config)
    skeleton = make_skeleton(config, stacked=False)
    kept: dict[str, Any] = {}
    experts = None
    if isinstance(source, Checkpoint):
        experts = source.experts()
        if not dtype:
            entries = source.tensors.directory.entries
            kept = {plain: entries[name].dtype for plain, name in source.names.items() if name in entries}
            kept = {name: kind for name, kind in kept.items() if kind.itemsize > 1}
    if isinstance(source, TensorFiles):
        weights: Mapping[str, Any] = source.streamed()
    else:
        weights = source.weights(layout(skeleton, make_mesh(MeshConfig(), jax.devices()[:1])), "float32")
    files, settings, tokens = beside(source)
    form: dict[str, Any] = {"dtype": dtype or "bfloat16", "kept": kept, "experts": experts}
    files[CARD] = model_card(source, target.absolute().name, tokens, common_type(config, skeleton.shapes, **form))
    total = sum(tensor_bytes(config, skeleton.shapes, **form).values())
    done = 0

    with progress_bar("convert", total, unit="bytes") as bar:

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar.advance(size)

        write_checkpoint(target, config, skeleton.shapes, weights, files, **form, settings=settings, progress=progress)
    return {
        "architecture": family.name_of(config),
        "parameters": config.parameters_total,
        "bytes": done,
    }


def beside(source: Source) -> tuple[dict[str, bytes], dict[str, Any], int]:
    """Files of the tokenizer and for generation, what the tokenizer adds to config.json, and how many tokens it has."""
    from model.hf.reading import Checkpoint
    from model.hf.writing import to_json
    from model.tokenizer_export import hugging_face_files

    try:
        tokenizer = source.tokenizer()
    except UserError as exc:
        print(f"qmax: {exc}; the weights are written without a tokenizer", file=sys.stderr)
        # Where a sequence ends a classifier knows by it.
        padding = source.settings.get("pad_token_id") if isinstance(source, Checkpoint) else None
        return {}, {} if padding is None else {"pad_token_id": padding}, 0
    files = hugging_face_files(tokenizer)
    ends = list(tokenizer.stop_ids)
    generation: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_id, "do_sample": True}
    own = source.path / "generation_config.json"
    files["generation_config.json"] = own.read_bytes() if own.is_file() else to_json(generation)
    added = {"eos_token_id": ends[0] if ends else None, "pad_token_id": tokenizer.pad_id}
    return files, added, tokenizer.vocab_size
