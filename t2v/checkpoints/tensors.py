"""Reads and writes safetensors files; knows the differences between versions of parameter names."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2v.errors import WeightsError

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# The autoencoder's attention, as diffusers named it before version 0.18.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file; on the CPU they are mapped from the disk.

    Raises:
        WeightsError: the file cannot be read.
    """
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download it again.") from error


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensor: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file one tensor at a time, so that memory holds only one. Equal tensors make equal files.

    Args:
        shapes: shape of each tensor by its name.
        tensor: called with each name in turn; returns a tensor of that shape, in `dtype`, on the CPU.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + torch.Size(shapes[name]).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            file.write(tensor(name).contiguous().flatten().view(torch.uint8).numpy().data)


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values are finite, also when they are converted to `dtype`; one pass without a copy."""
    maximum = torch.finfo(dtype or tensor.dtype).max
    low, high = tensor.aminmax()  # both are NaN if one value is
    return bool((low >= -maximum) & (high <= maximum))


def canonical_name(key: str) -> str:
    """A parameter's name without the differences between versions of transformers and diffusers."""
    key = key.removeprefix("text_model.")
    for old, new in OLD_NAMES.items():
        key = key.replace(old, new)
    return key
