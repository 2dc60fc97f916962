"""The denoiser is diffusers' UNet3DConditionModel, number for number."""

import pytest
import torch
from diffusers import UNet3DConditionModel

from conftest import TINY_UNET, reference_unet
from t2v.errors import WeightsError
from t2v.networks.unet3d import UNet3D, UNet3DConfig

# Measured 3e-7 to 1e-6 and 2e-15; the network's own float32 rounding against float64 is 1e-6.
FLOAT32, FLOAT64 = 1e-5, 1e-12

FOUR_LEVELS = {
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
UNEVEN_HEADS = TINY_UNET | {"block_out_channels": (24, 40), "attention_head_dim": 16}  # inner width is not the width
CONFIGS = {"two levels": TINY_UNET, "four levels": FOUR_LEVELS, "uneven heads": UNEVEN_HEADS}


def both(config: dict, dtype: torch.dtype) -> tuple[UNet3DConditionModel, UNet3D]:
    reference = reference_unet(dtype, **config)
    ours = UNet3D(UNet3DConfig.from_dict(dict(reference.config))).to(dtype)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours.eval()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT32), (torch.float64, FLOAT64)])
@torch.inference_mode()
def test_equals_the_reference(name: str, dtype: torch.dtype, tolerance: float):
    reference, ours = both(CONFIGS[name], dtype)
    x = torch.randn(2, 4, 5, 8, 8, dtype=dtype)
    context = torch.randn(2, 77, CONFIGS[name]["cross_attention_dim"], dtype=dtype)
    for t in (0, 371, 999):
        assert relative_error(ours(x, t, context), reference(x, t, context).sample) < tolerance


@pytest.mark.parametrize("frames, h, w", [(1, 8, 8), (2, 5, 7), (3, 1, 9), (17, 6, 4), (1, 1, 1)])
@torch.inference_mode()
def test_any_size_and_frame_count(frames: int, h: int, w: int):
    reference, ours = both(FOUR_LEVELS, torch.float64)
    x = torch.randn(2, 4, frames, h, w, dtype=torch.float64)
    context = torch.randn(2, 77, 24, dtype=torch.float64)
    assert relative_error(ours(x, 7, context), reference(x, 7, context).sample) < FLOAT64


@torch.inference_mode()
def test_rows_do_not_mix_and_timesteps_may_differ():
    _, ours = both(TINY_UNET, torch.float64)
    x = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    context = torch.randn(2, 77, 16, dtype=torch.float64)
    together = ours(x, torch.tensor([10, 900]), context)
    alone = torch.cat([ours(x[:1], 10, context[:1]), ours(x[1:], 900, context[1:])])
    assert relative_error(together, alone) < FLOAT64


@torch.inference_mode()
def test_rows_that_share_latents_and_prepared_signals():
    """The guided pair: one row of latents, two of text; and what a request computes before its steps."""
    reference, ours = both(FOUR_LEVELS, torch.float64)
    x = torch.randn(1, 4, 3, 5, 6, dtype=torch.float64)
    context = torch.randn(2, 77, 24, dtype=torch.float64)
    expected = reference(torch.cat([x, x]), 500, context).sample
    assert relative_error(ours(x, 500, context), expected) < FLOAT64
    terms, text_kv = ours.project_timesteps(torch.tensor([20, 500])), ours.project_text(context)
    assert relative_error(ours.forward_projected(x, terms[1:], text_kv), expected) < FLOAT64


@torch.inference_mode()
def test_frame_order_and_text_matter():
    """Dead temporal layers or a dead cross-attention would pass many a test."""
    _, ours = both(TINY_UNET, torch.float64)
    x = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64)
    context = torch.randn(1, 77, 16, dtype=torch.float64)
    y = ours(x, 500, context)
    assert relative_error(ours(x.flip(2), 500, context).flip(2), y) > 1e-3
    assert relative_error(ours(x, 500, context.flip(1) + 1), y) > 1e-3


def test_full_size_names_and_shapes():
    """The 1.7B model's denoiser: 1,480 tensors, 1,411,233,860 parameters, the defaults of the config."""
    with torch.device("meta"):
        ours, reference = UNet3D().state_dict(), UNet3DConditionModel().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}
    assert len(ours) == 1480
    assert sum(v.numel() for v in ours.values()) == 1_411_233_860


@pytest.mark.parametrize(
    "change", [{"act_fn": "gelu"}, {"time_cond_proj_dim": 256}, {"down_block_types": ["DownBlock2D"]}, {"dropout": 0.1}]
)
def test_other_networks_are_refused(change: dict):
    with pytest.raises(WeightsError, match=r"unet/config\.json"):
        UNet3DConfig.from_dict(TINY_UNET | change)
