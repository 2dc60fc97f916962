import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2v.checkpoints import tensors
from t2v.checkpoints.tensors import is_finite, read_tensors
from t2v.errors import WeightsError


def test_header_of_what_is_written(tmp_path: Path):
    state = {"b": torch.randn(3, 5), "a": torch.arange(4.0), "empty": torch.zeros(0), "scalar": torch.tensor(2.0)}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        tensors.write_tensors(path, shapes, dtype, lambda name, dtype=dtype: state[name].to(dtype))  # type: ignore[misc]
        loaded = load_file(path)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name].to(dtype)) for name in state)
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_infinities_and_overflows_are_not_finite(tmp_path: Path):
    assert is_finite(torch.tensor([1e5, -1e5])) and not is_finite(torch.tensor([1e5, 0.0]), torch.float16)
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not is_finite(torch.tensor([0.0, value]))


def test_a_file_that_is_no_safetensors_file(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_tensors(tmp_path / "a.safetensors")
