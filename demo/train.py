"""Train the demo model: a small text-to-video model of the 1.7B model's topology, for the world of `demo.world`.

    python -m demo.train --out weights/demo

Four stages, each resumed from its checkpoint in --run and skipped when done:

    vae    the autoencoder, on single frames; then its decoder alone, on latents with noise in them
    text   a CLIP text encoder, taught to tell the attributes a sentence names at every padding position
    unet   the denoiser, on velocity: single frames first, then clips, rendered anew all the time
    turbo  a LoRA which makes the denoiser follow its own guided 40-step trajectories in 4 steps (see `demo.distill`)

and then the model folder is written to --out. The result depends on --seed and on the machine's arithmetic alone.
How much is computed depends on the device: see `RECIPES`.
"""

import argparse
import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig as ReferenceConfig
from transformers import CLIPTextModel

from demo import world
from demo.data import TOLD, Pool, add_noise_words, captions, random_frames
from t2v.checkpoints.folder import NetworkFiles, write_manifest, write_model
from t2v.networks.clip import CLIPText, CLIPTextConfig
from t2v.networks.prompt_encoder import BOS, EOS, MAX_TOKENS, PAD, PromptEncoder, load_tokenizer
from t2v.networks.unet3d import UNet3D, UNet3DConfig
from t2v.sampling.schedule import Schedule

ROOT = Path(__file__).resolve().parent.parent
GUIDANCE_SCALE = 2.0  # where the trained model scores best
ABOUT = (
    f"It knows one {', '.join(list(world.COLOURS)[:-1])} or {list(world.COLOURS)[-1]} "
    f"{', '.join(list(world.SHAPES)[:-1])} or {list(world.SHAPES)[-1]} "
    "that is moving left, right, up or down, growing, shrinking, circling or bouncing, "
    f"on a {', '.join(list(world.BACKGROUNDS)[:-1])} or {list(world.BACKGROUNDS)[-1]} background."
)

VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 8,
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
UNET_CONFIG: dict[str, Any] = {
    "sample_size": world.SIZE // 8,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ["CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"],
    "block_out_channels": [32, 80, 160],
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


@dataclass(frozen=True)
class Recipe:
    """How much is computed.

    Attributes:
        vae_batch, still_batch, turbo_batch, batch: frames, single frames, clips and clips of one step.
        vae_noise_steps: of the decoder alone, after the others.
        pool: clips that are kept as latents; every step replaces `fresh` of them by new ones.
        still_steps: denoiser steps on single frames before the first clips.
        turbo_clips: trajectories of the teacher.
    """

    vae_steps: int
    vae_noise_steps: int
    vae_batch: int
    text_steps: int
    text_batch: int
    pool: int
    fresh: int
    still_steps: int
    still_batch: int
    unet_steps: int
    batch: int
    learning_rate: float
    turbo_clips: int
    turbo_steps: int
    turbo_batch: int


RECIPES = {
    "cuda": Recipe(
        vae_steps=2000, vae_noise_steps=1000, vae_batch=256, text_steps=2000, text_batch=256,
        pool=16384, fresh=16, still_steps=600, still_batch=2048, unet_steps=5000, batch=256, learning_rate=1.4e-3,
        turbo_clips=3072, turbo_steps=600, turbo_batch=128,
    ),
    "cpu": Recipe(
        vae_steps=1600, vae_noise_steps=600, vae_batch=32, text_steps=800, text_batch=64,
        pool=4096, fresh=1, still_steps=1500, still_batch=64, unet_steps=9000, batch=8, learning_rate=1.2e-3,
        turbo_clips=768, turbo_steps=1200, turbo_batch=8,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "weights" / "demo", help="folder of the trained model")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="folder of the checkpoints")
    parser.add_argument("--init", type=Path, help="a trained model to go on from, in place of a random one")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "weights" / "demo" / "tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", default="vae,text,unet,turbo,export", help="some of them only")
    parser.add_argument("--latent-channels", type=int, default=VAE_CONFIG["latent_channels"])
    parser.add_argument("--workers", type=int, help="processes that write captions (default: 8 beside a GPU, else 0)")
    parser.add_argument("--compile", action="store_true", help="run the denoiser through torch.compile")
    parser.add_argument("--save-every", type=int, default=500, help="denoiser steps between checkpoints")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, resumable, after so long")
    for name in ("unet", "turbo"):
        about = "shorten this stage's schedule so that it ends by then"
        parser.add_argument(f"--{name}-minutes", type=float, default=math.inf, help=about)
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(RECIPES["cpu"].__getattribute__(field.name)))
    args = parser.parse_args()
    recipe = RECIPES["cuda" if args.device.startswith("cuda") else "cpu"]
    for field in fields(Recipe):
        if getattr(args, field.name) is None:
            setattr(args, field.name, getattr(recipe, field.name))
    if args.workers is None:
        args.workers = 8 if args.device.startswith("cuda") else 0
    VAE_CONFIG["latent_channels"] = UNET_CONFIG["in_channels"] = UNET_CONFIG["out_channels"] = args.latent_channels
    args.unet_shape = (args.latent_channels, world.FRAMES, world.SIZE // 8, world.SIZE // 8)
    args.run.mkdir(parents=True, exist_ok=True)
    args.deadline = time.monotonic() + 60 * args.minutes
    torch.manual_seed(args.seed)

    encoder = CLIPText(CLIPTextConfig.from_dict(TEXT_CONFIG))
    encoder.load_state_dict(CLIPTextModel(ReferenceConfig(**TEXT_CONFIG)).state_dict())  # CLIP's own random start
    text = PromptEncoder(load_tokenizer(args.tokenizer), encoder)
    vae = AutoencoderKL(**VAE_CONFIG).to(args.device, memory_format=torch.channels_last)
    stages = args.stages.split(",")
    if args.init:
        adopt(args, "vae", "vae/diffusion_pytorch_model.safetensors")
        adopt(args, "text", "text_encoder/model.safetensors")
    if "vae" in stages:
        stage(args, "vae", vae, train_vae)
    if "text" in stages:
        stage(args, "text", text.encoder.to(args.device), lambda args, _: train_text(args, text))
    if "unet" in stages:
        unet = train_unet(args, text, vae)
    if "turbo" in stages:
        from demo import distill

        distill.train(args, text, unet)
    if "export" in stages:
        export(args, text, vae, unet)


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
    return torch.autocast(device.partition(":")[0], dtype=torch.bfloat16, enabled=not emulated)


def cosine(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at a share of the training."""
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def log(name: str, step: int, steps: int, start: float, **values: float) -> None:
    shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
    print(f"{name:5} {step:5}/{steps}  {time.monotonic() - start:6.0f} s  {shown}", flush=True)


def train_vae(args: argparse.Namespace, vae: AutoencoderKL) -> None:
    """Reconstruct frames.

    The sampled latent keeps the latent space smooth. Then every channel of the latents is standardised, the encoder is
    frozen, and the decoder learns to draw clean frames from latents with some noise in them: a denoiser's are never
    exact.
    """
    generator = torch.Generator().manual_seed(args.seed)
    start = time.monotonic()
    parameters = list(vae.parameters())
    for phase, steps, rate in (("vae", args.vae_steps, 2e-3), ("decod", args.vae_noise_steps, 1e-3)):
        if phase == "decod":
            standardise(vae, torch.cat([random_frames(64, generator, args.device)[0] for _ in range(16)]))
            parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0)
        for step in range(steps):
            set_learning_rate(optimizer, rate * cosine(step / steps, 0.03))
            x, mask = random_frames(args.vae_batch, generator, args.device)
            x = x.contiguous(memory_format=torch.channels_last)
            kl = torch.zeros((), device=x.device)
            with half_precision(args.device):
                if phase == "vae":
                    posterior = vae.encode(x).latent_dist
                    z = posterior.sample()
                    kl = posterior.kl().mean() / posterior.mean[0].numel()
                else:
                    with torch.no_grad():
                        z = vae.encode(x).latent_dist.mean
                    amount = 0.2 * torch.rand(len(z), 1, 1, 1, device=z.device)
                    z = z + amount * torch.randn_like(z)
                y = vae.decode(z).sample.float()
            # The outline decides the shape: pixels that are partly covered, and their surroundings, count more.
            edge = F.max_pool2d(mask, 5, 1, 2) + F.max_pool2d(-mask, 5, 1, 2)
            error = (y - x).abs() + 4 * (y - x).square()
            loss = (error * (0.5 + mask + 2 * edge)).mean()
            (loss + 1e-4 * kl).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            vae.zero_grad(set_to_none=True)
            if step % 50 == 0 or step == steps - 1:
                psnr = 10 * math.log10(4 / float((y - x).detach().square().mean()))
                log(phase, step, steps, start, loss=float(loss.detach()), kl=float(kl.detach()), psnr=psnr)


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


def train_text(args: argparse.Namespace, text: PromptEncoder) -> None:
    """Teach every position after the sentence to carry all attributes, linearly.

    Cross-attention of a fresh denoiser looks at all 77 positions about evenly, and most of them are padding: what they
    say is what it hears first. Random words and left-out attributes teach the encoder what to ignore.
    """
    generator = torch.Generator().manual_seed(args.seed + 1)
    sizes = [count + 1 for count in TOLD]
    head = nn.Linear(TEXT_CONFIG["hidden_size"], sum(sizes)).to(args.device)
    parameters = [*text.encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    start = time.monotonic()
    source = captions(text, args.text_batch, args.seed + 1, args.workers)
    for step in range(args.text_steps):
        set_learning_rate(optimizer, 2e-3 * cosine(step / args.text_steps, 0.05))
        batch = next(source)
        ids = torch.stack([add_noise_words(row, generator) for row in batch.token_ids]).to(args.device)
        told = batch.told.to(args.device)
        logits = head(text.encoder(ids)).split(sizes, dim=-1)
        after = ((ids == EOS).cumsum(1) > 0).float()
        loss = torch.zeros((), device=args.device)
        right = []
        for values, target in zip(logits, told.unbind(1)):
            each = F.cross_entropy(values.transpose(1, 2), target[:, None].expand(-1, MAX_TOKENS), reduction="none")
            loss = loss + (each * after).sum() / after.sum()
            right.append((values[:, -1].argmax(-1) == target).float().mean())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.text_steps - 1:
            accuracy = float(torch.stack(right).mean())
            log("text", step, args.text_steps, start, loss=float(loss.detach()), accuracy=accuracy)


def train_unet(args: argparse.Namespace, text: PromptEncoder, vae: AutoencoderKL) -> UNet3D:
    """Train the denoiser on velocity (Salimans and Ho, arXiv 2202.00512); returns the moving average of its weights.

    Single frames first: they teach shape, colour and background at a sixteenth of the price. Then clips, and single
    frames in one step of eight. Latent pixels on and beside the shape count more. Where a shape is in which frame is
    decided above t = 850, so most timesteps are drawn there. On a GPU the network runs in bfloat16; the weights that
    the optimizer changes are float32.
    """
    cuda = args.device.startswith("cuda")
    alpha_bar = Schedule.from_config(SCHEDULER_CONFIG).alpha_bar.float().to(args.device)
    torch.manual_seed(args.seed + 3)
    unet = UNet3D(UNet3DConfig.from_dict(UNET_CONFIG)).to(args.device)
    if args.init:
        weights = load_file(args.init / "unet" / "diffusion_pytorch_model.safetensors")
        unet.load_state_dict({key: value.float() for key, value in weights.items()})
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda
    )
    path = args.run / "unet.pt"
    step, seconds, mean_loss = 0, 0.0, 0.0
    if path.exists():
        state: dict[str, Any] = torch.load(path, map_location=args.device)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, mean_loss = state["step"], state["seconds"], state["loss"]
    start = time.monotonic() - seconds

    def progress() -> float:
        return max(
            step / args.unet_steps if args.unet_steps else 1.0, (time.monotonic() - start) / 60 / args.unet_minutes
        )

    if progress() >= 1:
        return average.eval()
    pool = Pool(args, text, vae, step)
    start = time.monotonic() - seconds
    network = copy.deepcopy(unet).bfloat16() if cuda else unet
    masters: list[Tensor] = list(unet.parameters())
    working: list[Tensor] = list(network.parameters())
    averages: list[Tensor] = list(average.parameters())
    gradients = [torch.zeros_like(p) for p in masters]
    if args.compile:
        network.compile(dynamic=False)
    for p, gradient in zip(masters, gradients):
        p.grad = gradient
    with torch.no_grad():
        nothing = text.encode([""])
    while (now := progress()) < 1 and time.monotonic() < args.deadline:
        set_learning_rate(optimizer, args.learning_rate * cosine(now, 0.03))
        # Seeded by the step, so that a resumed run draws what an unbroken one would have drawn.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        noise_generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
        pool.add(next(pool.fresh))
        stills = now < args.still_steps / args.unet_steps or step % 8 == 0
        n = args.still_batch if stills else args.batch
        x_0, mask, token_ids = pool.draw(n, stills, generator)
        with torch.no_grad():
            context = text.encoder(token_ids)
        silent = torch.rand(n, generator=generator).to(args.device) < 0.1
        context = torch.where(silent[:, None, None], nothing, context).to(x_0.dtype)
        u = (torch.arange(n) + torch.rand((), generator=generator)) / n
        t = (1000 * u.pow(0.7 if stills else 0.5)).long().clamp(max=999)[torch.randperm(n, generator=generator)]
        t = t.to(args.device)
        eps = torch.randn(x_0.shape, generator=noise_generator, device=args.device)
        a = alpha_bar[t].view(-1, 1, 1, 1, 1)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        v = a.sqrt() * eps - (1 - a).sqrt() * x_0
        with contextlib.ExitStack() as stack:
            # The sequences are short: both are faster than what torch would choose.
            backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if cuda else [SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(backends, set_priority=True))
            if not cuda:
                stack.enter_context(half_precision(args.device))
            prediction = network(x_t.to(x_0.dtype), t, context)
            weight = (1 + 4 * mask.float()).div_(1 + 4 * mask.float().mean())
            loss = ((prediction.float() - v).square() * weight).mean()
            loss.backward()
        if network is not unet:
            torch._foreach_copy_(gradients, [p.grad for p in working if p.grad is not None])
            network.zero_grad(set_to_none=True)
        nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            if network is not unet:
                torch._foreach_copy_(working, masters)
            else:
                optimizer.zero_grad(set_to_none=False)
            decay = min(0.9985 if cuda else 0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(averages, masters, 1 - decay)
        step += 1
        if step % 25 == 0:
            mean_loss += (float(loss.detach()) - mean_loss) / min(step // 25, 20)
            log("still" if stills else "unet", step, args.unet_steps, start, loss=mean_loss, done=now)
        if step % args.save_every == 0 or progress() >= 1 or time.monotonic() >= args.deadline:
            state = {
                "unet": unet.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save(state | {"step": step, "seconds": time.monotonic() - start, "loss": mean_loss}, path)
    return average.eval()


def export(args: argparse.Namespace, text: PromptEncoder, vae: AutoencoderKL, unet: UNet3D) -> None:
    """Write the model folder, weights in float16."""
    networks = (
        NetworkFiles.of(
            "text_encoder",
            {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **TEXT_CONFIG},
            text.encoder.state_dict(),
        ),
        NetworkFiles.of("vae", {"_class_name": "AutoencoderKL", **VAE_CONFIG, "scaling_factor": 1.0}, vae.state_dict()),
        NetworkFiles.of("unet", {"_class_name": "UNet3DConditionModel", **UNET_CONFIG}, unet.state_dict()),
    )
    index = {
        "_diffusers_version": "0.42.1",
        "_t2v_name": "t2v-demo",
        "_t2v_about": ABOUT,
        "_t2v_guidance_scale": GUIDANCE_SCALE,
    }
    write_model(args.out, networks, SCHEDULER_CONFIG, args.tokenizer, index=index)
    write_manifest(args.out, "git checkout -- weights/demo")
    size = sum(f.stat().st_size for f in args.out.rglob("*.safetensors")) / 1e6
    print(f"wrote {args.out}: {size:.1f} MB of weights")


if __name__ == "__main__":
    main()
