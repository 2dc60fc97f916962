"""The model as a whole: a request in, frames out."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2v import weights
from t2v.errors import InvalidRequest, WeightsError
from t2v.graph import Graphs
from t2v.networks import empty
from t2v.request import Request
from t2v.sampler import Schedule, Solver, denoise, guided, update
from t2v.text import Text, load_tokenizer
from t2v.unet3d import UNet3D
from t2v.upsample import fold
from t2v.vae import VAE

Progress = Callable[[str, int, int], None]


class Engine:
    """Text encoder, denoiser, autoencoder and schedule of one model.

    Attributes:
        native_size: (height, width) in pixels the model was trained at.
        name: of the model, for logs and files.
        about: what the model can show, one sentence; empty where its index does not say.
        guidance_scale: for requests that leave it to the model.
    """

    def __init__(
        self,
        text: Text,
        unet: UNet3D,
        vae: VAE,
        schedule: Schedule,
        native_size: tuple[int, int],
        name: str = "model",
        about: str = "",
        guidance_scale: float = 9.0,
        solver: Solver = "dpm++",
    ):
        self.text = text
        self.unet = unet
        self.vae = vae
        self.schedule = schedule
        self.native_size = native_size
        self.name = name
        self.about = about
        self.guidance_scale = guidance_scale
        self.solver: Solver = solver
        self.step = Graphs(self._step) if text.encoder.device.type == "cuda" else self._step

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", dtype: str = "auto", verify: bool = False) -> "Engine":
        """Load a model from a folder in diffusers' layout.

        Args:
            device: "cpu", "cuda", "cuda:1"; "auto" is CUDA where there is one.
            dtype: "float32", "float16", "bfloat16"; "auto" is float16 on CUDA, float32 elsewhere.
            verify: read every file again to compare it with the manifest, whatever was found before.

        Raises:
            WeightsError: the folder is not a whole model of this family, or the device or dtype does not exist.
        """
        folder = Path(folder)
        where, precision = _device(device), _dtype(dtype, device)
        weights.check(folder, verify)
        index = weights.read_json(folder / "model_index.json")
        configs = {network: weights.read_json(folder / network / "config.json") for network in weights.NETWORKS}
        networks: dict[str, Any] = {}
        wrong = []
        for network, config in configs.items():
            try:
                networks[network] = empty(network, config)
                weights.load(networks[network], folder, network, where, precision)
                fold(networks[network])
            except WeightsError as error:
                wrong.append(str(error))
        if wrong:
            raise WeightsError(" ".join(wrong))
        unet: UNet3D = networks["unet"]
        text = Text(load_tokenizer(str(folder / "tokenizer")), networks["text_encoder"])
        vae = VAE(networks["vae"])
        if (
            unet.config.in_channels != vae.channels
            or unet.config.cross_attention_dim != text.encoder.config.hidden_size
        ):
            raise WeightsError(f"{folder}: the networks do not belong together; their widths differ.")
        return cls(
            text,
            unet,
            vae,
            Schedule.from_config(weights.read_json(folder / "scheduler" / "scheduler_config.json")),
            native_size=_pair(configs["unet"].get("sample_size"), vae.factor),
            name=index.get("_t2v_name", folder.resolve().name),
            about=index.get("_t2v_about", ""),
            guidance_scale=index.get("_t2v_guidance_scale", 9.0),
        )

    def generate(self, request: Request, progress: Progress = lambda stage, done, total: None) -> Iterator[np.ndarray]:
        """Make the frames of a video.

        Denoising runs before this returns; decoding runs as the frames are taken.

        Args:
            progress: called with (stage, done, total) as each of "text", "denoise" (per step) and "decode" (per frame)
                goes on.

        Returns:
            An iterator of (n, H, W, 3) uint8 RGB arrays, request.num_frames frames in all.

        Raises:
            InvalidRequest: the size does not suit this model.
        """
        latents = self.denoised(request, progress)
        return self._decoded(latents, progress)

    @torch.inference_mode()
    def denoised(self, request: Request, progress: Progress = lambda stage, done, total: None) -> Tensor:
        """(1, channels, F, h, w) float32 clean latents of a request; `generate` without the decoding."""
        steps = self.schedule.steps(self.solver, request.num_inference_steps)
        noise = self.noise(request)
        scale = self.guidance(request)
        condition = self.unet.condition(self.text.encode([request.prompt]))
        if scale != 1:
            condition = torch.cat([self._unconditional, condition])
        progress("text", 1, 1)
        # What the steps differ in, on the device before the first one: inside the loop the host waits for nothing.
        moments = self.unet.moments(torch.tensor([step.t for step in steps], device=noise.device))
        coefficients = torch.tensor([step.coefficients for step in steps], dtype=torch.float64, device=noise.device)
        guidance = torch.tensor(scale, device=noise.device)

        def advance(i: int, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
            x, x_0 = self.step(x, previous, moments[i : i + 1], condition, guidance, coefficients[i])
            return x, x_0

        return denoise(advance, noise, len(steps), lambda done, total: progress("denoise", done, total))

    def _step(
        self, x: Tensor, previous: Tensor, moment: Tensor, condition: Tensor, guidance: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, ...]:
        """One denoising step, of tensors alone: network, guidance, update. In float32 around the network."""
        prediction = self.unet.run(x.to(moment.dtype), moment, condition).float()
        if len(condition) == 2:
            prediction = guided(prediction, guidance)
        return update(x, previous, prediction, coefficients)

    def warm_up(self) -> None:
        """Pay now what the first request would pay: libraries, algorithms and, on CUDA, the recording of the default
        shape. Elsewhere one small frame will do."""
        small: dict[str, Any] = {} if isinstance(self.step, Graphs) else {"num_frames": 1, "width": 16, "height": 16}
        for _ in self.generate(Request(num_inference_steps=1, seed=0, **small)):
            pass

    def noise(self, request: Request) -> Tensor:
        """(1, channels, F, h, w) float32 unit normal, drawn on the CPU: one seed, one noise, on every device."""
        height, width = self.size(request)
        shape = (1, self.vae.channels, request.num_frames, height // self.vae.factor, width // self.vae.factor)
        generator = torch.Generator().manual_seed(int(request.seed or 0))
        return torch.randn(shape, generator=generator).to(self.text.encoder.device)

    def size(self, request: Request) -> tuple[int, int]:
        """(height, width) in pixels of the video the request asks for."""
        height, width = request.height or self.native_size[0], request.width or self.native_size[1]
        if height % self.vae.factor or width % self.vae.factor:
            raise InvalidRequest(f"width and height must be multiples of {self.vae.factor}, not {width}x{height}.")
        return height, width

    def guidance(self, request: Request) -> float:
        """Guidance scale of a request."""
        return self.guidance_scale if request.guidance_scale is None else request.guidance_scale

    def describe(self) -> str:
        """The model's name and what it can show, one line."""
        return f"{self.name}. {self.about}" if self.about else self.name

    def metadata(self, request: Request) -> dict[str, Any]:
        """What a file made from the request should say about itself, as JSON values."""
        height, width = self.size(request)
        settled = {"width": width, "height": height, "guidance_scale": self.guidance(request), "model": self.name}
        return dataclasses.asdict(request) | settled

    @functools.cached_property
    def _unconditional(self) -> Tensor:
        """What the denoiser reads from the empty prompt; computed at the first guided request."""
        return self.unet.condition(self.text.encode([""]))

    def _decoded(self, latents: Tensor, progress: Progress) -> Iterator[np.ndarray]:
        done = 0
        for frames in self.vae.decode(latents):
            done += len(frames)
            progress("decode", done, latents.shape[2])
            yield frames


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WeightsError(f"There is no device {name!r}; use auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise WeightsError(f"The device {name!r} was asked for, but torch finds no CUDA here; use auto or cpu.")
    return device


def _dtype(name: str, device: str) -> torch.dtype:
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.float16 if _device(device).type == "cuda" else torch.float32
    if name not in names:
        raise WeightsError(f"There is no dtype {name!r}; use auto, {', '.join(names)}.")
    return names[name]


def _pair(sample_size: Any, factor: int) -> tuple[int, int]:
    """(height, width) in pixels from a config's sample_size in latents, one number or two."""
    if isinstance(sample_size, int):
        sample_size = (sample_size, sample_size)
    if not (isinstance(sample_size, list | tuple) and len(sample_size) == 2):
        raise WeightsError(f"unet/config.json: sample_size {sample_size!r} is not a size in latents.")
    return sample_size[0] * factor, sample_size[1] * factor
