"""Low-rank adaptations (LoRA, Hu et al., arXiv 2106.09685) of the denoiser.

They are read from every format of this family, added to the weights exactly, and removed again bit for bit.

A LoRA adds scale * up @ down to the weight of a layer. The formats differ in how they name layers and tensors:

- PEFT: a folder with adapter_config.json and adapter_model.safetensors (or .bin); keys
  `base_model.model.<layer>.lora_A.weight` (down) and `lora_B.weight` (up); scale alpha / rank. MCM is one of these.
- cloneofsimo's list: a `.pt` file with no names, [up, down, up, down ...] for every linear and convolution layer of the
  denoiser in diffusers' order. T2V-Turbo-MS is one of these, with one layer more: the guidance embedding.
- Stable-LoRA: safetensors, keys `<layer>.lora_A`, `<layer>.lora_B`, layers by diffusers' or by the original's names.

Distilled models are recognised by their layers: T2V-Turbo-MS by its guidance embedding, MCM by the layers it adapts.
Others say how they are sampled in the key `_t2v_distilled` of their adapter_config.json.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2v.checkpoints import pickles
from t2v.checkpoints.convert import renamed, unet_table
from t2v.checkpoints.folder import read_json, summary
from t2v.checkpoints.loading import materialised
from t2v.checkpoints.tensors import is_finite, read_tensors
from t2v.errors import WeightsError
from t2v.networks.layers import fuse_upsample_kernels
from t2v.networks.unet3d import GUIDANCE_EMBEDDING, TemporalConv, UNet3D

COND_PROJ = "time_embedding.cond_proj"
# diffusers' order of the denoiser's parts; the middle comes last but one.
ORDER = ("conv_in", "time_embedding", "transformer_in", "down_blocks", "up_blocks", "mid_block", "conv_out")
# Ends of the names of the layers that MCM adapts, except temporal convolutions.
MCM_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


LayerShapes = dict[str, tuple[int, ...]]
Factors = dict[str, tuple[Tensor, Tensor, float]]


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a denoiser.

    Attributes:
        name: name of its file, for logs.
        deltas: for each layer, by its name: up (c_out, r) and down (r, the rest of the weight's shape, flattened), both
            float32, and the factor of their product.
        family: name of the distilled model that it makes, "T2V-Turbo-MS" or "MCM"; None for others.
        recipe: content of `_t2v_distilled`; None if there is none.
    """

    name: str
    deltas: Factors
    family: str | None
    recipe: Mapping[str, Any] | None = None

    def delta(self, layer: str, device: torch.device | str = "cpu") -> Tensor:
        """The change of a layer's weight at scale 1, (c_out, the rest of the weight's shape, flattened) float32."""
        up, down, factor = self.deltas[layer]
        return factor * (up.to(device) @ down.to(device))


class MergedLora:
    """A LoRA that is added to the weights of a denoiser and removed again.

    Weights change in place: the parameters stay the same tensors, which CUDA graphs read.

    Args:
        scale: of the LoRA; 1 is as it was trained.
        apply: add the LoRA right away.

    Attributes:
        active: whether the LoRA is in the weights.
    """

    def __init__(self, unet: UNet3D, lora: Lora, scale: float = 1.0, apply: bool = True):
        self.unet = unet
        self.lora = lora
        self.scale = scale
        self.originals: dict[str, Tensor] = {}
        self.active = False
        if apply:
            self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Add the LoRA. The original weights are kept in the CPU's memory; they are put back if this fails."""
        if self.active:
            return
        self.remove()  # what a removal that failed has left
        try:
            if COND_PROJ in self.lora.deltas:
                self.unet.time_embedding.add_guidance()
            layers = dict(self.unet.named_modules())
            for name in self.lora.deltas:
                weight = materialised(layers[name])
                self.originals[name] = weight.detach().to("cpu", copy=True)
                delta = self.lora.delta(name, weight.device).view(weight.shape)
                weight.copy_(weight.float() + self.scale * delta)
            fuse_upsample_kernels(self.unet)
        except BaseException:
            self.remove()
            raise
        self.active = True

    @property
    def is_removed(self) -> bool:
        """Whether the weights are the original ones; neither this nor `active` holds after a removal that failed."""
        return not self.originals

    @torch.no_grad()
    def remove(self) -> None:
        """Put the original weights back, bit for bit. If it fails, the next `remove` or `apply` completes it."""
        if self.is_removed:
            return
        self.active = False
        layers = dict(self.unet.named_modules())
        for name, original in self.originals.items():
            if name in layers:
                materialised(layers[name]).copy_(original)
        if COND_PROJ in self.lora.deltas:
            self.unet.time_embedding.cond_proj = None
        fuse_upsample_kernels(self.unet)
        self.originals.clear()


