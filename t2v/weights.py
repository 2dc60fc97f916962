"""Find a model's folder, check that it is whole, fill its networks.

A model is a folder in diffusers' layout: model_index.json, scheduler/, text_encoder/, tokenizer/, unet/, vae/, weights
as safetensors, with or without the `.fp16` infix. Its manifest.json, if it has one, says how large every file is and
what its SHA-256 digest is.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2v.convolution import fold
from t2v.errors import WeightsError
from t2v.networks import empty

MANIFEST = "manifest.json"
VERIFIED = ".verified.json"  # size and time of change of the files whose digests were found right
MAX_HEADER = 10 * 2**20  # bytes of a safetensors header; the 1.7B denoiser's has 0.2 MB
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
# Values of the tensors that stay as their file has them, where that is exact. To fill memory with the wide values of
# all of them at the start takes seconds; to widen one at every use is little beside the use. Wide values of more than
# 32 MB would each time be new memory, since glibc's malloc keeps no larger block.
KEPT = range(2**20, 2**23)
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check(folder: Path, verify: bool = False) -> None:
    """Make sure that `folder` holds every file a model needs, and that the files are what its manifest says.

    A digest is computed once: as long as a file keeps its size and its time of change, a restart does not compute it.

    Args:
        verify: compute every digest, whatever was found before.

    Raises:
        WeightsError: the message names all that is wrong at once, and what repairs it.
    """
    if not folder.is_dir():
        raise WeightsError(f"There is no weights folder {folder}. To get one: t2v weights download")
    missing = [name for name in CONFIGS if not (folder / name).is_file()]
    pickles = [n for n in NETWORKS if find(folder, n) is None and find(folder, n, pickles=True)]
    missing += [f"{n}/{NETWORKS[n]}.safetensors" for n in NETWORKS if find(folder, n) is None and n not in pickles]
    wrong = [f"it lacks {', '.join(missing)}"] if missing else []
    repair = f"t2v weights download {folder}"
    if pickles:
        wrong.append(f"the weights of {', '.join(pickles)} are pickles, which are not loaded")
        repair = f"t2v weights convert {folder} NEW_FOLDER"
    wrong += [problem for n in NETWORKS if (path := find(folder, n)) and (problem := _header_problem(path))]
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        repair = manifest.get("repair", repair)
        known: dict[str, Any] = {}
        if not verify:
            with contextlib.suppress(WeightsError):  # not there, or not whole: the digests are computed again
                known = read_json(folder / VERIFIED)
        before = dict(known)
        wrong += compare(folder, manifest["files"], known)
        if known != before:
            _remember(folder, known)
    if wrong:
        raise WeightsError(f"The weights folder {folder} is not whole: {some(wrong)}. To repair it: {repair}")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise WeightsError(f"{folder}/model_index.json names a {kind}; this is not a text-to-video model.")


def compare(folder: Path, files: Mapping[str, Mapping[str, Any]], known: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with the files of a folder, a phrase for each; see `check`.

    Args:
        files: by name, their "bytes" and, where it is known, their "sha256".
        known: what was found right before, by name; such files are not read again. Brought up to date.
    """
    known = {} if known is None else known
    wrong = []
    doubtful = {}
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}")
        elif expected.get("sha256") and known.get(name) != _state(path, expected["sha256"]):
            doubtful[name] = expected["sha256"]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        for (name, expected_digest), found in zip(
            doubtful.items(), pool.map(digest, (folder / name for name in doubtful))
        ):
            if found == expected_digest:
                known[name] = _state(folder / name, found)
            else:
                known.pop(name, None)
                wrong.append(f"{name} is damaged (its SHA-256 is not the manifest's)")
    return wrong


