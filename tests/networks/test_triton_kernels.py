"""The Triton kernels equal torch: on a GPU, or in Triton's interpreter (see conftest.py)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, also for its interpreter")
from t2v.networks import triton_kernels as kernels

pytestmark = pytest.mark.slow  # half a minute in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 6e-4)])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return (random(n, c, h, w, dtype=dtype) + 0.5).contiguous(memory_format=torch.channels_last)


def error(made: Tensor, expected: Tensor) -> float:
    """|made - expected| / |expected|."""
    return float((made.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("silu", [False, True])
@PRECISIONS
@pytest.mark.parametrize(
    "n, c, h, w, groups",
    [
        pytest.param(2, 32, 4, 4, 8, id="narrow groups"),
        pytest.param(3, 96, 5, 7, 32, id="channels and pixels that fill no block"),
        pytest.param(1, 40, 9, 33, 4, id="groups across blocks"),
        pytest.param(2, 8, 1, 1, 2, id="one pixel"),
        pytest.param(2, 64, 4, 4, 2, id="a small group, 16 pixels"),
        pytest.param(1, 80, 5, 7, 2, id="a small group, 35 pixels"),
        pytest.param(2, 60, 12, 16, 3, id="a group of more pixels"),
        pytest.param(1, 160, 3, 2, 1, id="one wide group"),
    ],
)
def test_group_norm(n: int, c: int, h: int, w: int, groups: int, dtype: torch.dtype, bound: float, silu: bool):
    x, weight, bias = image(n, c, h, w, dtype), random(c, dtype=dtype, seed=1), random(c, dtype=dtype, seed=2)
    expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    y = kernels.group_norm(x, groups, weight, bias, 1e-5, silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, F.silu(expected) if silu else expected) < bound


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("c, h, w, groups", [(32, 3, 5, 8), (64, 3, 5, 2)])
def test_group_norm_of_what_is_added(c: int, h: int, w: int, groups: int, with_bias: bool, rows: int):
    """A bias for all, and a term for each half of the images, a slice of a wider tensor."""
    x, weight, shift = image(4, c, h, w, torch.float32), random(c, seed=1), random(c, seed=2)
    bias = random(c, seed=3) if with_bias else None
    term = random(rows, 3 * c, seed=4)[:, c : 2 * c] if rows else None
    total = x.double()
    if bias is not None:
        total = total + bias.double()[:, None, None]
    if term is not None:
        total = total + term.double().repeat_interleave(4 // rows, dim=0)[:, :, None, None]
    expected = F.silu(F.group_norm(total, groups, weight.double(), shift.double(), 1e-5))
    assert error(kernels.group_norm(x, groups, weight, shift, 1e-5, True, bias, term), expected) < 1e-6


@pytest.mark.parametrize("b, frames, h, w", [(1, 1, 3, 5), (2, 3, 3, 5), (1, 4, 9, 11)])
@pytest.mark.parametrize("c, groups", [(24, 8), (64, 2)])
def test_group_norm_turns_frames_and_pixels_round(b: int, frames: int, h: int, w: int, c: int, groups: int):
    x, weight, bias = random(b, frames, h, w, c), random(c, seed=1), random(c, seed=2)
    tall = x.flatten(1, 2).permute(0, 3, 1, 2)
    expected = F.group_norm(tall.double(), groups, weight.double(), bias.double(), 1e-6).permute(0, 2, 3, 1)
    expected = expected.reshape(b, frames, h * w, c).transpose(1, 2)
    y = kernels.group_norm(tall, groups, weight, bias, 1e-6, frames=frames).permute(0, 2, 3, 1)
    assert error(y.reshape(b, h * w, frames, c), expected) < 1e-6


def test_group_norm_in_many_chunks(monkeypatch: pytest.MonkeyPatch):
    """Of several steps each, the last one not full."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x, (weight, bias) = image(1, 8, 41, 37, torch.float32), random(2, 8)
    torch.testing.assert_close(kernels.group_norm(x, 2, weight, bias, 1e-5), F.group_norm(x, 2, weight, bias, 1e-5))


@PRECISIONS
@pytest.mark.parametrize("rows, c", [(1, 16), (37, 72), (5, 320), (3, 640), (3, 1280)])
@pytest.mark.parametrize("with_sum", [False, True])
def test_layer_norm(rows: int, c: int, dtype: torch.dtype, bound: float, with_sum: bool):
    x, weight, bias = random(2, rows, c, dtype=dtype), random(c, dtype=dtype, seed=1), random(c, dtype=dtype, seed=2)
    added = random(2, rows, c, dtype=dtype, seed=3) if with_sum else None
    total, y = kernels.layer_norm(x, weight, bias, 1e-5, added)
    expected = x if added is None else x + added
    assert torch.equal(total, expected)
    assert error(y, F.layer_norm(expected.double(), (c,), weight.double(), bias.double(), 1e-5)) < bound


@PRECISIONS
@pytest.mark.parametrize("rows, c", [(1, 8), (37, 72), (3, 1280)])
@pytest.mark.parametrize("halves", [False, True])
def test_geglu(rows: int, c: int, dtype: torch.dtype, bound: float, halves: bool):
    both = random(2, rows, 2 * c, dtype=dtype)
    value, gate = both.chunk(2, dim=-1) if halves else (both[..., :c].contiguous(), both[..., c:].contiguous())
    assert error(kernels.geglu(value, gate), value.double() * F.gelu(gate.double())) < bound


@PRECISIONS
@pytest.mark.parametrize(
    "n, length, heads, d", [(1, 1, 1, 8), (9, 16, 2, 64), (3, 24, 1, 16), (2, 64, 1, 32), (70, 1, 2, 16), (5, 5, 3, 40)]
)
def test_attention(n: int, length: int, heads: int, d: int, dtype: torch.dtype, bound: float):
    q, k, v = (random(n, length, heads * d, dtype=dtype, seed=seed) for seed in range(3))
    q *= 3  # so that some keys get almost everything
    split = (x.double().unflatten(-1, (heads, d)).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    assert error(kernels.attention(q, k, v, heads), expected) < bound
    together = torch.cat([q, k, v], dim=-1).chunk(3, dim=-1)
    assert torch.equal(kernels.attention(*together, heads), kernels.attention(q, k, v, heads))


@PRECISIONS
@pytest.mark.parametrize("shape", [(1, 16), (2, 9, 11, 24), (3, 5, 80)])
@pytest.mark.parametrize("with_bias, with_other", [(False, True), (True, False), (True, True)])
def test_sums(shape: tuple[int, ...], with_bias: bool, with_other: bool, dtype: torch.dtype, bound: float):
    x = random(*shape, dtype=dtype)
    bias = random(shape[-1], dtype=dtype, seed=1) if with_bias else None
    other = random(*shape, dtype=dtype, seed=2) if with_other else None
    expected = sum((part.double() for part in (bias, other) if part is not None), x.double())
    y = kernels.add(x, other, bias)
    assert y is x and error(y, expected) < bound


def test_a_sum_turns_pixels_and_frames_round():
    x, other = random(2, 15, 3, 24), random(2, 3, 15, 24, seed=1)
    assert torch.equal(kernels.add(x, other, None, frames=3), x.transpose(1, 2) + other)
