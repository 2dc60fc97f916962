"""Tiny real parts: random networks of the model's topology, saved by diffusers and transformers in the real layout."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from published import SCHEDULER as MS_SCHEDULER
from t2v.engine import Engine
from t2v.job import Pass
from t2v.request import Request
from t2v.sampling.noise import noise_stream

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "weights" / "demo"

TINY_UNET = {
    "sample_size": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, also where the library starts from zeros or ones: a zero hides what it multiplies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return module.eval().requires_grad_(False)


def reference_unet(dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> UNet3DConditionModel:
    """diffusers' network with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = randomise(UNet3DConditionModel(**config), seed)
    for p in unet.parameters():  # .to() warns about a list of modules that is empty here
        p.data = p.data.to(dtype)
    return unet


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in diffusers' folder layout, 32x32 native, 100 kB without its vocabulary's embeddings."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    reference_unet(**TINY_UNET).save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=32,
    )
    randomise(vae, 1).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    randomise(CLIPTextModel(text), 2).save_pretrained(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(MS_SCHEDULER))
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    shutil.copy(DEMO / "model_index.json", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if "t2v" not in k}))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Engine:
    return Engine.load(tiny_folder, device="cpu")


def first_pass(engine: Engine, request: Request, has_init_video: bool = False) -> Pass:
    return engine.prepare(request, has_init_video=has_init_video).passes[0]


def clean_latents(engine: Engine, request: Request, init_frames=None, **options) -> torch.Tensor:
    """(1, C, F, h, w): what the first pass of a request hands to the decoder."""
    return engine.denoise(first_pass(engine, request, init_frames is not None), init_frames, **options)


def first_noise(engine: Engine, request: Request) -> torch.Tensor:
    """(1, C, F, h, w): what denoising starts from."""
    pass_ = first_pass(engine, request)
    return next(noise_stream(pass_.timeline, pass_.latent_shape, pass_.seed, engine.device))


@pytest.fixture
def broken_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
