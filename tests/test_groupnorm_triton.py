"""The Triton kernels equal torch's group norm: on a GPU, or in Triton's interpreter (see conftest.py)."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs Triton, also for its interpreter")
from bench.levers import fused_norms
from conftest import TINY_UNET, reference_unet
from t2v.groupnorm_triton import group_norm
from t2v.unet3d import UNet3D, UNet3DConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 5e-4)])
@pytest.mark.parametrize(
    "n, c, h, w, groups",
    [
        pytest.param(2, 32, 4, 4, 8, id="one block of channels"),
        pytest.param(3, 96, 5, 7, 32, id="channels and pixels that fill no block"),
        pytest.param(1, 40, 9, 33, 4, id="groups across blocks"),
        pytest.param(2, 8, 1, 1, 2, id="one pixel"),
    ],
)
def test_equals_torch(n: int, c: int, h: int, w: int, groups: int, dtype: torch.dtype, bound: float, silu: bool):
    generator = torch.Generator().manual_seed(c)
    x = (torch.randn(n, c, h, w, generator=generator) + 0.5).to(DEVICE, dtype, memory_format=torch.channels_last)
    weight, bias = (torch.randn(c, generator=generator).to(DEVICE, dtype) for _ in range(2))
    expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    expected = F.silu(expected) if silu else expected
    y = group_norm(x, groups, weight, bias, 1e-5, silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert float((y - expected).norm() / expected.norm()) < bound


def test_many_chunks(monkeypatch: pytest.MonkeyPatch):
    """Of several steps each, the last one not full."""
    monkeypatch.setattr("t2v.groupnorm_triton.PROGRAMS", 2)
    x = torch.randn(1, 8, 21, 17, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 8, device=DEVICE)
    torch.testing.assert_close(group_norm(x, 2, weight, bias, 1e-5), F.group_norm(x, 2, weight, bias, 1e-5))


@torch.inference_mode()
def test_the_network_with_them_is_the_network():
    reference = reference_unet(**TINY_UNET)
    unet = UNet3D(UNet3DConfig.from_dict(dict(reference.config)))
    unet.load_state_dict(reference.state_dict())
    unet = unet.to(DEVICE).eval()
    x, context = torch.randn(1, 4, 2, 4, 4, device=DEVICE), torch.randn(2, 77, 16, device=DEVICE)
    expected = unet(x, 500, context)
    inputs = x, unet.moments(torch.tensor([500], device=DEVICE)), unet.condition(context)
    with fused_norms(unet):
        made = unet.run(*inputs)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
