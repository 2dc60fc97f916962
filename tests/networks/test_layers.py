import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from t2v.engine import Engine
from t2v.networks.layers import Upsample, fuse_upsample_kernels


@pytest.mark.parametrize("c, c_out, h, w", [(4, 4, 3, 5), (3, 6, 1, 1), (8, 8, 4, 4)])
@torch.inference_mode()
def test_upsampling_equals_diffusers_with_and_without_fused_kernels(c: int, c_out: int, h: int, w: int):
    reference = Upsample2D(c, use_conv=True, out_channels=c_out).double()
    ours = Upsample(c, c_out).double()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, c, h, w, dtype=torch.float64)
    expected = reference(x)
    torch.testing.assert_close(ours(x), expected)
    fuse_upsample_kernels(ours)
    assert ours.kernel is not None and ours.kernel.dtype == torch.float64
    assert ours(x).shape == (2, c_out, 2 * h, 2 * w)
    torch.testing.assert_close(ours(x), expected)
    odd = (2 * h - 1, 2 * w + 1)
    torch.testing.assert_close(ours(x, odd), reference(x, output_size=odd))


@torch.inference_mode()
def test_half_precision_upsamples_by_one_transposed_convolution():
    ours, plain = Upsample(8, 4).bfloat16(), Upsample(8, 4).bfloat16()
    plain.load_state_dict(ours.state_dict())
    fuse_upsample_kernels(ours)
    assert ours.kernel is not None and ours.kernel.shape == (8, 4, 4, 4)
    x = torch.randn(3, 8, 4, 5).bfloat16()
    torch.testing.assert_close(ours(x), plain(x), rtol=0.03, atol=0.03)


def test_fused_kernels_are_not_part_of_the_weights():
    module = Upsample(4)
    names = set(module.state_dict())
    fuse_upsample_kernels(module)
    assert set(module.state_dict()) == names == {"conv.weight", "conv.bias"}


@torch.inference_mode()
def test_fusing_again_uses_the_changed_weights():
    module = Upsample(4)
    fuse_upsample_kernels(module)
    module.conv.weight.mul_(2)
    plain = copy.deepcopy(module)
    plain.kernel = None
    fuse_upsample_kernels(module)
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)


def test_a_loaded_engine_has_fused_kernels(tiny: Engine):
    for network in (tiny.unet, tiny.vae.autoencoder.decoder):
        upsamplers = [module for module in network.modules() if isinstance(module, Upsample)]
        assert upsamplers and all(module.kernel is not None for module in upsamplers)
