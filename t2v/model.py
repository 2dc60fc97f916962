"""One loaded model: its networks, its schedule, and what the rules need to know about it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2v.checkpoints.folder import check, read_json
from t2v.checkpoints.loading import load_networks
from t2v.checkpoints.lora import Lora, MergedLora, parse, read
from t2v.device import DeviceProfile, select_device, select_dtype
from t2v.errors import WeightsError
from t2v.job import ModelInfo, Pass
from t2v.networks.prompt_encoder import PromptEncoder, load_tokenizer
from t2v.networks.unet3d import UNet3D
from t2v.networks.vae import VAE
from t2v.sampling.denoiser import Denoiser, Function, GuidedNetwork
from t2v.sampling.distilled import RECIPES, DistilledSampling, GuidanceRange
from t2v.sampling.noise import noise_stream
from t2v.sampling.recording import LaunchThrottle, RecordedFunction
from t2v.sampling.schedule import Schedule
from t2v.sampling.solvers import OnStep, sample, solver_steps

TURBO_FOLDER = "turbo"  # of a model folder: a LoRA in PEFT's format for preset turbo
LARGE_UNET_PARAMETERS = 10**8  # from here on a step on a CPU takes longer than recording it is worth


class Model:
    """Text encoder, denoiser, autoencoder and schedule, on one device.

    Args:
        lora: a LoRA in the denoiser's weights.
        compile: run the denoiser through torch.compile.
    """

    def __init__(
        self,
        text: PromptEncoder,
        unet: UNet3D,
        vae: VAE,
        schedule: Schedule,
        info: ModelInfo,
        lora: MergedLora | None = None,
        compile: bool = False,
    ):
        self.text = text
        self.unet = unet
        self.vae = vae
        self.schedule = schedule
        self.info = info
        self.lora = lora
        self.profile = DeviceProfile.of(self.device)
        self.network = torch.compile(unet.forward_projected, dynamic=False) if compile else unet.forward_projected
        guided = GuidedNetwork(self.network)
        self.step = RecordedFunction(guided.step, min_calls=self.profile.min_calls_to_record)
        self.predict = RecordedFunction(guided.predict, min_calls=self.profile.min_calls_to_record)
        self._empty_prompt_kv: Tensor | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        verify: bool = False,
        lora: str | None = None,
        compile: bool = False,
    ) -> "Model":
        """Load a model from a folder in diffusers' layout; see `Engine.load` for the arguments.

        Raises:
            WeightsError: the folder is not a complete model of this family, or the device or dtype does not exist.
        """
        folder = Path(folder)
        on = select_device(device)
        precision = select_dtype(dtype, on)
        check(folder, verify)
        networks = load_networks(folder, on, precision)
        unet: UNet3D = networks["unet"]
        profile = DeviceProfile.of(on)
        text = PromptEncoder(load_tokenizer(folder / "tokenizer"), networks["text_encoder"])
        vae = VAE(networks["vae"], profile.chunk_pixels, profile.is_asynchronous)
        text_width = text.encoder.config.hidden_size
        if unet.config.in_channels != vae.channels or unet.config.cross_attention_dim != text_width:
            raise WeightsError(f"{folder}: the networks do not belong together; their widths differ.")
        merged = None
        bundled = folder / TURBO_FOLDER
        if lora:
            path, scale = parse(lora)
            merged = MergedLora(unet, read(path, unet), scale)
        elif bundled.is_dir():
            merged = MergedLora(unet, read(bundled, unet), apply=False)
            if _distilled(merged.lora) is None:
                raise WeightsError(f"{bundled} is not a few-step LoRA: its adapter_config.json lacks _t2v_distilled.")
        schedule = Schedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        info = _info(folder, vae, merged, prefers_distilled=bool(lora))
        return cls(text, unet, vae, schedule, info, merged, compile)

    @property
    def device(self) -> torch.device:
        return self.text.device

    @torch.inference_mode()
    def text_kv(self, prompts: Sequence[str], negative_prompt: str | None) -> Tensor:
        """Keys and values of the text, (prompts, rows, 77, d), which all steps of a request read.

        Args:
            negative_prompt: the text of row 0 with guidance, "" for the empty prompt; None for one row without.
        """
        text_kv = self.unet.project_text(self.text.encode(list(prompts)))[:, None]
        if negative_prompt is None:
            return text_kv
        if negative_prompt:
            unconditional = self.unet.project_text(self.text.encode([negative_prompt]))
        else:
            if self._empty_prompt_kv is None:
                self._empty_prompt_kv = self.unet.project_text(self.text.encode([""]))
            unconditional = self._empty_prompt_kv
        return torch.cat([unconditional.expand(len(text_kv), 1, -1, -1), text_kv], dim=1)

    def use_lora(self, active: bool) -> None:
        """Add the LoRA to the weights or remove it, and drop everything that was computed with the other weights."""
        if self.lora is None or (self.lora.active if active else self.lora.is_removed):
            return
        self._empty_prompt_kv = None
        self.step.invalidate()
        self.predict.invalidate()
        self.lora.apply() if active else self.lora.remove()

    @torch.inference_mode()
    def denoise(
        self, pass_: Pass, text_kv: Tensor, x_0: Tensor | None, guidance_rows_at_once: int, on_step: OnStep
    ) -> Tensor:
        """(1, C, F, h, w) float32 clean latents of a pass.

        Args:
            text_kv: see `text_kv`.
            x_0: clean latents to start from, of the same shape; None starts from noise alone.
            guidance_rows_at_once: 1 or 2.
            on_step: called with (steps done, steps in total, x_0 as it is predicted then) after each step.
        """
        sampling = pass_.sampling
        steps = solver_steps(self.schedule, sampling.solver, sampling.num_steps, pass_.first_step, sampling.distilled)
        is_asynchronous = self.profile.is_asynchronous
        noise = noise_stream(pass_.timeline, pass_.latent_shape, pass_.seed, self.device, is_asynchronous)
        x = next(noise)
        if x_0 is not None and pass_.first_step:
            x = self.schedule.add_noise(x_0, x, steps[0].t)
        timesteps = torch.tensor([step.t for step in steps], device=self.device)
        terms = self.unet.project_timesteps(timesteps, sampling.embedded_guidance)
        predict, step = self._step_functions(guidance_rows_at_once)
        denoiser = Denoiser(predict, step, text_kv, terms, sampling.guidance_scale, steps, pass_.timeline, noise)
        self.step.upcoming_calls = self.predict.upcoming_calls = denoiser.num_network_calls
        throttle = LaunchThrottle(self.device)

        def on_step_issued(done: int, total: int, x_0: Tensor) -> None:
            throttle.step_issued()
            on_step(done, total, x_0)

        return sample(denoiser, x, len(steps), on_step_issued)

    def _step_functions(self, guidance_rows_at_once: int) -> tuple[Function, Function]:
        """`predict` and `step` of `GuidedNetwork`: recorded where both guidance rows are computed together."""
        if guidance_rows_at_once > 1:
            return self.predict, self.step
        guided = GuidedNetwork(self.network, guidance_rows_at_once)
        return guided.predict, guided.step

    def drop_recordings(self) -> None:
        """Give up all recordings and their memory."""
        self.step.clear()
        self.predict.clear()

    @property
    def has_recordings(self) -> bool:
        return bool(self.step.recordings or self.predict.recordings)

    @property
    def is_slow_to_record(self) -> bool:
        """Whether recording a step takes longer than a request gains: with a large network on a CPU."""
        size = sum(p.numel() for p in self.unet.parameters())
        return not self.profile.is_asynchronous and size > LARGE_UNET_PARAMETERS


def _distilled(lora: Lora) -> DistilledSampling | None:
    """How to sample with a LoRA; None for a plain one."""
    if lora.recipe is None:
        return RECIPES.get(lora.family or "")
    recipe = dict(lora.recipe)
    try:
        if recipe.get("embedded_guidance"):
            recipe["embedded_guidance"] = GuidanceRange(**recipe["embedded_guidance"])
        distilled = DistilledSampling(**recipe)
    except TypeError as error:
        raise WeightsError(f"The LoRA {lora.name}: _t2v_distilled in adapter_config.json is wrong: {error}.") from error
    if distilled.solver not in ("lcm", "ddim"):
        raise WeightsError(f"The LoRA {lora.name}: its solver must be lcm or ddim, not {distilled.solver!r}.")
    return distilled


def _info(folder: Path, vae: VAE, merged: MergedLora | None, prefers_distilled: bool) -> ModelInfo:
    index = read_json(folder / "model_index.json")
    sample_size = read_json(folder / "unet" / "config.json").get("sample_size")
    if isinstance(sample_size, int):
        sample_size = (sample_size, sample_size)
    if not (isinstance(sample_size, list | tuple) and len(sample_size) == 2):
        raise WeightsError(f"unet/config.json: sample_size {sample_size!r} is not a size in latents.")
    height, width = sample_size
    return ModelInfo(
        name=index.get("_t2v_name", folder.resolve().name),
        about=index.get("_t2v_about", ""),
        native_size=(height * vae.scale_factor, width * vae.scale_factor),
        native_frames=index.get("_t2v_num_frames", 16),
        guidance_scale=index.get("_t2v_guidance_scale", 9.0),
        latent_channels=vae.channels,
        scale_factor=vae.scale_factor,
        lora=f"{merged.lora.name}:{merged.scale:g}" if merged else None,
        distilled=_distilled(merged.lora) if merged else None,
        prefers_distilled=prefers_distilled,
    )
