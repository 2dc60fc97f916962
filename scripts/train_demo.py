"""Train the demo model: a small text-to-video model of the 1.7B model's topology, for the world of demo_world.py.

Four stages, each resumed from its checkpoint in --run and skipped when done:

    vae      an AutoencoderKL on single frames
    text     a CLIP text encoder, taught to tell the attributes a sentence names at every padding position
    latents  clips rendered once and encoded
    unet     the denoiser, on velocity, with the text encoder frozen

and then writes the diffusers folder layout to --out. The result depends on --seed alone (and on the machine's
arithmetic). On two CPU cores the whole takes about three hours.

    python scripts/train_demo.py --out weights/demo
"""

import argparse
import contextlib
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo_world as world
from t2v.checkpoints import folder as weights
from t2v.checkpoints.folder import COMPONENTS
from t2v.networks import clip
from t2v.networks.prompt_encoder import BOS, EOS, MAX_TOKENS, PAD, PromptEncoder, load_tokenizer
from t2v.networks.unet3d import UNet3D, UNet3DConfig
from t2v.sampling.schedule import Schedule

ROOT = Path(__file__).resolve().parent.parent
VAE_LEARNING_RATE = 2.5e-3
GUIDANCE_SCALE = 2.0  # where the trained model scores best; at 9 colours overshoot
ABOUT = (
    f"It knows one {', '.join(list(world.COLOURS)[:-1])} or {list(world.COLOURS)[-1]} "
    f"{', '.join(list(world.SHAPES)[:-1])} or {list(world.SHAPES)[-1]} "
    "that is moving left, right, up or down, growing or shrinking, "
    f"on a {', '.join(list(world.BACKGROUNDS)[:-1])} or {list(world.BACKGROUNDS)[-1]} background."
)
COLOURS_FIRST = 1500  # denoiser steps before the timesteps move further to the noisy end

VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": world.SIZE,
    "act_fn": "silu",
}
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
UNET_CONFIG = {
    "sample_size": world.SIZE // 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"],
    "block_out_channels": [48, 96, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
}
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "weights" / "demo", help="folder of the trained model")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="folder of the checkpoints")
    parser.add_argument("--init", type=Path, help="a trained model to go on from, in place of a random one")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "weights" / "demo" / "tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--clips", type=int, default=4096, help="clips rendered; each is also used played backwards")
    parser.add_argument("--unet-steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8, help="clips in a step of the denoiser")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3, help="peak, of the denoiser")
    parser.add_argument("--save-every", type=int, default=200, help="denoiser steps between checkpoints")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, resumable, after so long")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    args.deadline = time.monotonic() + 60 * args.minutes
    torch.manual_seed(args.seed)

    encoder = clip.CLIPText(clip.CLIPTextConfig.from_dict(TEXT_CONFIG))
    encoder.load_state_dict(CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG)).state_dict())  # CLIP's own random start
    text = PromptEncoder(load_tokenizer(args.tokenizer), encoder)
    vae = AutoencoderKL(**VAE_CONFIG).to(args.device, memory_format=torch.channels_last)
    if args.init:
        adopt(args, "vae", "vae/diffusion_pytorch_model.safetensors")
        adopt(args, "text", "text_encoder/model.safetensors")
    stage(args, "vae", vae, train_vae)
    stage(args, "text", text.encoder.to(args.device), lambda args, _: train_text(args, text))
    latents, masks, clips, scale = encode_clips(args, vae)
    unet = train_unet(args, text, latents, masks, clips)
    export(args, text, vae, scale, unet)


def stage(args: argparse.Namespace, name: str, model: nn.Module, train: Callable[..., None]) -> None:
    """Train `model`, or load what a former run made of it."""
    path = args.run / f"{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=args.device))
    else:
        model.train()
        train(args, model)
        save(model.state_dict(), path)
    model.eval().requires_grad_(False)


def adopt(args: argparse.Namespace, name: str, file: str) -> None:
    """Take a stage's result from the model given by --init."""
    state = {key.removeprefix("text_model."): value.float() for key, value in load_file(args.init / file).items()}
    save(state, args.run / f"{name}.pt")


def save(state: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def half_precision(device: str) -> contextlib.AbstractContextManager:
    """bfloat16 where the processor computes in it; emulated it is several times slower than float32."""
    emulated = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device, dtype=torch.bfloat16, enabled=not emulated)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at `step`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup)))


def log(name: str, step: int, steps: int, start: float, **values: float) -> None:
    shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
    print(f"{name:5} {step:5}/{steps}  {time.monotonic() - start:6.0f} s  {shown}", flush=True)


