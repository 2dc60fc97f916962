"""Tiny checkpoints in ModelScope's original format, and what the original implementation makes of them.

golden/original.npz was written by modelscope 1.40.2's UNetSD, AutoencoderKL and GaussianDiffusion and open_clip
2.16.0's text transformer, on the CPU in float32, loaded with the tensors that `tensors` makes: their names and shapes,
and results with the arguments in `test_convert.py`.
"""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden" / "original.npz"
CONFIGURATION = {
    "framework": "pytorch",
    "task": "text-to-video-synthesis",
    "model": {
        "type": "latent-text-to-video-synthesis",
        "model_args": {
            "ckpt_clip": "open_clip_pytorch_model.bin",
            "ckpt_unet": "text2video_pytorch_model.pth",
            "ckpt_autoencoder": "VQGAN_autoencoder.pth",
            "max_frames": 16,
            "tiny_gpu": 1,
        },
        "model_cfg": {
            "unet_in_dim": 4,
            "unet_dim": 32,
            "unet_y_dim": 16,
            "unet_context_dim": 64,
            "unet_out_dim": 4,
            "unet_dim_mult": [1, 2, 2],
            "unet_num_heads": 8,
            "unet_head_dim": 16,
            "unet_res_blocks": 1,
            "unet_attn_scales": [1, 0.5],
            "unet_dropout": 0.1,
            "temporal_attention": "True",
            "num_timesteps": 1000,
            "mean_type": "eps",
            "var_type": "fixed_small",
            "loss_type": "mse",
        },
    },
    "pipeline": {"type": "latent-text-to-video-synthesis"},
}
PROMPTS = ["", "An astronaut riding a horse, 4k!"]
# What starts a residual stream or adds to it, and what a stream passes through. With the first small, and the biases of
# the second, the streams are of the size of the norms' epsilons, and a wrong epsilon shows.
STREAM = ("input_blocks.0.0.", "out_layers.3.", "conv4.3.", "proj_out.", "conv_in.", "conv2.")
THROUGH = ("op.bias", "skip_connection.bias", "nin_shortcut.bias", "sample.conv.bias", "3.conv.bias", "1.conv.bias")


def names() -> dict[str, dict[str, list[int]]]:
    """Shapes by name for "unet", "vae" and "text_encoder", as the original's modules have them."""
    return json.loads(str(np.load(GOLDEN)["names"]))


def tensors(shapes: dict[str, list[int]], small: bool) -> dict[str, torch.Tensor]:
    """Random float32 tensors, every one different from where training starts; `small` residual streams if asked."""
    generator = torch.Generator().manual_seed(len(shapes))
    made = {}
    for name in sorted(shapes):
        shape = shapes[name]
        value = torch.randn(shape, generator=generator) * (
            torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 0.2
        )
        if len(shape) == 1 and name.endswith("weight"):
            value += 1
        made[name] = value * (
            3e-3 if small and (any(part in f".{name}" for part in STREAM) or name.endswith(THROUGH)) else 1
        )
    return made


def write(folder: Path, small: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A whole checkpoint in the original's files."""
    folder.mkdir(parents=True)
    (folder / "configuration.json").write_text(json.dumps(CONFIGURATION))
    state = {network: tensors(shapes, small) for network, shapes in names().items()}
    state = {network: {key: value.to(dtype) for key, value in made.items()} for network, made in state.items()}
    torch.save(state["unet"], folder / "text2video_pytorch_model.pth")
    vae = {f"first_stage_model.{key}": value for key, value in state["vae"].items()}
    others = {"loss.logvar": torch.zeros(()), "model.diffusion_model.out.0.weight": torch.ones(4)}
    torch.save({"state_dict": vae | others, "epoch": 3}, folder / "VQGAN_autoencoder.pth")
    visual = {"visual.proj": torch.ones(8, 8), "logit_scale": torch.tensor(4.6)}
    torch.save(state["text_encoder"] | visual, folder / "open_clip_pytorch_model.bin")
    return folder
