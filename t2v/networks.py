"""From a network's config, as diffusers and transformers write it, to the network, ready to be filled."""

from collections.abc import Callable
from typing import Any

from torch import nn

from t2v import text, unet3d, vae
from t2v.errors import WeightsError

BUILD: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": unet3d.build,
    "text_encoder": text.build,
    "vae": vae.build,
}


def empty(network: str, config: dict[str, Any]) -> nn.Module:
    """The network of a `<network>/config.json`, its parameters on the meta device.

    Raises:
        WeightsError: the config describes none that is supported.
    """
    from accelerate import init_empty_weights  # seconds, as the libraries of the networks themselves

    try:
        with init_empty_weights():
            return BUILD[network](config)
    except WeightsError:
        raise
    except Exception as error:  # the libraries have their own kinds
        raise WeightsError(f"{network}/config.json describes no network: {error}") from error
