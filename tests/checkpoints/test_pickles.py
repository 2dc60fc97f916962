import resource
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from t2v.checkpoints import pickles
from t2v.errors import WeightsError


def test_tensors_are_read_when_they_are_needed(tmp_path: Path):
    """The file is mapped, not copied: a checkpoint larger than the memory allowed still gives its tensors."""
    path = tmp_path / "large.pth"
    torch.save({"large": torch.zeros(2**26)}, path)  # 256 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = pickles.tensors(path)["large"]
    assert tensor.shape == (2**26,)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_by_name_and_nothing_else(tmp_path: Path, zipped: bool):
    content = OrderedDict(a=torch.ones(2), b="text", c=3)
    for saved in (content, {"state_dict": content, "epoch": 1}):
        torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        assert pickles.tensors(tmp_path / "x.pth").keys() == {"a"}


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, torch.ones(1)])
def test_files_without_named_tensors(tmp_path: Path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="holds no tensors"):
        pickles.tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(99), b"\x80\x02.", b"<html>"])
def test_what_is_no_checkpoint(tmp_path: Path, data: bytes):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(WeightsError, match=r"x\.pth cannot be read"):
        pickles.load(tmp_path / "x.pth")
