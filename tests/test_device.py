"""The device: which one, how much memory is free and was used, whether it is healthy."""

import gc
import weakref

import psutil
import pytest
import torch

from t2v import device
from t2v.errors import WeightsError

CPU = torch.device("cpu")


def test_free_is_no_more_than_the_machine_has():
    free = device.free_memory(CPU)
    assert free is not None and 0 < free <= psutil.virtual_memory().total


def test_a_containers_limit_counts_without_what_it_can_give_back(tmp_path, monkeypatch: pytest.MonkeyPatch):
    for name, text in (("max", "1000000000"), ("current", "900000000"), ("stat", "anon 7\ninactive_file 400000000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(device, "CGROUPS_ROOT", tmp_path)
    assert device.free_memory(CPU) == 500_000_000 - device.MALLOC_RESERVE
    (tmp_path / "memory.current").write_text("1300000000")
    assert device.free_memory(CPU) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert device.free_memory(CPU) > 10**9


def test_the_peak_is_that_since_the_mark():
    device.reset_peak(CPU)
    before = device.peak_memory(CPU)
    held = torch.ones(50_000_000)
    assert device.peak_memory(CPU) - before > 150e6
    del held
    device.trim()
    device.reset_peak(CPU)
    assert device.peak_memory(CPU) - before < 100e6


def test_frozen_objects_are_not_scanned_and_new_garbage_is():
    class Link:
        pass

    def cycle() -> weakref.ref:
        one, two = Link(), Link()
        one.other, two.other = two, one
        return weakref.ref(one)

    try:
        device.freeze_gc()
        assert gc.get_freeze_count() > 100_000 and len(gc.get_objects()) < 10_000
        garbage = cycle()
        device.trim()
        assert garbage() is None
    finally:
        gc.unfreeze()


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WeightsError, match="There is a GPU, but torch .* update its driver"):
        device.select_device("auto")
    assert device.select_device("cpu").type == "cpu"


@pytest.mark.parametrize("name, dtype", [("auto", torch.float32), ("float16", torch.float16)])
def test_dtypes(name: str, dtype: torch.dtype):
    assert device.select_dtype(name, CPU) == dtype
    assert device.select_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(WeightsError, match="There is no dtype 'int8'"):
        device.select_dtype("int8", CPU)


def test_the_cpu_is_healthy():
    assert device.is_healthy(CPU)
