"""The few-step demo: a LoRA which makes the denoiser follow its own guided 40-step trajectories in 4 steps.

The teacher samples trajectories with guidance. They are deterministic, so each pair of its states at the borders of the
four steps says where one long DDIM step, without guidance, has to end. The student, the same network with a low-rank
adaptation, learns to predict the clean sample that makes it end there: first from the teacher's states, then also from
those that it reaches itself, so that errors do not add up. (Progressive distillation, Salimans and Ho, arXiv
2202.00512, in one round and along whole trajectories; guidance is distilled in, Meng et al., arXiv 2210.03142.)
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from demo.data import captions
from demo.train import GUIDANCE_SCALE, SCHEDULER_CONFIG, cosine, log, save, set_learning_rate
from t2v.checkpoints.folder import write_json
from t2v.networks.prompt_encoder import PromptEncoder
from t2v.networks.unet3d import TemporalConv, UNet3D
from t2v.sampling.denoiser import guided
from t2v.sampling.distilled import DistilledSampling
from t2v.sampling.schedule import Schedule
from t2v.sampling.solvers import SolverStep, solver_step, solver_steps

TEACHER_STEPS = 40
STEPS = 4
RECIPE = DistilledSampling("t2v-demo-turbo", solver="ddim", default_steps=STEPS, max_steps=8)
RANK = 16
LEARNING_RATE = 2e-3
# The layers that are adapted, by the beginnings of their names; what the timestep and the latents go through stays.
ADAPTED = ("transformer_in", "down_blocks", "mid_block", "up_blocks")


class LowRank(nn.Module):
    """weight + up @ down, computed whenever the weight is read."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        columns = weight[0].numel()
        rank = min(rank, weight.shape[0], columns)
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype).view(weight.shape)


def adapt(unet: UNet3D, rank: int = RANK) -> dict[str, LowRank]:
    """Put a low-rank adaptation, zero at first, on the layers; returns them by the names of the layers."""
    found = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | TemporalConv) and name.startswith(ADAPTED):
            low_rank = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", low_rank, unsafe=True)
            found[name] = low_rank
    return found


def student_steps() -> list[SolverStep]:
    """The student's steps, as preset `turbo` makes them."""
    return solver_steps(Schedule.from_config(SCHEDULER_CONFIG), RECIPE.solver, STEPS, distilled=RECIPE)


@torch.no_grad()
def trajectories(
    unet: UNet3D, text: PromptEncoder, token_ids: Tensor, noise: Tensor, guidance: float, steps: int
) -> Tensor:
    """States of guided DPM-Solver++ sampling.

    Args:
        token_ids: (n, 77).
        noise: (n, channels, F, h, w) float32.

    Returns:
        (STEPS + 1, n, channels, F, h, w) float32: at the beginning of each of `student_steps`, and the clean sample.
    """
    context = text.encoder(token_ids)
    nothing = text.encode([""]).expand_as(context)
    dtype = unet.conv_out.weight.dtype
    both = torch.cat([nothing, context]).to(dtype)
    x, history, states = noise, torch.zeros((2, *noise.shape), device=noise.device), []
    borders = [step.t for step in student_steps()]
    for step in solver_steps(Schedule.from_config(SCHEDULER_CONFIG), "dpm++", steps):
        if step.t in borders:
            states.append(x)
        t = torch.full((2 * len(x),), step.t, device=x.device)
        prediction = guided(unet(torch.cat([x, x]).to(dtype), t, both).float(), guidance)
        x, history = solver_step(x, history, prediction, step.coefficients)
    return torch.stack([*states, x])


def train(args: argparse.Namespace, text: PromptEncoder, unet: UNet3D) -> None:
    """Train the adaptation and write it, in PEFT's format, to turbo/ in the model folder."""
    path = args.run / "turbo.pt"
    cuda = args.device.startswith("cuda")
    # float32, with TF32 products: in half precision much of a small change of a weight would be rounded away.
    student = copy.deepcopy(unet)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(args.seed + 4)
    layers = adapt(student)
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    if path.exists():
        for name, state in torch.load(path, map_location=args.device).items():
            layers[name].load_state_dict(state)
        write(layers, args.out / "turbo")
        return

    teacher = copy.deepcopy(unet).half() if cuda else unet
    states, ids = [], []
    start = time.monotonic()
    batch = min(args.turbo_batch, args.turbo_clips)
    source = captions(text, batch, args.seed + 4, args.workers)
    for i in range(0, args.turbo_clips, batch):
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + i)
        token_ids = next(source).token_ids.to(args.device)
        noise = torch.randn((batch, *args.unet_shape), generator=generator, device=args.device)
        states.append(trajectories(teacher, text, token_ids, noise, GUIDANCE_SCALE, TEACHER_STEPS).half())
        ids.append(token_ids)
        log("teach", i + batch, args.turbo_clips, start)
    targets, token_ids = torch.cat(states, dim=1), torch.cat(ids)

    steps = student_steps()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)

    def predict(i: int, x: Tensor, context: Tensor) -> Tensor:
        """The clean sample that the student foresees at the beginning of step i."""
        v = student(x, torch.full((len(x),), steps[i].t, device=x.device), context)
        return steps[i].x0_from_x * x + steps[i].x0_from_prediction * v

    mean_loss, step = 0.0, 0
    start = time.monotonic()
    while (now := max(step / args.turbo_steps, (time.monotonic() - start) / 60 / args.turbo_minutes)) < 1:
        set_learning_rate(optimizer, LEARNING_RATE * cosine(now, 0.05))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        picks = torch.randint(len(token_ids), (args.turbo_batch,), generator=generator).to(args.device)
        i = step % STEPS
        with torch.no_grad():
            context = text.encoder(token_ids[picks])
            x = targets[i, picks].float()
            if i and now > 1 / 3 and step // STEPS % 2:  # where the student gets by itself
                x = targets[0, picks].float()
                for k in range(i):
                    x = steps[k].next_from_x * x + steps[k].next_from_x0 * predict(k, x, context)
            wanted = (targets[i + 1, picks].float() - steps[i].next_from_x * x) / steps[i].next_from_x0
        loss = (predict(i, x, context) - wanted).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 25 == 0:
            mean_loss += (float(loss.detach()) - mean_loss) / min(step // 25, 8)
            log("turbo", step, args.turbo_steps, start, loss=mean_loss, done=now)
    save({name: layer.state_dict() for name, layer in layers.items()}, path)
    write(layers, args.out / "turbo")


def write(layers: dict[str, LowRank], folder: Path) -> None:
    """PEFT's format, float16; the config says how a few-step model is sampled."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down.detach().cpu().half().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up.detach().cpu().half().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = {name: layer.down.shape[0] for name, layer in layers.items() if layer.down.shape[0] != RANK}
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "_t2v_distilled": {
            "name": RECIPE.name,
            "solver": RECIPE.solver,
            "default_steps": RECIPE.default_steps,
            "max_steps": RECIPE.max_steps,
        },
    }
    write_json(folder / "adapter_config.json", config)
    print(f"wrote {folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB")
