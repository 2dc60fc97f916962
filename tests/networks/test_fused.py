"""The networks with the Triton kernels are the networks without them, in Triton's interpreter or on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, TINY_UNET, reference_unet
from t2v.engine import Engine
from t2v.networks import fused
from t2v.networks.unet3d import UNet3D, UNet3DConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels run on any device and in any precision; which of them did is in the list."""
    pytest.importorskip("triton", reason="needs Triton, also for its interpreter")
    called: list[str] = []

    def runs(kernel: str, x: torch.Tensor) -> bool:
        called.append(kernel)
        return kernel not in fused.disabled

    monkeypatch.setattr(fused, "runs", runs)
    return called


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("frames, rows", [(2, 2), (1, 1)])
@pytest.mark.parametrize("kernel", [*fused.KERNELS, "all"])
def test_the_denoiser(kernel: str, frames: int, rows: int, everywhere: list[str]):
    reference = reference_unet(**TINY_UNET)
    unet = UNet3D(UNet3DConfig.from_dict(dict(reference.config)))
    unet.load_state_dict(reference.state_dict())
    unet = unet.to(DEVICE).eval()
    x, context = torch.randn(1, 4, frames, 4, 6, device=DEVICE), torch.randn(rows, 77, 16, device=DEVICE)
    with fused.without(*fused.KERNELS):
        expected = unet(x, 500, context)
    with fused.without(*(set(fused.KERNELS) - {kernel} if kernel != "all" else ())):
        made = unet(x, 500, context)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
    assert set(everywhere) == set(fused.KERNELS)


@pytest.mark.slow
@torch.inference_mode()
def test_the_autoencoder(tiny_folder: Path, everywhere: list[str]):
    network = Engine.load(tiny_folder, DEVICE, "float32").vae.autoencoder
    z, pixels = torch.randn(2, 4, 2, 3, device=DEVICE), torch.randn(1, 3, 16, 24, device=DEVICE)
    with fused.without(*fused.KERNELS):
        expected = network.decode(z), network.encode(pixels)
    for made, plain in zip((network.decode(z), network.encode(pixels)), expected):
        torch.testing.assert_close(made, plain, rtol=1e-3, atol=1e-4)


def test_without_them_for_a_while():
    with fused.without("bias"), fused.without("GEGLU", "bias"):
        assert fused.disabled == {"bias", "GEGLU"}
    assert fused.disabled == set()


@pytest.mark.slow
def test_a_cpu_does_not_import_triton(tiny_folder: Path):
    code = f"""
import sys
from t2v.engine import Engine
from t2v.request import Request
engine = Engine.load({str(tiny_folder)!r}, "cpu")
list(engine.generate(Request("a circle", num_frames=2, num_inference_steps=2)))
assert "t2v.networks.triton_kernels" not in sys.modules and "triton" not in sys.modules, sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
