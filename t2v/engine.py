"""The model as a whole: a request in, frames out."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2v import memory, weights
from t2v.convolution import fold
from t2v.errors import InvalidRequest, OutOfMemory, WeightsError
from t2v.graph import Function, Graphs, Pace
from t2v.lora import Merged, parse, read
from t2v.networks import empty
from t2v.request import Request
from t2v.sampler import FewStep, Schedule, Solver, denoise, guided, update
from t2v.text import Text, load_tokenizer
from t2v.timeline import Timeline
from t2v.unet3d import UNet3D
from t2v.vae import CHUNK_PIXELS, VAE

Progress = Callable[[str, int, int], None]
Look = Callable[[int, int, Callable[[], np.ndarray]], None]

TRACE_AFTER = 35  # steps of one shape on a CPU, done or to come
LARGE = 10**8  # parameters of a denoiser of which a CPU takes longer for a step than for its recording
MAX_WORK = 2**34  # frames x pixels x steps of one request; 256 frames of 256x256 in 500 steps, in windows, just fit
STRENGTH = 0.6  # of a video that starts from another one, unless a request says otherwise, and of a second pass
SKETCHED = 4  # frames that one stands for in a view of an unfinished video
MOST_AT_ONCE = 128  # frames that are denoised together unless a request says otherwise
GPU = Path("/dev/nvidia0")  # is there wherever a container was given a GPU
FAST_STEPS = 20  # of preset fast; the solver's authors advise 15 to 20 for guided sampling (arXiv 2211.01095)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a request is fitted into memory.

    Attributes:
        rows: of the guided pair that the denoiser computes at once.
        chunk_pixels: decoded at once at most, but one frame at least.
    """

    rows: int
    chunk_pixels: int

    def __str__(self) -> str:
        return f"{'usual' if self == USUAL else 'lean'}, {self.rows} rows and {self.chunk_pixels} pixels at once"


