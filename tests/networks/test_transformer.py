"""Attention and feed-forward in parts give the same as in one piece."""

import pytest
import torch
import torch.nn.functional as F

from conftest import TINY_UNET, randomise
from t2v.networks.unet3d import UNet3D, UNet3DConfig


def network() -> UNet3D:
    unet = UNet3D(UNet3DConfig.from_dict(TINY_UNET)).double()
    randomise(unet)
    return unet


@torch.inference_mode()
def test_attention_to_more_sequences_than_a_kernel_takes_is_split(monkeypatch: pytest.MonkeyPatch):
    ours = network()
    x, context = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64), torch.randn(2, 77, 16, dtype=torch.float64)
    whole = ours(x, 7, context)
    sizes = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: sizes.append(len(q)) or attention(q, k, v))
    monkeypatch.setattr("t2v.networks.transformer.MAX_SEQUENCES", 5)
    assert torch.allclose(ours(x, 7, context), whole, rtol=1e-12, atol=1e-12)
    assert max(sizes) == 5 and sizes.count(5) > 6 and 2 in sizes  # 32 pixels are 6 parts and a rest of 2


@torch.inference_mode()
def test_a_feed_forward_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch):
    ours = network()
    x, context = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64), torch.randn(2, 77, 16, dtype=torch.float64)
    whole = ours(x, 7, context)
    sizes = []
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: sizes.append(x.numel()) or gelu(x))
    monkeypatch.setattr("t2v.networks.transformer.MAX_HIDDEN_VALUES_CPU", 1000)
    assert torch.allclose(ours(x, 7, context), whole, rtol=1e-12, atol=1e-12)
    assert max(sizes) <= 1000 and len(set(sizes)) > 2