def train_vae(args: argparse.Namespace, vae: AutoencoderKL) -> None:
    """Reconstruct frames: first windows of half the size around the shape, which is what there is to learn, then whole
    frames. The sampled latent keeps the latent space smooth under small errors."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0)
    start = time.monotonic()
    for step in range(args.vae_steps):
        for group in optimizer.param_groups:
            group["lr"] = VAE_LEARNING_RATE * cosine(step, args.vae_steps, 50)
        whole = step > 0.75 * args.vae_steps
        x, mask = random_frames(24 if whole else 64, generator)
        if not whole:
            x, mask = windows(x, mask, generator)
        x = x.to(args.device, memory_format=torch.channels_last)
        mask = mask.to(args.device)
        with half_precision(args.device):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        # The outline decides the shape: pixels that are partly covered, and their surroundings, count more.
        edge = F.max_pool2d(mask, 5, 1, 2) + F.max_pool2d(-mask, 5, 1, 2)
        error = (y - x).abs() + 4 * (y - x).square()
        loss = (error * (0.5 + mask + 2 * edge)).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (loss + 1e-4 * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.vae_steps - 1:
            psnr = 10 * math.log10(4 / float((y - x).detach().square().mean()))
            log("vae", step, args.vae_steps, start, loss=float(loss), kl=float(kl), psnr=psnr)
    standardise(vae, torch.cat([random_frames(64, generator)[0] for _ in range(16)]).to(args.device))


@torch.no_grad()
def standardise(vae: AutoencoderKL, x: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 over the frames x, folded into the 1x1 convolutions around it.

    The channels' spreads come out of training up to five times apart; under one common scale the narrow ones would
    drown in the noise until the last steps.
    """
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    n = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:n] /= std.view(-1, 1, 1, 1)
    before.bias[:n] = (before.bias[:n] - mean) / std
    before.bias[n:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)