def write_manifest(folder: Path, repair: str) -> None:
    """Describe every file of a folder in its manifest; `repair` is the command that makes the folder anew."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, VERIFIED))
    files: dict[str, dict[str, Any]] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps({"repair": repair, "files": files}, indent=2) + "\n")
    _remember(folder, {name: _state(folder / name, entry["sha256"]) for name, entry in files.items()})


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(module: nn.Module, folder: Path, network: str, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a module whose parameters are on the meta device: every one from the file, every tensor of the file used.

    Convolution weights end in channels-last memory, which the denoiser's and the decoder's activations have. On the
    CPU, most of a large half-precision file stays what it is and is widened where it is used (see `Widened`).

    Raises:
        WeightsError: the file cannot be read, its tensors are not the module's, or they are not finite.
    """
    path = find(folder, network)
    assert path is not None, "check() comes first"
    found = read(path, device)
    expected = module.state_dict()
    names = {common_name(key): key for key in expected}
    state: dict[str, Tensor] = {}
    wrong = []
    for key in [key for key in found if not key.endswith(".position_ids")]:
        name = names.get(common_name(key), key)
        wrong += [f"{key} is there twice, under an old name too"] if name in state else []
        state[name] = found.pop(key)
    wrong += [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in expected]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if wrong:
        raise WeightsError(f"{path} does not fit {network}/config.json: {some(wrong)}; download it again.")
    kept = []
    for key, tensor in state.items():
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        memory_format = formats.get(tensor.ndim, torch.contiguous_format)
        if not finite(tensor, dtype):
            wrong.append(f"{key} holds values that are not finite in {dtype}")
        exact = torch.promote_types(tensor.dtype, dtype) == dtype != tensor.dtype
        if exact and tensor.numel() in KEPT and device.type == "cpu":
            kept.append(key)
        state[key] = tensor.to(dtype=tensor.dtype if key in kept else dtype, memory_format=memory_format)
    if wrong:
        raise WeightsError(f"{path} is not usable: {some(wrong)}; download it again.")
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
    for key in kept:
        layer, _, name = key.rpartition(".")
        owner, widened = module.get_submodule(layer), Widened(dtype)
        if isinstance(owner, nn.Embedding):  # the rows that were looked up, not the whole table
            owner.register_forward_hook(lambda owner, ids, rows, widened=widened: widened(rows))
        else:
            parametrize.register_parametrization(owner, name, widened, unsafe=True)


def load_networks(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The three networks of a model's folder, by name.

    Raises:
        WeightsError: names everything that is wrong with any of them.
    """
    networks: dict[str, Any] = {}
    wrong = []
    for name in NETWORKS:
        try:
            networks[name] = empty(name, read_json(folder / name / "config.json"))
            load(networks[name], folder, name, device, dtype)
            fold(networks[name])
        except WeightsError as error:
            wrong.append(str(error))
    if wrong:
        raise WeightsError(" ".join(wrong))
    return networks


class Widened(nn.Module):
    """Makes of a parameter, whenever it is read, what is computed with: the same values in a wider dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, kept: Tensor) -> Tensor:
        return kept.to(self.dtype)


def writable(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter whose values can be changed: of what is widened at every use, the wide values from now on."""
    if parametrize.is_parametrized(module, name):
        value = getattr(module, name)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    parameter = getattr(module, name)
    assert isinstance(parameter, nn.Parameter)
    return parameter


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file; on the CPU they are mapped from the disk.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download it again.") from error


def save(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensor: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file one tensor at a time, so that memory holds one; equal tensors make equal files.

    Args:
        shapes: of the tensors by name.
        tensor: called with each name in turn; of that shape, in `dtype`, on the CPU.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + torch.Size(shapes[name]).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            file.write(tensor(name).contiguous().flatten().view(torch.uint8).numpy().data)


def finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor holds neither infinities nor NaN, nor what would be one in `dtype`; one pass without a copy."""
    most = torch.finfo(dtype or tensor.dtype).max
    low, high = tensor.aminmax()  # either is NaN where one value is
    return bool((low >= -most) & (high <= most))


def common_name(key: str) -> str:
    """A parameter's name without the differences between versions of transformers and diffusers."""
    key = key.removeprefix("text_model.")
    for old, new in OLD_NAMES.items():
        key = key.replace(old, new)
    return key


def find(folder: Path, network: str, pickles: bool = False) -> Path | None:
    """The weights file of a network, if the folder has one; with `pickles` also one that must be converted first."""
    paths = [folder / network / f"{NETWORKS[network]}{infix}.safetensors" for infix in INFIXES]
    if pickles:
        stem = NETWORKS[network] if network != "text_encoder" else "pytorch_model"
        paths += [folder / network / f"{stem}{infix}.bin" for infix in INFIXES]
    return next((path for path in paths if path.is_file()), None)


def some(wrong: list[str]) -> str:
    """The first five of a list of phrases, and how many more there are."""
    return "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")


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


def _header_problem(path: Path) -> str | None:
    """What makes a file no safetensors file, before anything reads a header of the size it claims to have."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    name = f"{path.parent.name}/{path.name}"
    if length > path.stat().st_size - 8:
        return f"{name} was cut short or is no safetensors file"
    return f"{name} has a header of {length:,} bytes, which no real model has" if length > MAX_HEADER else None


def _remember(folder: Path, known: dict[str, Any]) -> None:
    """Keep what was found right; a folder that cannot be written to is read again at the next start."""
    with contextlib.suppress(OSError):
        (folder / f"{VERIFIED}.new").write_text(json.dumps(known))
        os.replace(folder / f"{VERIFIED}.new", folder / VERIFIED)


def _state(path: Path, sha256: str) -> list[Any]:
    """What tells whether a file is still the one whose digest was computed."""
    return [path.stat().st_size, path.stat().st_mtime_ns, sha256]