def parse(text: str) -> tuple[Path, float]:
    """The path and the scale of `path[:scale]`, the form of T2V_LORA. The scale is 1 unless given.

    Raises:
        WeightsError: the scale is not finite.
    """
    path, colon, factor = text.rpartition(":")
    try:
        scale = float(factor) if colon else 1.0
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise WeightsError(f"The LoRA's scale must be a finite number, not {factor}.")
    return (Path(path), scale) if colon else (Path(text), 1.0)


def read(path: Path, unet: UNet3D) -> Lora:
    """Read a LoRA of a denoiser.

    Args:
        path: a PEFT folder, or a .safetensors, .pt, .pth or .bin file.

    Raises:
        WeightsError: it cannot be read, or a layer of it does not fit; the message names the layers and shapes.
    """
    if not path.exists():
        raise WeightsError(f"There is no LoRA {path}.")
    shapes = _layers(unet)
    if path.is_dir():
        found = _from_peft(path)
    elif path.suffix == ".safetensors":
        found = _from_names(read_tensors(path), shapes, unet, path)
    else:
        content = pickles.load(path)
        listed = isinstance(content, list)
        found = _from_list(content, shapes, path) if listed else _from_names(pickles.tensors(path), shapes, unet, path)
    wrong = [f"{name} is no layer of this model" for name in found if name not in shapes]
    deltas = {}
    for name, (up, down, factor) in found.items():
        if name not in shapes:
            continue
        up, down = up.float().flatten(1), down.float().flatten(1)
        size = torch.Size(shapes[name][1:]).numel()
        if up.shape != (shapes[name][0], down.shape[0]) or down.shape[1] != size:
            wrong.append(f"{name} has factors {tuple(up.shape)} and {tuple(down.shape)} for a weight {shapes[name]}")
        elif not (is_finite(up) and is_finite(down)):
            wrong.append(f"{name} holds values that are not finite")
        deltas[name] = (up, down, factor)
    if wrong:
        raise WeightsError(f"The LoRA {path} does not fit: {summary(wrong)}.")
    if not deltas:
        raise WeightsError(f"The LoRA {path} holds nothing for the denoiser.")
    family = None
    if COND_PROJ in deltas:
        family = "T2V-Turbo-MS"
    elif set(deltas) == _mcm_layers(shapes):
        family = "MCM"
    config = path / "adapter_config.json"
    return Lora(path.name, deltas, family, read_json(config).get("_t2v_distilled") if path.is_dir() else None)


def _layers(unet: UNet3D) -> LayerShapes:
    """Weight shape of every layer that a LoRA can name, in diffusers' order, with the guidance embedding."""
    shapes = {
        name: tuple(module.weight.shape)
        for part in ORDER
        for name, module in unet.get_submodule(part).named_modules(prefix=part)
        if isinstance(module, nn.Linear | nn.Conv2d | TemporalConv) and name != COND_PROJ
    }
    ordered = {}
    for name, shape in shapes.items():
        ordered[name] = shape
        if name == "time_embedding.linear_1":
            ordered[COND_PROJ] = (unet.config.block_out_channels[0], GUIDANCE_EMBEDDING)
    return ordered


def _mcm_layers(shapes: LayerShapes) -> set[str]:
    return {name for name in shapes if name.endswith(MCM_LAYERS) and not ("temp" in name and "conv" in name)}