def random_frames(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n, 3, H, W) pixels and (n, 1, H, W) masks: four frames of each of n / 4 clips."""
    pixels, masks = world.render([world.random_clip(generator) for _ in range(n // 4)], generator)
    pick = torch.randint(world.FRAMES, (n // 4, 4), generator=generator)
    rows = torch.arange(n // 4)[:, None]
    return pixels[rows, pick].flatten(0, 1), masks[rows, pick].flatten(0, 1)


def windows(x: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of each frame a window of half its size, on a random pixel of the shape."""
    half = world.SIZE // 2
    cut_x, cut_mask = [], []
    for frame, covered in zip(x, mask):
        inside = (covered[0] > 0.5).nonzero()
        row, column = inside[int(torch.randint(len(inside), (), generator=generator))].tolist()
        top, left = (max(0, min(world.SIZE - half, place - half // 2)) for place in (row, column))
        cut_x.append(frame[:, top : top + half, left : left + half])
        cut_mask.append(covered[:, top : top + half, left : left + half])
    return torch.stack(cut_x), torch.stack(cut_mask)


def train_text(args: argparse.Namespace, text: PromptEncoder) -> None:
    """Teach every position after the sentence to carry all attributes, linearly.

    Cross-attention of a fresh denoiser looks at all 77 positions about evenly, and most of them are padding: what they
    say is what it hears first. Random words and left-out attributes teach the encoder what to ignore.
    """
    generator = torch.Generator().manual_seed(args.seed + 1)
    sizes = [len(values) + 1 for values in world.ATTRIBUTES.values()]  # the last class: the sentence does not say
    head = nn.Linear(TEXT_CONFIG["hidden_size"], sum(sizes)).to(args.device)
    parameters = [*text.encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    start = time.monotonic()
    for step in range(args.text_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, args.text_steps, 30)
        clips = [forget(world.random_clip(generator), 0.15, generator) for _ in range(64)]
        ids = text.tokenize([c.paraphrase(generator) for c in clips])
        ids = torch.stack([add_noise_words(row, generator) for row in ids]).to(args.device)
        hidden = text.encoder(ids)
        logits = head(hidden).split(sizes, dim=-1)
        after = ((ids == EOS).cumsum(1) > 0).float()
        loss = torch.zeros((), device=args.device)
        right = []
        for values, size, attribute in zip(logits, sizes, world.ATTRIBUTES):
            told = [getattr(c, attribute) for c in clips]
            target = torch.tensor([size - 1 if v is None else v for v in told], device=args.device)
            each = F.cross_entropy(values.transpose(1, 2), target[:, None].expand(-1, MAX_TOKENS), reduction="none")
            loss = loss + (each * after).sum() / after.sum()
            right.append((values[:, -1].argmax(-1) == target).float().mean())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.text_steps - 1:
            log("text", step, args.text_steps, start, loss=float(loss), accuracy=float(torch.stack(right).mean()))


def forget(clip: world.Clip, chance: float, generator: torch.Generator) -> world.Clip:
    """Leave each attribute of the description out with the given chance."""
    keep = torch.rand(4, generator=generator) >= chance
    values = (clip.colour, clip.shape, clip.motion, clip.background)
    return world.Clip(*(v if k else None for v, k in zip(values, keep)))


def add_noise_words(ids: Tensor, generator: torch.Generator) -> Tensor:
    """In one sentence of four, up to three random tokens at random places."""
    words = ids[1 : int((ids == EOS).nonzero()[0])].tolist()
    if int(torch.randint(4, (), generator=generator)) == 0:
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            place = int(torch.randint(len(words) + 1, (), generator=generator))
            words.insert(place, int(torch.randint(1, BOS, (), generator=generator)))
    row = torch.full_like(ids, PAD)
    row[: len(words) + 2] = torch.tensor([BOS, *words, EOS])
    return row


@torch.no_grad()
def encode_clips(args: argparse.Namespace, vae: AutoencoderKL) -> tuple[Tensor, Tensor, list[world.Clip], float]:
    """Latent means (n, 4, F, h, w) of unit variance, the shape's share of each latent pixel, the clips, the scale."""
    path = args.run / "latents.pt"
    if not path.exists():
        generator = torch.Generator().manual_seed(args.seed + 2)
        start = time.monotonic()
        latents, masks, told = [], [], []
        for i in range(0, args.clips, 16):
            clips = [world.random_clip(generator) for _ in range(16)]
            pixels, mask = world.render(clips, generator)
            x = pixels.flatten(0, 1).to(args.device, memory_format=torch.channels_last)
            with half_precision(args.device):
                z = vae.encode(x).latent_dist.mean.float().cpu()
            latents.append(z.unflatten(0, (16, -1)).transpose(1, 2).half())
            masks.append(F.avg_pool2d(mask.flatten(0, 1), 8).unflatten(0, (16, -1)).transpose(1, 2).half())
            told += [(c.colour, c.shape, c.motion, c.background) for c in clips]
            if i % 512 == 0:
                log("clips", i, args.clips, start)
        save({"latents": torch.cat(latents), "masks": torch.cat(masks), "clips": told}, path)
    stored = torch.load(path)
    latents = stored["latents"].float()
    scale = 1 / float(latents.std())
    return latents * scale, stored["masks"].float(), [world.Clip(*c) for c in stored["clips"]], scale


def train_unet(
    args: argparse.Namespace, text: PromptEncoder, latents: Tensor, masks: Tensor, clips: list[world.Clip]
) -> UNet3D:
    """Train the denoiser on velocity (Salimans and Ho, arXiv 2202.00512); returns the moving average of its weights.

    With a signal-to-noise ratio that ends at zero, the first steps of sampling see nothing but the text, and they
    decide what is shown. So timesteps are drawn towards the noisy end, evenly spread within each batch, and the loss is
    plain velocity error, which weighs them fully; latent pixels on and beside the shape count more. Colours are learned
    first and everywhere; where a shape is in which frame is decided above t = 850, so later steps look there most.
    """
    alpha_bar = Schedule.from_config(SCHEDULER_CONFIG).alpha_bar.float().to(args.device)
    torch.manual_seed(args.seed + 3)
    unet = UNet3D(UNet3DConfig.from_dict(UNET_CONFIG)).to(args.device)
    if args.init:
        start_from = load_file(args.init / "unet" / "diffusion_pytorch_model.safetensors")
        unet.load_state_dict({key: value.float() for key, value in start_from.items()})
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    path = args.run / "unet.pt"
    step, mean_loss = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=args.device)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, mean_loss = state["step"], state["loss"]

    unet.train()
    start = time.monotonic()
    while step < args.unet_steps and time.monotonic() < args.deadline:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * cosine(step, args.unet_steps, 200)
        # Seeded by the step, so that a resumed run draws what an unbroken one would have drawn.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x_0, mask, context = draw(args, text, latents, masks, clips, generator)
        u = (torch.arange(args.batch) + torch.rand((), generator=generator)) / args.batch
        t = (
            (1000 * u.pow(0.7 if step < COLOURS_FIRST and not args.init else 0.4))
            .long()
            .clamp(max=999)[torch.randperm(args.batch, generator=generator)]
            .to(args.device)
        )
        eps = torch.randn(x_0.shape, generator=generator).to(args.device)
        a = alpha_bar[t].view(-1, 1, 1, 1, 1)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        v = a.sqrt() * eps - (1 - a).sqrt() * x_0
        with sdpa_kernel(SDPBackend.MATH), half_precision(args.device):
            prediction = unet(x_t, t, context)
        near = F.max_pool3d(mask, (1, 3, 3), 1, (0, 1, 1))  # the outline too, on both sides: it is what makes the shape
        loss = ((prediction.float() - v).square() * (1 + 4 * near)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
        mean_loss += (float(loss) - mean_loss) / min(step + 1, 100)
        step += 1
        if step % 25 == 0:
            log("unet", step, args.unet_steps, start, loss=mean_loss)
        if step % args.save_every == 0 or step == args.unet_steps or time.monotonic() >= args.deadline:
            state = {"unet": unet.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save(state | {"step": step, "loss": mean_loss}, path)
    return average.eval()


def draw(
    args: argparse.Namespace,
    text: PromptEncoder,
    latents: Tensor,
    masks: Tensor,
    clips: list[world.Clip],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch: clips, half of them played backwards; their masks; the context of a sentence about each."""
    # Growing and shrinking are learned last: a change of width is small beside a change of place.
    pool = [i for i, clip in enumerate(clips) for _ in range(2 if clip.motion in world.SLOW_TO_LEARN else 1)]
    picks = [pool[i] for i in torch.randint(len(pool), (args.batch,), generator=generator).tolist()]
    backwards = (torch.rand(args.batch, generator=generator) < 0.5).tolist()
    style = torch.rand(args.batch, generator=generator).tolist()
    x, mask, prompts = [], [], []
    for i, back, kind in zip(picks, backwards, style):
        clip = clips[i]
        if back:
            clip = world.Clip(clip.colour, clip.shape, world.REVERSED[clip.motion], clip.background)
        x.append(latents[i].flip(1) if back else latents[i])
        mask.append(masks[i].flip(1) if back else masks[i])
        if kind < 0.1:
            prompts.append("")
        elif kind < 0.2:
            prompts.append(forget(clip, 0.3, generator).paraphrase(generator))
        elif kind < 0.4:
            prompts.append(clip.paraphrase(generator))
        else:
            prompts.append(clip.sentence())
    with torch.no_grad():
        context = text.encode(prompts)
    return torch.stack(x).to(args.device), torch.stack(mask).to(args.device), context


def export(args: argparse.Namespace, text: PromptEncoder, vae: AutoencoderKL, scale: float, unet: UNet3D) -> None:
    """Write the diffusers folder layout, weights in float16."""
    out = args.out

    def network(name: str, file: str, config: dict, state: dict[str, Tensor]) -> None:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {key: value.detach().cpu().half().contiguous() for key, value in state.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})

    # The text_model prefix lets transformers 4 load the encoder too; version 5 takes it with and without.
    prefixed = {f"text_model.{key}": v for key, v in text.encoder.state_dict().items()}
    text_config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **TEXT_CONFIG}
    vae_config = {"_class_name": "AutoencoderKL", **VAE_CONFIG, "scaling_factor": scale}
    unet_config = {"_class_name": "UNet3DConditionModel", **UNET_CONFIG}
    network("text_encoder", "model.safetensors", text_config, prefixed)
    network("vae", "diffusion_pytorch_model.safetensors", vae_config, vae.state_dict())
    network("unet", "diffusion_pytorch_model.safetensors", unet_config, unet.state_dict())
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG, indent=2) + "\n")
    if args.tokenizer.resolve() != (out / "tokenizer").resolve():
        shutil.copytree(args.tokenizer, out / "tokenizer", dirs_exist_ok=True)
    index = {
        "_class_name": "TextToVideoSDPipeline",
        "_diffusers_version": "0.42.1",
        "_t2v_name": "t2v-demo",
        "_t2v_about": ABOUT,
        "_t2v_guidance_scale": GUIDANCE_SCALE,
        **COMPONENTS,
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    weights.write_manifest(out, "git checkout -- weights/demo")
    size = sum(f.stat().st_size for f in out.rglob("*.safetensors")) / 1e6
    print(f"wrote {out}: {size:.1f} MB of weights")


if __name__ == "__main__":
    main()
