import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D

from t2v import convolution
from t2v.convolution import Conv, Upsample, convolve, fold
from t2v.engine import Engine

SHAPES = [(n, *kernel, h) for n, kernel, h in product((1, 3), ((3, 3), (3, 1), (1, 1)), (1, 2, 6, 7))]


@pytest.mark.parametrize("worth, at_once", [(0, 1), (0, 200), (0, 2**22), (2**62, 1)])
@torch.inference_mode()
def test_a_convolution_in_fewer_products_is_the_same(worth: int, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolution, "WORTH", worth)
    monkeypatch.setattr(convolution, "AT_ONCE", at_once)
    for n, height, width, h in SHAPES:
        x = torch.randn(n, 6, h, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(8, 6, height, width, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
        for b in (bias, None):
            y = convolve(x, weight, b)
            torch.testing.assert_close(y, F.conv2d(x, weight, b, padding=(height // 2, width // 2)))
            assert y.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_it_is_no_less_exact(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolution, "AT_ONCE", 2**17)
    n, c, size = 4, 256, 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c, c, 3, 3, generator=generator) / (9 * c) ** 0.5
    exact = F.conv2d(x.double(), weight.double(), padding=1)

    def error(y: torch.Tensor) -> float:
        return float((y - exact).norm() / exact.norm())

    found = convolve(x, weight, None)
    assert not torch.equal(found, F.conv2d(x, weight, padding=1)), "these sizes shall be worth it"
    assert error(found) < 1.1 * error(F.conv2d(x, weight, padding=1)) < 1e-6


def test_what_is_trained_has_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolution, "WORTH", 0)
    conv, plain = Conv(2, 2, 3), torch.nn.Conv2d(2, 2, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 2, 4, 4)
    for module in (conv, plain):
        module(x).sum().backward()
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad)


@torch.inference_mode()
def test_half_precision_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch):
    """The sums of rows would be rounded to it."""
    monkeypatch.setattr(convolution, "WORTH", 0)
    x, weight = torch.randn(1, 4, 4, 4).bfloat16(), torch.randn(4, 4, 3, 3).bfloat16()
    assert torch.equal(convolve(x, weight, None), F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("c, c_out, h, w", [(4, 4, 3, 5), (3, 6, 1, 1), (8, 8, 4, 4)])
@torch.inference_mode()
def test_equals_diffusers_folded_or_not(c: int, c_out: int, h: int, w: int):
    reference = Upsample2D(c, use_conv=True, out_channels=c_out).double()
    ours = Upsample(c, c_out).double()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, c, h, w, dtype=torch.float64)
    expected = reference(x)
    torch.testing.assert_close(ours(x), expected)
    fold(ours)
    assert ours.kernel is not None and ours.kernel.dtype == torch.float64
    assert ours(x).shape == (2, c_out, 2 * h, 2 * w)
    torch.testing.assert_close(ours(x), expected)
    odd = (2 * h - 1, 2 * w + 1)
    torch.testing.assert_close(ours(x, odd), reference(x, output_size=odd))


@torch.inference_mode()
def test_on_a_gpu_and_in_half_precision_it_is_one_transposed_convolution():
    ours, plain = Upsample(8, 4).bfloat16(), Upsample(8, 4).bfloat16()
    plain.load_state_dict(ours.state_dict())
    fold(ours)
    assert ours.kernel is not None and ours.kernel.shape == (8, 4, 4, 4)
    x = torch.randn(3, 8, 4, 5).bfloat16()
    torch.testing.assert_close(ours(x), plain(x), rtol=0.03, atol=0.03)


def test_folding_is_not_part_of_the_weights():
    module = Upsample(4)
    names = set(module.state_dict())
    fold(module)
    assert set(module.state_dict()) == names == {"conv.weight", "conv.bias"}


@torch.inference_mode()
def test_folding_again_takes_up_changed_weights():
    module = Upsample(4)
    fold(module)
    module.conv.weight.mul_(2)
    plain = copy.deepcopy(module)
    plain.kernel = None
    fold(module)
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)


def test_a_loaded_engine_is_folded(tiny: Engine):
    for network in (tiny.unet, tiny.vae.autoencoder.decoder):
        upsamplers = [module for module in network.modules() if isinstance(module, Upsample)]
        assert upsamplers and all(module.kernel is not None for module in upsamplers)
