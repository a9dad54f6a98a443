"""Tensors that lie on disk in fewer bits: FP8 with a scale per block, and MXFP4. They are read as float32.

FP8: `NAME` beside `NAME_scale_inv`, one float32 factor for each 128 x 128 block (DeepSeek-V3, Qwen FP8).
MXFP4: `NAME_blocks` and `NAME_scales`, 32 numbers of four bits with one power of two (OCP Microscaling 1.0; gpt-oss).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from errors import UserError
from model.hf.safetensors import Directory

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The numbers of four bits: one sign, two of exponent, one of mantissa."""

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"


class Tensors:
    """The tensors of a checkpoint under their plain names, dequantised as they are read."""

    def __init__(self, directory: Directory, block: tuple[int, int] = (128, 128)):
        self.directory, self.block = directory, block
        entries = directory.entries
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, entry in entries.items():
            if name.endswith(SCALE) and name.removesuffix(SCALE) in entries:
                continue
            if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in entries:
                continue
            if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in entries:
                *outer, groups, half = entry.shape
                # transformers exchanges the last two dimensions after it has unpacked them.
                self.shapes[name.removesuffix(BLOCKS)] = (*outer[:-1], groups * half * 2, outer[-1])
            else:
                self.shapes[name] = entry.shape

    def read(self, name: str) -> np.ndarray:
        """A tensor by its plain name."""
        entries = self.directory.entries
        if name + BLOCKS in entries:
            return mxfp4(self.directory.view(name + BLOCKS), self.directory.view(name + SCALES))
        array = self.directory.view(name)
        if name + SCALE in entries:
            return fp8(name, array, self.directory.view(name + SCALE), self.block)
        return array


def fp8(name: str, array: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """`array` times the factor of its block, float32. Works on the last two dimensions."""
    rows, columns = array.shape[-2:]
    if scales.shape[-2:] != (-(-rows // block[0]), -(-columns // block[1])):
        raise UserError(f"{name}{SCALE} has the shape {scales.shape}, which does not go with {array.shape}")
    factors = np.repeat(np.repeat(scales.astype(np.float32), block[0], axis=-2), block[1], axis=-1)
    return array.astype(np.float32) * factors[..., :rows, :columns]


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`[..., out, groups, 16]` bytes and `[..., out, groups]` exponents to `[..., in, out]` float32."""
    numbers = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], axis=-1)
    numbers = numbers.reshape(*blocks.shape[:-1], -1)
    numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
    return numbers.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)


def fp8_block(settings: Mapping[str, object]) -> tuple[int, int]:
    """The block size that config.json names."""
    quantisation = settings.get("quantization_config")
    size = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else (128, 128)
