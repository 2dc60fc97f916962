"""bench/gpu.py: every part runs on the CPU, failures are fenced, and kernels are told apart."""

import json
import re
import time
from pathlib import Path

import pytest

from bench import gpu, kernels
from bench.lab import Lab
from bench.parts import PARTS, Part, Result

pytestmark = pytest.mark.slow  # half a minute in all


@pytest.fixture
def lab(tiny_folder: Path) -> Lab:
    return Lab(tiny_folder, "cpu", rehearsal=True)


@pytest.mark.parametrize("name", sorted(set(PARTS) - {"tests", "setup", "compile", "compiled-stock"}))
def test_every_part_runs_and_has_a_table(lab: Lab, name: str, tmp_path: Path):
    assert gpu.run(lab, [name], tmp_path, budget=600) == []
    result = json.loads((tmp_path / "results.json").read_text())[name]
    assert result["status"] == "done" and not [row for row in result["result"].get("rows", []) if failed(row)]
    assert "No table" not in (tmp_path / "tables.md").read_text()


def failed(row: Result) -> bool:
    """Whether a way failed that a CPU has; it lacks some of torch's attentions."""
    return "failed" in row and not re.search("No viable backend|No available kernel", row["failed"])


def test_a_part_that_fails_or_takes_too_long_keeps_its_findings_and_lets_the_others_run(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(lab: Lab, result: Result) -> None:
        result["found"] = 1
        raise ValueError("broken")

    def sleep(lab: Lab, result: Result) -> None:
        result["found"] = 2
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("The part handled the end of its time.")

    def succeed(lab: Lab, result: Result) -> None:
        result["found"] = result.get("found", 0) + 3

    parts = {"fail": Part(fail, 5), "sleep": Part(sleep, 0.02), "succeed": Part(succeed, 5)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.run(lab, list(parts), tmp_path, budget=600) == ["fail", "sleep"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: (r["status"], r["result"]["found"]) for name, r in results.items()} == {
        "fail": ("failed", 1),
        "sleep": ("timed out", 2),
        "succeed": ("done", 3),
    }
    assert results["fail"]["reason"] == "ValueError: broken" and "raise ValueError" in "".join(
        results["fail"]["traceback"]
    )


def test_a_part_that_is_done_runs_again_only_if_asked(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    monkeypatch.setattr(gpu, "PARTS", {"count": Part(lambda lab, result: calls.append("count"), 5)})
    for again in (False, False, True):
        gpu.run(lab, ["count"], tmp_path, 600, again)
    assert len(calls) == 2


def test_no_part_begins_when_the_budget_is_spent(lab: Lab, tmp_path: Path):
    assert gpu.run(lab, ["env"], tmp_path, budget=-1) == ["env"]
    assert json.loads((tmp_path / "results.json").read_text())["env"]["status"] == "not begun"


@pytest.mark.parametrize(
    "kernel, operation, kind",
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16", "aten::cudnn_convolution", "conv"),
        ("nvjet_hsh_128x256", "aten::addmm", "GEMM"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel", "aten::cudnn_convolution", "copy"),
        ("void at::native::RowwiseMomentsCUDAKernel<Half>", "aten::native_group_norm", "norm"),
        ("flash_fwd_kernel", "aten::_scaled_dot_product_flash_attention", "attention"),
        ("vectorized_elementwise_kernel<4, silu>", "aten::silu", "elementwise"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16", None, "conv"),
        ("sm90_xmma_gemm_f16f16", None, "GEMM"),
        ("void at::native::RowwiseMomentsCUDAKernel<Half>", None, "norm"),
        ("direct_copy_kernel_cuda", None, "copy"),
    ],
)
def test_kinds_of_kernels(kernel: str, operation: str | None, kind: str):
    assert kernels.kind(kernel, operation) == kind


def test_a_trace_is_summed_up_by_kind_with_the_time_in_which_the_gpu_was_busy():
    operation = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9}
    events = [
        operation | {"args": {"External id": 1, "Input Dims": [[2, 3], [3, 4]]}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 10, "dur": 20, "args": {"External id": 1}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 25, "dur": 15, "args": {"External id": 1}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 100, "dur": 5, "args": {}},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 10},
    ]
    found = kernels.summarise(events)
    assert found["kernels"] == 3 and found["busy_ms"] == pytest.approx(0.035)  # 10 to 40, 100 to 105
    assert found["kinds"] == pytest.approx({"GEMM": 0.035, "copy": 0.005})
    longest = {"ms": 0.035, "calls": 2, "kernel": "gemm", "operation": "aten::mm", "shapes": "[[2, 3], [3, 4]]"}
    assert found["top"][0] == longest


def test_a_graph_takes_the_operations_of_the_same_kernels_from_an_earlier_profile():
    def kernel(name: str, at: float, number: int | None = None) -> dict:
        arguments = {} if number is None else {"External id": number}
        return {"ph": "X", "cat": "kernel", "name": name, "ts": at, "dur": 2, "args": arguments}

    operation = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1}
    operation |= {"args": {"External id": 7, "Input Dims": [[2, 3], [3, 4]]}}
    known: list[kernels.Launch] = []
    kernels.summarise([operation, kernel("gemm", 1, 7), kernel("small_norm", 4)], known=known)
    # The copies of its inputs and outputs are launched as operations.
    copy = {"ph": "X", "cat": "cpu_op", "name": "aten::copy_", "ts": 0, "dur": 1, "args": {"External id": 8}}
    found = kernels.summarise([copy, kernel("clone", 0, 8), kernel("small_norm", 1), kernel("gemm", 4)], known=known)
    assert found["kinds"] == pytest.approx({"copy": 0.002, "norm": 0.002, "GEMM": 0.002})
    assert {(line["kernel"], line["operation"], line["shapes"]) for line in found["top"]} == {
        ("clone", "aten::copy_", "[]"),
        ("gemm", "aten::mm", "[[2, 3], [3, 4]]"),
        ("small_norm", "", "[]"),
    }


def test_without_a_gpu_operations_count_without_those_they_call():
    def operation(name: str, start: int, length: int, number: int) -> dict:
        event = {"ph": "X", "cat": "cpu_op", "name": f"aten::{name}", "ts": start, "dur": length, "tid": 1}
        return event | {"args": {"External id": number}}

    events = [operation("linear", 0, 10_000, 1), operation("addmm", 1000, 6000, 2), operation("copy_", 2000, 1000, 3)]
    events.append(operation("silu", 20_000, 3000, 4))
    found = kernels.summarise(events, cuda=False)
    assert found["kinds"] == pytest.approx({"GEMM": 4 + 5, "copy": 1, "elementwise": 3})
