"""Reads `torch.save` files of others without executing anything in them.

torch's restricted reader accepts tensors and plain containers. Every other class that a file names becomes an
`InertObject`, unless torch refuses it outright.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v.errors import WeightsError


class InertObject:
    """Replaces a class that a pickle names and that is no tensor. Accepts any arguments and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load(path: Path) -> Any:
    """The content of a file, with its tensors on the CPU, mapped from the disk where the format allows it.

    Raises:
        WeightsError: the file has another format, is truncated, or would run code.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # torch's format since 1.6
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if zipped else []
        with torch.serialization.safe_globals([(type("InertObject", (InertObject,), {}), name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a broken file may fail in any way
        blocked = next((line for line in str(error).splitlines() if "GLOBAL" in line), None)
        reason = f"the file wants code to run: {blocked}" if blocked else str(error).split("\n", 1)[0]
        raise WeightsError(f"{path} cannot be read as a checkpoint: {reason}") from error


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. If it has a dictionary under "state_dict", only that is read.

    Raises:
        WeightsError: there are none, or the file cannot be read.
    """
    content = load(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds no tensors by name but a {type(content).__name__}.")
    found = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not found:
        raise WeightsError(f"{path} holds no tensors.")
    return found
