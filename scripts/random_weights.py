"""Write a model folder of the 1.7B model's full size with random weights, to measure speed, memory and load times.

    python scripts/random_weights.py weights/ms-1.7b-random

Names, shapes and configs are the published ones; 3.7 GB in float16. Layers that training starts from zero are random
too, so that no arithmetic is trivially skipped.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from t2v.checkpoints.convert import SCHEDULER, TOKENIZER
from t2v.checkpoints.folder import NetworkFiles, write_model
from t2v.networks.autoencoder import AutoencoderConfig
from t2v.networks.build import build_on_meta
from t2v.networks.clip import CLIPTextConfig
from t2v.networks.unet3d import UNet3DConfig

CONFIGS: dict[str, dict[str, Any]] = {
    "unet": UNet3DConfig().to_dict() | {"sample_size": 32},
    "vae": AutoencoderConfig().to_dict() | {"sample_size": 512},
    "text_encoder": CLIPTextConfig().to_dict(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.seed)


def write(out: Path, seed: int = 0) -> None:
    """Write the folder; one network is in memory at a time, 2.8 GB at most."""
    write_model(out, random_networks(torch.Generator().manual_seed(seed)), SCHEDULER, TOKENIZER)


def random_networks(generator: torch.Generator) -> Iterator[NetworkFiles]:
    for network, config in CONFIGS.items():
        state = {}
        for name, p in build_on_meta(network, config).named_parameters():
            value = torch.empty(p.shape, dtype=torch.float16)
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.02
            value.normal_(0, scale, generator=generator)
            if p.ndim == 1 and name.endswith("weight"):  # of a norm
                value += 1
            state[name] = value
        yield NetworkFiles.of(network, config, state)


if __name__ == "__main__":
    main()