USUAL, LEAN = Plan(2, CHUNK_PIXELS), Plan(1, CHUNK_PIXELS // 8)
MARGIN = 1.1  # of memory planned with: what the libraries take for themselves


@dataclass(frozen=True)
class Sampling:
    """How a request is sampled.

    Attributes:
        guidance_scale: of the two rows; 1 is one row.
        embedded: guidance scale that the network takes as an input; None if it takes none.
    """

    preset: str
    solver: Solver
    steps: int
    guidance_scale: float
    embedded: float | None = None


@dataclass(frozen=True)
class Pass:
    """Noise, or the frames of the pass before, to clean latents, by one model."""

    engine: "Engine"
    request: Request
    plan: Plan

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.engine.size(self.request)


class Engine:
    """Text encoder, denoiser, autoencoder and schedule of one model.

    Attributes:
        native_size: (height, width) in pixels the model was trained at.
        name: of the model, for logs and files.
        about: what the model can show, one sentence; empty where its index does not say.
        guidance_scale: for requests that leave it to the model.
        native_frames: the model was trained on at once.
        merged: the adaptation in the denoiser's weights, if there is one.
        upscaler: another model for second passes; None is this one.
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
        native_frames: int = 16,
        merged: Merged | None = None,
        upscaler: "Engine | None" = None,
    ):
        self.text = text
        self.unet = unet
        self.vae = vae
        self.schedule = schedule
        self.native_size = native_size
        self.name = name
        self.about = about
        self.guidance_scale = guidance_scale
        self.native_frames = native_frames
        self.merged = merged
        self.upscaler = upscaler
        # A trace takes half a second, which fewer steps do not win back.
        self._after = 0 if self.device.type == "cuda" else TRACE_AFTER
        self.step: Function = Graphs(self._step, after=self._after)
        self.predict: Function = Graphs(self._predict, after=self._after)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        verify: bool = False,
        lora: str | None = None,
        compile: bool = False,
        upscaler: str | Path | None = None,
    ) -> "Engine":
        """Load a model from a folder in diffusers' layout.

        Args:
            device: "cpu", "cuda", "cuda:1", which becomes this thread's current one; "auto" is CUDA where there is one.
            dtype: "float32", "float16", "bfloat16"; "auto" is float16 on CUDA, float32 elsewhere.
            verify: read every file again to compare it with the manifest, whatever was found before.
            lora: "path[:scale]" of an adaptation to merge into the denoiser; see `t2v.lora` for the formats.
            compile: run the denoiser through torch.compile: minutes at the first request of every shape, less where
                TORCHINDUCTOR_CACHE_DIR holds what an earlier start compiled.
            upscaler: folder of another model for second passes, loaded in the same way but without the adaptation.

        Raises:
            WeightsError: the folder is not a whole model of this family, or the device or dtype does not exist.
        """
        folder = Path(folder)
        where, precision = _device(device), _dtype(dtype, device)
        if where.index is not None and where.type == "cuda":
            torch.cuda.set_device(where)  # where streams, events and graphs are made
        if where.type == "cpu":
            memory.keep()
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
        text = Text(load_tokenizer(folder / "tokenizer"), networks["text_encoder"])
        vae = VAE(networks["vae"])
        if (
            unet.config.in_channels != vae.channels
            or unet.config.cross_attention_dim != text.encoder.config.hidden_size
        ):
            raise WeightsError(f"{folder}: the networks do not belong together; their widths differ.")
        if compile:
            unet.run = torch.compile(unet.run, dynamic=False)  # type: ignore[method-assign]
        merged = None
        if lora:
            path, factor = parse(lora)
            merged = Merged(unet, read(path, unet), factor)
        return cls(
            text,
            unet,
            vae,
            Schedule.from_config(weights.read_json(folder / "scheduler" / "scheduler_config.json")),
            native_size=_pair(configs["unet"].get("sample_size"), vae.factor),
            name=index.get("_t2v_name", folder.resolve().name),
            about=index.get("_t2v_about", ""),
            guidance_scale=index.get("_t2v_guidance_scale", 9.0),
            native_frames=index.get("_t2v_num_frames", 16),
            merged=merged,
            upscaler=cls.load(upscaler, device, dtype, verify, compile=compile) if upscaler else None,
        )

    def generate(
        self,
        request: Request,
        progress: Progress = lambda stage, done, total: None,
        start: Iterable[np.ndarray] | None = None,
        look: Look = lambda done, total, sketch: None,
    ) -> Iterator[np.ndarray]:
        """Make the frames of a video.

        Denoising runs before this returns, the last pass of it where there are two; decoding as the frames are taken.

        Args:
            progress: called with (stage, done, total) as each of "start" (once, where there is one), "text", "denoise"
                (per step) and "decode" (per frame) goes on; in every pass anew.
            start: (H, W, 3) uint8 RGB frames to start from instead of noise alone, as many as asked for, of the size of
                the first pass.
            look: called with (done, total, sketch) after every denoising step; sketch() gives (F, H, W, 3) uint8 RGB,
                the video as it is then foreseen, of which only every fourth frame was decoded and stands for four.

        Returns:
            An iterator of (n, H, W, 3) uint8 RGB arrays, request.num_frames frames in all.

        Raises:
            InvalidRequest: this model cannot do it.
            OutOfMemory: it does not fit the device; known before the work where that can be, else during it.
        """
        if start is None and request.strength is not None:
            raise InvalidRequest("strength needs an init_video to start from; send one or leave strength out.")
        *before, last = self.passes(request)
        for one in before:
            latents = one.engine.denoised(one.request, progress, one.plan, start, look)
            start = _enlarged(one.engine._decoded(latents, one.plan, progress))
        latents = last.engine.denoised(last.request, progress, last.plan, start, look)
        return last.engine._decoded(latents, last.plan, progress)

    def denoised(
        self,
        request: Request,
        progress: Progress = lambda stage, done, total: None,
        plan: Plan | None = None,
        start: Iterable[np.ndarray] | None = None,
        look: Look = lambda done, total, sketch: None,
    ) -> Tensor:
        """(1, channels, F, h, w) float32 clean latents of a request; one pass of `generate` without the decoding.

        Where memory runs out although there seemed to be enough, it is tried once more with the leanest plan.
        """
        plan = plan or self.plan(request)
        log.info("Memory plan: %s", plan)
        x_0 = None
        sentence = f"{self._size_of(request)}: the device's memory ran out; ask for fewer frames or pixels."
        if start is not None:
            with _told(sentence):
                x_0 = self.vae.encode(start, plan.chunk_pixels)
            progress("start", 1, 1)
        while True:
            held = self.device.type == "cuda" and any(recorded.recordings for recorded in self._recorded)
            try:
                return self._denoised(request, plan, progress, x_0, look)
            except (RuntimeError, MemoryError) as error:
                if not memory.exhausted(error):
                    raise
            # Here, where the error no longer holds on to tensors.
            self.release()
            if held:  # CUDA graphs of earlier requests, of which the memory is free now
                continue
            if plan is LEAN:
                raise OutOfMemory(sentence)
            plan = LEAN
            log.warning("Memory ran out. Memory plan: %s", plan)

    @torch.inference_mode()
    def _denoised(self, request: Request, plan: Plan, progress: Progress, start: Tensor | None, look: Look) -> Tensor:
        sampling = self.sampling(request)
        self._adapt(sampling)
        strength = 1.0 if start is None else STRENGTH if request.strength is None else request.strength
        begin = sampling.steps - math.ceil(sampling.steps * strength)
        steps = self.schedule.steps(sampling.solver, sampling.steps, begin)
        draws = self.draws(request)
        noise = next(draws)
        if start is not None:
            if not steps:
                return start
            if begin:
                noise = self.schedule.noised(start, noise, steps[0].t)
        timeline = self.timeline(request)
        conditions = self.unet.condition(self.text.encode(request.prompts))[:, None]  # of each prompt (1, 77, D)
        if sampling.guidance_scale != 1:
            negative = request.negative_prompt.strip()
            against = self.unet.condition(self.text.encode([negative])) if negative else self._unconditional
            conditions = torch.cat([against.expand(len(conditions), 1, -1, -1), conditions], dim=1)
        progress("text", 1, 1)
        # What the steps differ in, on the device before the first one: inside the loop the host waits for nothing.
        moments = self.unet.moments(torch.tensor([step.t for step in steps], device=noise.device), sampling.embedded)
        coefficients = torch.tensor([step.coefficients for step in steps], dtype=torch.float64, device=noise.device)
        guidance = torch.tensor(sampling.guidance_scale, device=noise.device)
        step, predict = self.step, self.predict
        if plan.rows == 1:
            step, predict = functools.partial(self._step, rows=1), functools.partial(self._predict, rows=1)
        windows = [] if timeline.whole else [timeline.windows(i, noise.device) for i in range(len(steps))]
        for recorded in self._recorded:
            recorded.expected = sum(map(len, windows)) or len(steps)

        def advance(i: int, x: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
            if steps[i].fresh:
                others = torch.stack([next(draws), others[1]])
            if timeline.whole:
                x, others = step(x, others, moments[i : i + 1], conditions[0], guidance, coefficients[i])
                return x, others
            prediction = torch.zeros_like(x)
            for window in windows[i]:
                shares = timeline.mixture(window.start, len(conditions))
                condition = sum((share * c for share, c in zip(shares, conditions) if share), torch.tensor(0))
                (part,) = predict(x[:, :, window.frames], moments[i : i + 1], condition, guidance)
                prediction.index_add_(2, window.frames, window.weights * part)
            return update(x, others, prediction, coefficients[i])

        pace = Pace(self.device)

        def tell(done: int, total: int, x_0: Tensor) -> None:
            pace.keep()
            progress("denoise", done, total)
            look(done, total, lambda: self._sketch(x_0, plan))

        return denoise(advance, noise, len(steps), tell)

    def _step(
        self,
        x: Tensor,
        others: Tensor,
        moment: Tensor,
        condition: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        rows: int = USUAL.rows,
    ) -> tuple[Tensor, ...]:
        """One denoising step, of tensors alone: network, guidance, update. In float32 around the network."""
        (prediction,) = self._predict(x, moment, condition, guidance, rows)
        return update(x, others, prediction, coefficients)

    def _predict(
        self, x: Tensor, moment: Tensor, condition: Tensor, guidance: Tensor, rows: int = USUAL.rows
    ) -> tuple[Tensor]:
        """The guided prediction, (1, channels, F, h, w) float32."""
        latents = x.to(moment.dtype)
        prediction = torch.cat([self.unet.run(latents, moment, part).float() for part in condition.split(rows)])
        return (guided(prediction, guidance) if len(condition) == 2 else prediction,)

    def warm_up(self) -> None:
        """Pay now what the first request would pay: libraries, algorithms, the recording of the default shape. A large
        network on a CPU takes too long for that; there one small frame will do."""
        large = self.device.type != "cuda" and sum(p.numel() for p in self.unet.parameters()) > LARGE
        small: dict[str, Any] = {"num_frames": 1, "width": 16, "height": 16} if large else {}
        for recorded in self._recorded:
            recorded.after = self._after if large else 0
        for _ in self.generate(Request(num_inference_steps=1, seed=0, **small)):
            pass
        for recorded in self._recorded:
            recorded.after = self._after
        if self.upscaler:
            self.upscaler.warm_up()

    def release(self) -> None:
        """Give back all memory that no request needs to hold."""
        for engine in filter(None, (self, self.upscaler)):
            for recorded in engine._recorded:
                recorded.clear()
        memory.release(self.device)

    @property
    def device(self) -> torch.device:
        return self.text.device

    def passes(self, request: Request) -> list["Pass"]:
        """What is done for the request, one after the other: one pass, or two where it is to be upscaled.

        Raises:
            InvalidRequest: the model cannot do it, or it is more work than one request may be.
            OutOfMemory: it does not fit; the message says how many frames would.
        """
        runs = [(self, request)]
        if request.upscale > 1:
            first = replace(request, upscale=1)
            height, width = self.size(first)
            second = replace(request, strength=STRENGTH, height=height, width=width)
            if self.upscaler and isinstance(self.sampling(request).solver, FewStep):  # its adaptation is not there
                second = replace(second, preset="fast", num_inference_steps=FAST_STEPS, guidance_scale=None)
            runs = [(self, first), (self.upscaler or self, second)]
        work = sum(engine._work(one) for engine, one in runs)
        if work > MAX_WORK:
            raise InvalidRequest(
                f"{self._size_of(request)} in {request.num_inference_steps} steps is {work / MAX_WORK:.1f} times the "
                "work allowed in one request; ask for fewer frames, pixels or steps."
            )
        return [Pass(engine, one, engine.plan(one)) for engine, one in runs]

    def plan(self, request: Request) -> Plan:
        """How one pass fits into the memory that is free now.

        Raises:
            InvalidRequest: this model cannot do it.
            OutOfMemory: it does not fit; the message says how many frames would.
        """
        rows = 1 if self.sampling(request).guidance_scale == 1 else 2
        height, width = self.size(request)
        timeline, shape = self.timeline(request), self._shape(request)
        for plan in (USUAL, USUAL, LEAN):  # once more where there was something to release
            free = memory.free(self.device)
            chunk = min(request.num_frames, self.vae.at_once(height, width, plan.chunk_pixels))
            decoding = MARGIN * self.vae.workspace(chunk, height, width)
            denoising = MARGIN * self.unet.workspace(min(rows, plan.rows), (*shape[:2], timeline.size, *shape[3:]))
            # A CUDA graph keeps what it ran in, and the lean plan runs without.
            graph = self.device.type == "cuda" and plan is USUAL
            if free is None or (denoising + decoding if graph else max(denoising, decoding)) <= free:
                return plan
            self.release()
        assert free is not None
        frames = 0 if decoding > free else int(timeline.size * free / denoising)
        advice = f"ask for at most {frames} frames of that size" if frames else "ask for a smaller size"
        if frames >= self.native_frames:
            advice += f", or for window {self.native_frames}"
        if request.upscale > 1:
            advice += ", or leave upscale out"
        raise OutOfMemory(
            f"{self._size_of(request)} need {max(denoising, decoding) / 1e9:.1f} GB of the device's memory and "
            f"{free / 1e9:.1f} GB are free; {advice}."
        )

    def noise(self, request: Request) -> Tensor:
        """(1, channels, F, h, w) float32: what denoising starts from."""
        return next(self.draws(request))

    def draws(self, request: Request) -> Iterator[Tensor]:
        """Unit normal noise without end, each (1, channels, F, h, w) float32: first what denoising starts from.

        Drawn on the CPU: one seed, one noise, on every device.
        """
        shape = self._shape(request)
        generator = torch.Generator().manual_seed(int(request.seed or 0))
        yield self.timeline(request).noise(shape, generator).to(self.device)
        while True:
            # From pinned memory, so that the host need not wait until a GPU has come so far.
            noise = torch.randn(shape, generator=generator, pin_memory=self.device.type == "cuda")
            yield noise.to(self.device, non_blocking=True)

    def size(self, request: Request) -> tuple[int, int]:
        """(height, width) in pixels of the video the request asks for."""
        asked = request.height, request.width
        height, width = (request.upscale * (side or native) for side, native in zip(asked, self.native_size))
        if height % self.vae.factor or width % self.vae.factor:
            raise InvalidRequest(f"width and height must be multiples of {self.vae.factor}, not {width}x{height}.")
        return height, width

    def timeline(self, request: Request) -> Timeline:
        """Which frames are denoised together.

        Raises:
            InvalidRequest: there are several prompts and too few frames for them.
        """
        several = len(request.prompts) > 1
        window = request.window
        if window is None:
            window = self.native_frames if several or request.num_frames > MOST_AT_ONCE else MOST_AT_ONCE
        if several and request.num_frames <= window:
            raise InvalidRequest(
                f"next_prompts need more frames than are denoised together: more than {window}, or a smaller window."
            )
        return Timeline(request.num_frames, window, request.loop)

    def _work(self, request: Request) -> int:
        """Frames x pixels x steps of one pass."""
        timeline, strength = self.timeline(request), 1 if request.strength is None else request.strength
        steps = math.ceil(self.sampling(request).steps * strength)
        return len(timeline.starts(0)) * timeline.size * math.prod(self.size(request)) * steps

    def _shape(self, request: Request) -> tuple[int, ...]:
        height, width = self.size(request)
        return 1, self.vae.channels, request.num_frames, height // self.vae.factor, width // self.vae.factor

    def _size_of(self, request: Request) -> str:
        height, width = self.size(request)
        return f"{request.num_frames} frames of {width}x{height}"

    def sampling(self, request: Request) -> Sampling:
        """How a request is sampled.

        Raises:
            InvalidRequest: it asks for what the installed model cannot do.
        """
        few = self.merged.lora.few_step if self.merged else None
        preset = request.preset
        if preset == "auto":
            preset = "turbo" if few else "quality"
        n = request.num_inference_steps
        if preset != "turbo":
            scale = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
            if request.negative_prompt.strip() and scale == 1:
                raise InvalidRequest("negative_prompt has no effect at guidance_scale 1; raise that or leave it out.")
            solver = cast(Solver, request.scheduler)
            return Sampling(preset, solver, min(n, FAST_STEPS) if preset == "fast" else n, scale)
        if few is None:
            raise InvalidRequest(
                "preset turbo needs a few-step LoRA, and none is installed: start with T2V_LORA=path, or ask for fast."
            )
        if request.negative_prompt.strip() or request.scheduler != "dpm++":
            raise InvalidRequest(
                "preset turbo has no negative_prompt and a scheduler of its own; leave both out, or ask for quality."
            )
        default, greatest = few.steps
        n = n if n <= greatest else default
        if few.guidance is None:
            if request.guidance_scale not in (None, 1):
                raise InvalidRequest(f"preset turbo takes no guidance_scale with {few.name}; leave it out.")
            return Sampling(preset, few, n, 1.0)
        low, usual, high = few.guidance
        embedded = usual if request.guidance_scale is None else request.guidance_scale
        if not low <= embedded <= high:
            raise InvalidRequest(f"guidance_scale must be {low} to {high} with preset turbo ({few.name}).")
        return Sampling(preset, few, n, 1.0, embedded)

    def describe(self) -> str:
        """The model's name and what it can show, one line."""
        return f"{self.name}. {self.about}" if self.about else self.name

    def metadata(self, request: Request) -> dict[str, Any]:
        """What a file made from the request should say about itself, as JSON values."""
        height, width = self.size(request)
        sampling = self.sampling(request)
        settled: dict[str, Any] = {"width": width, "height": height, "model": self.name, "preset": sampling.preset}
        settled["num_inference_steps"] = sampling.steps
        settled["window"] = self.timeline(request).size
        settled["guidance_scale"] = sampling.embedded or sampling.guidance_scale
        if request.upscale > 1 and self.upscaler:
            settled["upscaler"] = self.upscaler.name
        if self.merged and self._adapted(sampling):
            settled["lora"] = f"{self.merged.lora.name}:{self.merged.scale:g}"
        return asdict(request) | settled

    def _adapt(self, sampling: Sampling) -> None:
        """Merge a few-step adaptation for the requests that are sampled so, and take it out for the others."""
        wanted = self._adapted(sampling)
        if self.merged and wanted != self.merged.active:
            self.__dict__.pop("_unconditional", None)  # it was computed with the other weights
            for recorded in self._recorded:
                recorded.forget()
            self.merged.merge() if wanted else self.merged.undo()

    def _adapted(self, sampling: Sampling) -> bool:
        """Whether a request is made with the adaptation: always with a plain one."""
        return self.merged is not None and (isinstance(sampling.solver, FewStep) or not self.merged.lora.few_step)

    @property
    def _recorded(self) -> list[Graphs]:
        return [function for function in (self.step, self.predict) if isinstance(function, Graphs)]

    @functools.cached_property
    def _unconditional(self) -> Tensor:
        """What the denoiser reads from the empty prompt; computed at the first guided request."""
        return self.unet.condition(self.text.encode([""]))

    def _sketch(self, x_0: Tensor, plan: Plan) -> np.ndarray:
        few = np.concatenate(list(self.vae.decode(x_0[:, :, ::SKETCHED], plan.chunk_pixels)))
        return few.repeat(SKETCHED, axis=0)[: x_0.shape[2]]

    def _decoded(self, latents: Tensor, plan: Plan, progress: Progress) -> Iterator[np.ndarray]:
        done = 0
        with _told("The device's memory ran out in decoding; ask for a smaller size."):
            for frames in self.vae.decode(latents, plan.chunk_pixels, self.release):
                done += len(frames)
                progress("decode", done, latents.shape[2])
                yield frames


@contextlib.contextmanager
def _told(sentence: str) -> Iterator[None]:
    """Where memory runs out inside, OutOfMemory says this."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory.exhausted(error):
            raise
        raise OutOfMemory(sentence) from error


def _enlarged(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8, twice as wide and high as those of the chunks."""
    for chunk in chunks:
        pixels = torch.from_numpy(chunk).permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, scale_factor=2, mode="bicubic", align_corners=False)
        yield from pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda and GPU.exists():
            raise WeightsError(
                f"There is a GPU, but torch {torch.__version__}, made for CUDA {torch.version.cuda}, cannot use it; "
                "update its driver, or ask for the device cpu."
            )
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
