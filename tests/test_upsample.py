import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from t2v.engine import Engine
from t2v.upsample import Upsample, fold


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
