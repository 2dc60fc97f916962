"""From a network's config, as diffusers and transformers write it, to the network."""

from collections.abc import Callable
from typing import Any

from torch import nn

from t2v import text, unet3d, vae

# Under `accelerate.init_empty_weights` their parameters wait to be filled.
BUILD: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": unet3d.build,
    "text_encoder": text.build,
    "vae": vae.build,
}
