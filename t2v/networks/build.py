"""From a network's config, as diffusers and transformers write it, to the network without its weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from t2v.errors import WeightsError
from t2v.networks.autoencoder import Autoencoder, AutoencoderConfig
from t2v.networks.clip import CLIPText, CLIPTextConfig
from t2v.networks.unet3d import UNet3D, UNet3DConfig

BUILDERS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "unet": lambda config: UNet3D(UNet3DConfig.from_dict(config)),
    "text_encoder": lambda config: CLIPText(CLIPTextConfig.from_dict(config)),
    "vae": lambda config: Autoencoder(AutoencoderConfig.from_dict(config)),
}


def build_on_meta(network: str, config: Mapping[str, Any]) -> nn.Module:
    """The network of a `<network>/config.json`, its parameters on the meta device.

    Raises:
        WeightsError: the config describes no supported network.
    """
    try:
        with torch.device("meta"), SkipInit():
            return BUILDERS[network](config)
    except WeightsError:
        raise
    except Exception as error:  # torch's errors for impossible sizes are of many types
        raise WeightsError(f"{network}/config.json describes no network: {error}") from error


def parameter_shapes(network: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by its name."""
    return {key: tuple(value.shape) for key, value in build_on_meta(network, config).state_dict().items()}


class SkipInit(TorchFunctionMode):
    """Skips the random initialisation of layers. On the meta device it has no effect, but costs a second of imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
