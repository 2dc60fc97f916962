"""Write a model folder of the 1.7B model's full size with random weights: for speed, memory and load times.

    python -m bench.random_weights weights/ms-1.7b-random

Names, shapes and configs are the published ones; 3.7 GB in float16. Every layer that training starts from zero is
random too, so that no arithmetic is trivially skipped.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from t2v.networks import empty
from t2v.weights import NETWORKS

ROOT = Path(__file__).resolve().parent.parent

UNET: dict[str, Any] = {
    "_class_name": "UNet3DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"],
    "downsample_padding": 1,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 32,
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"],
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "thresholding": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.seed)


def write(out: Path, seed: int = 0, device: str = "cpu") -> None:
    """Write the folder; one network is in memory at a time, 2.8 GB at most. Each kind of device draws its own values,
    a GPU within a second."""
    generator = torch.Generator(device).manual_seed(seed)
    for network, config in {"unet": UNET, "vae": VAE, "text_encoder": TEXT}.items():
        _network(out / network, config, empty(network, config), generator)
    _json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    shutil.copytree(ROOT / "weights" / "demo" / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    index = json.loads((ROOT / "weights" / "demo" / "model_index.json").read_text())
    _json(out / "model_index.json", {k: v for k, v in index.items() if not k.startswith("_t2v")})


def _network(folder: Path, config: dict[str, Any], module: nn.Module, generator: torch.Generator) -> None:
    state = {}
    prefix = "text_model." if folder.name == "text_encoder" else ""  # version 4 of transformers wants it
    for name, p in module.named_parameters():
        value = torch.empty(p.shape, dtype=torch.float16, device=generator.device)
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.02
        value.normal_(0, scale, generator=generator)
        if p.ndim == 1 and name.endswith("weight"):  # of a norm
            value += 1
        state[prefix + name] = value.cpu()
    _json(folder / "config.json", config)
    save_file(state, folder / f"{NETWORKS[folder.name]}.safetensors", metadata={"format": "pt"})


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
