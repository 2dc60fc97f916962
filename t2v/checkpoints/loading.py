"""Loads the networks of a model's folder onto a device."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2v.checkpoints.folder import NETWORKS, find, read_json, summary
from t2v.checkpoints.tensors import canonical_name, is_finite, read_tensors
from t2v.errors import WeightsError
from t2v.networks.build import build_on_meta
from t2v.networks.layers import fuse_upsample_kernels

# Sizes (numbers of values) of the tensors that stay in half precision on a CPU, where widening them is exact. Widening
# all tensors at the start takes seconds; widening one tensor at each use takes little beside the use itself. Wide
# values of more than 32 MB would need new memory each time, because glibc's malloc keeps no larger block.
KEEP_HALF_SIZES = range(2**20, 2**23)


def load_networks(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The three networks of a model's folder, by name.

    Raises:
        WeightsError: names everything that is wrong with any of them.
    """
    networks: dict[str, Any] = {}
    wrong = []
    for name in NETWORKS:
        try:
            networks[name] = build_on_meta(name, read_json(folder / name / "config.json"))
            load_weights(networks[name], folder, name, device, dtype)
            fuse_upsample_kernels(networks[name])
        except WeightsError as error:
            wrong.append(str(error))
    if wrong:
        raise WeightsError(" ".join(wrong))
    return networks


def load_weights(module: nn.Module, folder: Path, network: str, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a module whose parameters are on the meta device: every parameter from the file, every tensor used.

    Convolution weights are stored channels-last, like the activations of the denoiser and the decoder. On a CPU, most
    of a large half-precision file stays in half precision and is widened at each use (see `UpcastOnRead`).

    Raises:
        WeightsError: the file cannot be read, its tensors are not the module's, or they are not finite.
    """
    path = find(folder, network)
    assert path is not None, "check() comes first"
    found = read_tensors(path, device)
    expected = module.state_dict()
    names = {canonical_name(key): key for key in expected}
    state: dict[str, Tensor] = {}
    wrong = []
    for key in [key for key in found if not key.endswith(".position_ids")]:
        name = names.get(canonical_name(key), key)
        wrong += [f"{key} occurs twice, also under an old name"] if name in state else []
        state[name] = found.pop(key)
    wrong += [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in expected]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if wrong:
        raise WeightsError(f"{path} does not fit {network}/config.json: {summary(wrong)}; download it again.")
    kept = []
    for key, tensor in state.items():
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        memory_format = formats.get(tensor.ndim, torch.contiguous_format)
        if not is_finite(tensor, dtype):
            wrong.append(f"{key} holds values that are not finite in {dtype}")
        is_exact = torch.promote_types(tensor.dtype, dtype) == dtype != tensor.dtype
        if is_exact and tensor.numel() in KEEP_HALF_SIZES and device.type == "cpu":
            kept.append(key)
        state[key] = tensor.to(dtype=tensor.dtype if key in kept else dtype, memory_format=memory_format)
    if wrong:
        raise WeightsError(f"{path} is not usable: {summary(wrong)}; download it again.")
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
    for key in kept:
        layer, _, name = key.rpartition(".")
        owner, upcast = module.get_submodule(layer), UpcastOnRead(dtype)
        if isinstance(owner, nn.Embedding):  # the rows that were looked up, not the complete table
            owner.register_forward_hook(lambda owner, ids, rows, upcast=upcast: upcast(rows))
        else:
            parametrize.register_parametrization(owner, name, upcast, unsafe=True)


class UpcastOnRead(nn.Module):
    """Returns a parameter's values in a wider dtype whenever it is read."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, kept: Tensor) -> Tensor:
        return kept.to(self.dtype)


def materialised(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter whose values can be changed. If it was widened at each use, it holds the wide values from now on."""
    if parametrize.is_parametrized(module, name):
        value = getattr(module, name)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    parameter = getattr(module, name)
    assert isinstance(parameter, nn.Parameter)
    return parameter
