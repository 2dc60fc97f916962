"""bench/fused.py: the Triton kernels equal torch, and the network with them is the network. On a GPU, or in Triton's
interpreter (see conftest.py)."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs Triton, also for its interpreter")
from bench import fused
from bench.levers import LEVERS
from conftest import TINY_UNET, reference_unet
from t2v.groupnorm_triton import group_norm
from t2v.unet3d import UNet3D, UNet3DConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def test_add():
    x, y = (random(2, 24, 5, 7 + i)[..., :7].contiguous(memory_format=torch.channels_last) for i in (0, 1))
    bias = random(24)
    torch.testing.assert_close(fused.add(x, y, bias), x + y + bias[:, None, None])


def test_geglu():
    x = random(3, 50, 48)
    value, gate = x.chunk(2, dim=-1)
    torch.testing.assert_close(fused.geglu(x), value * F.gelu(gate), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", [16, 40])
def test_layer_norm(c: int):
    x, weight, bias = random(3, 45, c), random(c), random(c)
    expected = F.layer_norm(x, (c,), weight, bias, 1e-5)
    torch.testing.assert_close(fused.layer_norm(x, weight, bias, 1e-5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 16, 20])
def test_temporal_attention(length: int):
    q, k, v = (random(2, length, 5, 32 + i)[..., :32].contiguous() for i in range(3))
    heads = [y.permute(0, 2, 1, 3).unflatten(-1, (2, 16)).transpose(2, 3) for y in (q, k, v)]  # (b, pixels, 2, F, 16)
    expected = F.scaled_dot_product_attention(*heads).transpose(2, 3).flatten(3).permute(0, 2, 1, 3)
    torch.testing.assert_close(fused.temporal_attention(q, k, v, 2), expected, rtol=1e-4, atol=1e-5)


def test_a_term_is_added_before_the_group_norm():
    x, added = random(4, 24, 5, 7).contiguous(memory_format=torch.channels_last), random(2, 24)
    weight, bias = random(24), random(24)
    expected = F.silu(F.group_norm(x + added.repeat_interleave(2, 0)[:, :, None, None], 6, weight, bias, 1e-5))
    made = group_norm(x, 6, weight, bias, 1e-5, silu=True, added=added)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in LEVERS if not name.startswith(("attention", "cudnn", "products"))])
def test_the_network_stays_the_same(name: str):
    reference = reference_unet(**TINY_UNET | {"attention_head_dim": 16})
    unet = UNet3D(UNet3DConfig.from_dict(dict(reference.config)))
    unet.load_state_dict(reference.state_dict())
    unet = unet.to(DEVICE).eval()
    x, context = random(1, 4, 3, 4, 4), random(2, 77, 16)
    inputs = x, unet.moments(torch.tensor([500], device=DEVICE)), unet.condition(context)
    expected = unet.run(*inputs)
    with LEVERS[name](unet):
        made = unet.run(*inputs)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(unet.run(*inputs), expected)
