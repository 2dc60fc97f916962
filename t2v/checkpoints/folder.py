"""A model's folder: check that it is complete, describe it in a manifest, write a new one.

A model is a folder in diffusers' layout: model_index.json, scheduler/, text_encoder/, tokenizer/, unet/, vae/, with
weights as safetensors, with or without the infix `.fp16`. Its manifest.json, if it has one, gives the size and the
SHA-256 digest of every file.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v.checkpoints.tensors import write_tensors
from t2v.errors import WeightsError

MANIFEST = "manifest.json"
VERIFIED = ".verified.json"  # size and modification time of the files whose digests were correct
MAX_HEADER = 10 * 2**20  # bytes of a safetensors header; that of the 1.7B denoiser has 0.2 MB
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
COMPONENTS = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet3DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PIPELINES = ("TextToVideoSDPipeline", "TextToVideoMSPipeline")
INFIXES = ("", ".fp16")  # in the order of preference


@dataclass(frozen=True)
class NetworkFiles:
    """One network as `write_model` writes it.

    Attributes:
        name: "unet", "vae" or "text_encoder".
        config: content of its config.json.
        shapes: shape of each parameter by its name; the names are those of the network of this package.
        tensor: returns the parameter of a name, of any dtype and device.
    """

    name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tensor: Callable[[str], Tensor]

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> "NetworkFiles":
        """A network whose tensors are in memory."""
        return cls(name, config, {key: tuple(value.shape) for key, value in state.items()}, state.__getitem__)


def write_model(
    folder: Path,
    networks: Iterable[NetworkFiles],
    scheduler: Mapping[str, Any],
    tokenizer: Path,
    *,
    dtype: torch.dtype = torch.float16,
    infix: str = "",
    index: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's folder that this package and diffusers load. Existing files are replaced.

    Args:
        networks: the three networks, taken one after the other.
        scheduler: content of scheduler_config.json.
        tokenizer: folder with CLIP's vocabulary.
        dtype: of the written weights.
        infix: between the name of a weights file and its ending, "" or ".fp16".
        index: further keys of model_index.json, such as `_t2v_name`.
    """
    for network in networks:
        write_network(folder, network, dtype, infix)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if tokenizer.resolve() != (folder / "tokenizer").resolve():
        shutil.copytree(tokenizer, folder / "tokenizer", copy_function=shutil.copyfile, dirs_exist_ok=True)
    write_json(folder / "model_index.json", {"_class_name": PIPELINES[0], **COMPONENTS, **(index or {})})


def write_network(folder: Path, network: NetworkFiles, dtype: torch.dtype, infix: str = "") -> None:
    """One network's config and weights, tensor by tensor."""
    prefix = "text_model." if network.name == "text_encoder" else ""  # version 4 of transformers needs it
    shapes = {prefix + key.removeprefix(prefix): shape for key, shape in network.shapes.items()}
    names = {prefix + key.removeprefix(prefix): key for key in network.shapes}
    write_json(folder / network.name / "config.json", network.config)
    path = folder / network.name / f"{NETWORKS[network.name]}{infix}.safetensors"
    write_tensors(path, shapes, dtype, lambda name: network.tensor(names[name]).to("cpu", dtype))


def check(folder: Path, verify: bool = False) -> None:
    """Make sure that `folder` holds every file that a model needs, and that the files match its manifest.

    A digest is computed once: while a file keeps its size and its modification time, a restart does not compute it.

    Args:
        verify: compute every digest, also of files that were correct before.

    Raises:
        WeightsError: the message names everything that is wrong, and the command that repairs it.
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
            with contextlib.suppress(WeightsError):  # missing or broken: the digests are computed again
                known = read_json(folder / VERIFIED)
        before = dict(known)
        wrong += compare(folder, manifest["files"], known)
        if known != before:
            _save_verified(folder, known)
    if wrong:
        raise WeightsError(f"The weights folder {folder} is not complete: {summary(wrong)}. To repair it: {repair}")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise WeightsError(f"{folder}/model_index.json names a {kind}; this is not a text-to-video model.")


def compare(folder: Path, files: Mapping[str, Mapping[str, Any]], known: dict[str, Any] | None = None) -> list[str]:
    """Compare the files of a folder with a description; returns one phrase for each difference.

    Args:
        files: "bytes" and, if known, "sha256" of each file by its name.
        known: fingerprints of the files that were correct before, by name. Such files are not read again. Updated.
    """
    known = {} if known is None else known
    wrong = []
    unverified = {}
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}")
        elif expected.get("sha256") and known.get(name) != _fingerprint(path, expected["sha256"]):
            unverified[name] = expected["sha256"]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        for (name, expected_digest), found in zip(
            unverified.items(), pool.map(digest, (folder / name for name in unverified))
        ):
            if found == expected_digest:
                known[name] = _fingerprint(folder / name, found)
            else:
                known.pop(name, None)
                wrong.append(f"{name} is damaged (its SHA-256 is not the manifest's)")
    return wrong


def write_manifest(folder: Path, repair: str) -> None:
    """Describe every file of a folder in its manifest; `repair` is the command that makes the folder again."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, VERIFIED))
    files: dict[str, dict[str, Any]] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths
    }
    write_json(folder / MANIFEST, {"repair": repair, "files": files})
    _save_verified(folder, {name: _fingerprint(folder / name, entry["sha256"]) for name, entry in files.items()})


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(folder: Path, network: str, pickles: bool = False) -> Path | None:
    """The weights file of a network, if the folder has one; with `pickles` also one that must be converted first."""
    paths = [folder / network / f"{NETWORKS[network]}{infix}.safetensors" for infix in INFIXES]
    if pickles:
        stem = NETWORKS[network] if network != "text_encoder" else "pytorch_model"
        paths += [folder / network / f"{stem}{infix}.bin" for infix in INFIXES]
    return next((path for path in paths if path.is_file()), None)


def summary(phrases: list[str]) -> str:
    """The first five phrases, and how many more there are."""
    return "; ".join(phrases[:5]) + (f"; and {len(phrases) - 5} more" if len(phrases) > 5 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a config file.

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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a config file; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _header_problem(path: Path) -> str | None:
    """Why a file is no safetensors file. Checked before anything reads a header of the size that the file claims."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    name = f"{path.parent.name}/{path.name}"
    if length > path.stat().st_size - 8:
        return f"{name} was cut short or is no safetensors file"
    return f"{name} has a header of {length:,} bytes, which no real model has" if length > MAX_HEADER else None


def _save_verified(folder: Path, known: dict[str, Any]) -> None:
    """Save which files were correct. A folder that cannot be written is read again at the next start."""
    with contextlib.suppress(OSError):
        (folder / f"{VERIFIED}.new").write_text(json.dumps(known))
        os.replace(folder / f"{VERIFIED}.new", folder / VERIFIED)


def _fingerprint(path: Path, sha256: str) -> list[Any]:
    """Shows whether a file is still the one whose digest was computed."""
    return [path.stat().st_size, path.stat().st_mtime_ns, sha256]
