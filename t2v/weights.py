"""Find a model's folder, check that it is whole, fill its networks.

A model is a folder in diffusers' layout: model_index.json, scheduler/, text_encoder/, tokenizer/, unet/, vae/, weights
as safetensors, with or without the `.fp16` infix.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from t2v.errors import WeightsError

CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "unet/config.json",
    "vae/config.json",
)
NETWORKS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
PIPELINES = ("TextToVideoSDPipeline", "TextToVideoMSPipeline")
INFIXES = ("", ".fp16")  # in the order of preference
# The autoencoder's attention, as files of before diffusers 0.18 name it.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def check(folder: Path) -> None:
    """Make sure that `folder` holds every file a model needs.

    Raises:
        WeightsError: it does not; the message names all that is missing at once.
    """
    if not folder.is_dir():
        raise WeightsError(f"There is no weights folder {folder}. The README, 'The 1.7B weights', says how to get one.")
    missing = [name for name in CONFIGS if not (folder / name).is_file()]
    missing += [f"{n}/{NETWORKS[n]}.safetensors" for n in NETWORKS if _find(folder, n) is None]
    if missing:
        raise WeightsError(f"The weights folder {folder} lacks: {', '.join(missing)}.")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise WeightsError(f"{folder}/model_index.json names a {kind}; this is not a text-to-video model.")


def load(module: nn.Module, folder: Path, network: str, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a module whose parameters are on the meta device: every one from the file, every tensor of the file used.

    Convolution weights end in channels-last memory, which the denoiser's and the decoder's activations have.

    Raises:
        WeightsError: the file cannot be read, or its tensors are not the module's.
    """
    path = _find(folder, network)
    assert path is not None, "check() comes first"
    try:
        state = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download it again.") from error
    expected = module.state_dict()
    names = {_common_name(key): key for key in expected}
    state = {names.get(_common_name(key), key): state[key] for key in state if not key.endswith(".position_ids")}
    wrong = [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in expected]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{path} does not fit {network}/config.json: {'; '.join(wrong[:5])}{more}.")
    for key, tensor in state.items():
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        memory_format = formats.get(tensor.ndim, torch.contiguous_format)
        state[key] = tensor.to(dtype=dtype, memory_format=memory_format)
    module.load_state_dict(state, strict=True, assign=True)
    module.to(device).eval().requires_grad_(False)  # what is not in the file, CLIP's position ids, moves here


def _common_name(key: str) -> str:
    """A parameter's name without the differences between versions of transformers and diffusers."""
    key = key.removeprefix("text_model.")
    for old, new in OLD_NAMES.items():
        key = key.replace(old, new)
    return key


def read_json(path: Path) -> dict[str, Any]:
    """A config file's content.

    Raises:
        WeightsError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a JSON object.")
    return content


def _find(folder: Path, network: str) -> Path | None:
    paths = [folder / network / f"{NETWORKS[network]}{infix}.safetensors" for infix in INFIXES]
    return next((path for path in paths if path.is_file()), None)