def _from_peft(folder: Path) -> Factors:
    """A PEFT folder. Rank and alpha may differ from layer to layer."""
    config = read_json(folder / "adapter_config.json")
    for key, allowed in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(key, allowed) not in (allowed, None, []):
            raise WeightsError(f"{folder}/adapter_config.json: {key} = {config[key]!r} is not supported.")
    path = next((p for n in ("safetensors", "bin") if (p := folder / f"adapter_model.{n}").is_file()), None)
    if path is None:
        raise WeightsError(f"{folder} has no adapter_model.safetensors or adapter_model.bin.")
    state = read_tensors(path) if path.suffix == ".safetensors" else pickles.tensors(path)
    found = {}
    for name, (up, down, _) in _pairs(state, path).items():
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", down.shape[0]))
        rank = down.shape[0]
        found[name] = (up, down, alpha / (rank**0.5 if config.get("use_rslora") else rank))
    return found


def _pattern(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's value for one layer. A key of the pattern is the end of the layer's name."""
    return next((v for k, v in (pattern or {}).items() if name == k or name.endswith(f".{k}")), default)


def _from_names(state: Mapping[str, Tensor], shapes: LayerShapes, unet: UNet3D, path: Path) -> Factors:
    """Named tensors without a config, from Stable-LoRA or diffusers. The scale is alpha / rank, or 1 without alpha."""
    table = unet_table(unet.config.down_block_types, unet.config.layers_per_block)
    found = {}
    for name, (up, down, alpha) in _pairs(state, path).items():
        if name not in shapes:
            name = next(iter(renamed(name, table)), name)
        factor = float(alpha) / down.shape[0] if alpha is not None else 1.0
        shape = shapes.get(name, ())
        if (
            len(shape) > 2 and up.ndim == 2 and up.shape[0] != shape[0]
        ):  # Stable-LoRA's, with the kernel's sides in both factors
            up, down = _from_stable_lora(up, down, shape)
        found[name] = (up, down, factor)
    return found


def _from_stable_lora(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Stable-LoRA's factors of a convolution, (c_out k, r) and (r, c_in k), as factors of the flat weight.

    Stable-LoRA takes their product for the weight: k x k in two dimensions, k x k x 1 in three, of which it averages
    the second k. The returned factors are the identity and that weight.
    """
    c_out, c_in, k = shape[:3]
    product = (up.float() @ down.float()).view(c_out, c_in, k, k)
    weight = product if len(shape) == 4 else product.mean(-1)
    return torch.eye(c_out), weight.reshape(c_out, -1)


def _from_list(content: list[Any], shapes: LayerShapes, path: Path) -> Factors:
    """Unnamed tensors in diffusers' order. T2V-Turbo-MS has the guidance embedding; others do not."""
    plain = [name for name in shapes if name != COND_PROJ]
    names = plain if len(content) == 2 * len(plain) else list(shapes)
    if len(content) != 2 * len(names) or not all(isinstance(value, Tensor) for value in content):
        raise WeightsError(
            f"The LoRA {path} is a list of {len(content)} items; for this model it must be {2 * len(plain)} tensors, "
            f"or {2 * len(shapes)} with a guidance embedding."
        )
    return {name: (up, down, 1.0) for name, up, down in zip(names, content[::2], content[1::2])}


def _pairs(state: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """(up, down, alpha) of each layer, without the prefixes and suffixes that trainers add to the keys."""
    parts: dict[str, dict[str, Tensor]] = {"up": {}, "down": {}, "alpha": {}}
    kinds = {"lora_B": "up", "lora_up": "up", "lora_A": "down", "lora_down": "down", "alpha": "alpha"}
    strangers = []
    for key, value in state.items():
        name = key.removeprefix("base_model.model.").removeprefix("unet.")
        name, _, kind = name.removesuffix(".weight").removesuffix(".default").rpartition(".")
        if kind in kinds:
            parts[kinds[kind]][name] = value
        else:
            strangers.append(f"{key} is no part of a LoRA")
    strangers += [f"{name} has one of its two factors only" for name in parts["up"].keys() ^ parts["down"].keys()]
    if strangers:
        raise WeightsError(f"The LoRA {path} cannot be read: {summary(sorted(strangers))}.")
    return {name: (up, parts["down"][name], parts["alpha"].get(name)) for name, up in parts["up"].items()}
