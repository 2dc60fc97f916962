"""The autoencoder is diffusers' AutoencoderKL, number for number."""

import pytest
import torch
from diffusers import AutoencoderKL

from conftest import randomise
from published import VAE
from t2v.errors import WeightsError
from t2v.networks.autoencoder import Autoencoder, AutoencoderConfig
from t2v.networks.layers import fuse_upsample_kernels

TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
FOUR_LEVELS = {
    "block_out_channels": (8, 16, 16, 24),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 3,
}


@pytest.mark.parametrize("config", [TWO_LEVELS, FOUR_LEVELS])
@pytest.mark.parametrize("folded", [False, True])
@torch.inference_mode()
def test_equals_the_reference(config: dict, folded: bool):
    reference = randomise(AutoencoderKL(**config).double())
    ours = Autoencoder(AutoencoderConfig.from_dict(dict(reference.config))).double().eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    if folded:
        fuse_upsample_kernels(ours)

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    x = torch.randn(2, 3, 32, 48, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = reference.encode(x).latent_dist.mean
    assert error(ours.encode(x), expected) < 1e-12  # measured 1e-15
    assert error(ours.decode(expected), reference.decode(expected).sample) < 1e-12


def test_full_size_names_and_shapes():
    """The defaults are the 1.7B model's, which are those of its config."""
    with torch.device("meta"):
        ours, reference = Autoencoder(), AutoencoderKL(**{k: v for k, v in VAE.items() if not k.startswith("_")})
    assert ours.config == AutoencoderConfig.from_dict(VAE)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"use_quant_conv": False},
        {"latents_mean": [0.0]},
        {"up_block_types": ["AttnUpDecoderBlock2D"]},
    ],
)
def test_other_networks_are_refused(change: dict):
    with pytest.raises(WeightsError, match=r"vae/config\.json"):
        AutoencoderConfig.from_dict(TWO_LEVELS | change)
