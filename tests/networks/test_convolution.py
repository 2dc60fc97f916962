from itertools import product

import pytest
import torch
import torch.nn.functional as F

from t2v.networks import convolution
from t2v.networks.convolution import conv2d_same
from t2v.networks.layers import Conv

SHAPES = [(n, *kernel, h) for n, kernel, h in product((1, 3), ((3, 3), (3, 1), (1, 1)), (1, 2, 6, 7))]


@pytest.mark.parametrize("worth, at_once", [(0, 1), (0, 200), (0, 2**22), (2**62, 1)])
@torch.inference_mode()
def test_a_convolution_in_fewer_products_is_the_same(worth: int, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolution, "MIN_MULTIPLIES", worth)
    monkeypatch.setattr(convolution, "TILE_VALUES", at_once)
    for n, height, width, h in SHAPES:
        x = torch.randn(n, 6, h, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(8, 6, height, width, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
        for b in (bias, None):
            y = conv2d_same(x, weight, b)
            torch.testing.assert_close(y, F.conv2d(x, weight, b, padding=(height // 2, width // 2)))
            assert y.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_it_is_no_less_exact(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolution, "TILE_VALUES", 2**17)
    n, c, size = 4, 256, 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c, c, 3, 3, generator=generator) / (9 * c) ** 0.5
    exact = F.conv2d(x.double(), weight.double(), padding=1)

    def error(y: torch.Tensor) -> float:
        return float((y - exact).norm() / exact.norm())

    found = conv2d_same(x, weight, None)
    assert not torch.equal(found, F.conv2d(x, weight, padding=1)), "these sizes shall be worth it"
    assert error(found) < 1.1 * error(F.conv2d(x, weight, padding=1)) < 1e-6


def test_what_is_trained_has_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolution, "MIN_MULTIPLIES", 0)
    conv, plain = Conv(2, 2, 3), torch.nn.Conv2d(2, 2, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 2, 4, 4)
    for module in (conv, plain):
        module(x).sum().backward()
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad)


@torch.inference_mode()
def test_half_precision_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch):
    """The sums of rows would be rounded to it."""
    monkeypatch.setattr(convolution, "MIN_MULTIPLIES", 0)
    x, weight = torch.randn(1, 4, 4, 4).bfloat16(), torch.randn(4, 4, 3, 3).bfloat16()
    assert torch.equal(conv2d_same(x, weight, None), F.conv2d(x, weight, padding=1))
