"""The denoiser: noisy latents, timestep, context -> the network's prediction.

UNet3D is the network of the ModelScope text-to-video family (Wang et al., "ModelScope Text-to-Video Technical
Report", arXiv 2308.06571): a 2D latent-diffusion U-Net whose every residual block is followed by a temporal
convolution and whose every spatial transformer is followed by a temporal one. Parameter names and shapes are those of
diffusers' `UNet3DConditionModel`, so its checkpoints load with `strict=True`.

Activations live in one layout from end to end: `(b, F, h, w, c)`, contiguous, channels last. In that memory

- a spatial convolution sees `(b*F, c, h, w)` in torch's channels_last format,
- a temporal convolution is a 2D convolution with a (3, 1) kernel over an image of F rows and h*w columns,
- every linear layer and layer norm works on the last axis,

and all of these are views. Only a temporal transformer copies, because the frames are its sequence: once at its
beginning and once at its end.

Nothing is computed twice. The keys and values of the text are the same for all frames and all steps, and the timestep
terms do not depend on the latents. A request computes both once (`UNet3D.project_text`, `UNet3D.project_timesteps`),
and a step (`UNet3D.forward_projected`) only reads them. The two rows of a guided pair share their latents, so they
differ only from the first cross-attention on: the part before it runs on a batch of one and broadcasts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.errors import WeightsError
from t2v.networks import fused
from t2v.networks.config import Config
from t2v.networks.convolution import conv2d_same
from t2v.networks.layers import Conv, Upsample
from t2v.networks.transformer import TransformerBlock

TimeTerms = list[Tensor]  # (b or 1, c) for each residual block
TextKV = list[tuple[Tensor, Tensor]]  # keys and values (b, heads, n, head_dim) for each cross-attention

# The first temporal transformer always has 8 heads, whatever its width; the original hard-codes it.
TRANSFORMER_IN_HEADS = 8

# Number of values that are held at the peak for each latent position, counted. PEAK_VALUES is for the last block of the
# way up, per row, in units of the first width; PEAK_VALUES_IN for the first temporal transformer, which always computes
# one row, in units of its own width.
PEAK_VALUES = 21
PEAK_VALUES_IN = 15

# Sinusoids of the guidance scale, for distilled models that take it as an input.
GUIDANCE_EMBEDDING = 256


@dataclass(frozen=True)
class UNet3DConfig(Config):
    """Hyper-parameters of `UNet3D`; the defaults are those of the 1.7B model."""

    FOLDER = "unet"
    REQUIRED_VALUES = {
        "act_fn": "silu",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "time_cond_proj_dim": None,
        "num_attention_heads": None,
    }
    IGNORED_KEYS = frozenset({"sample_size"})
    FILE_KEYS = {
        "_class_name": "UNet3DConditionModel",
        "act_fn": "silu",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    }

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",)
    up_block_types: tuple[str, ...] = ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3
    layers_per_block: int = 2
    cross_attention_dim: int = 1024
    attention_head_dim: int = 64
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        down_ok = set(self.down_block_types) <= {"CrossAttnDownBlock3D", "DownBlock3D"}
        up_ok = set(self.up_block_types) <= {"CrossAttnUpBlock3D", "UpBlock3D"}
        levels = {len(self.block_out_channels), len(self.down_block_types), len(self.up_block_types)}
        if not (down_ok and up_ok and len(levels) == 1 and isinstance(self.attention_head_dim, int)):
            raise WeightsError(f"unet/config.json does not describe a text-to-video UNet3D: {self}")


class UNet3D(nn.Module):
    """Predicts the noise in a noisy latent video, or its velocity, as the checkpoint was trained."""

    def __init__(self, config: UNet3DConfig = UNet3DConfig()):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        temb = 4 * widths[0]

        self.conv_in = Conv(config.in_channels, widths[0], 3)
        self.time_embedding = TimestepEmbedding(widths[0], temb)
        self.transformer_in = TemporalTransformer(
            widths[0], TRANSFORMER_IN_HEADS, config.attention_head_dim, config.norm_num_groups
        )

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of every map that the way up concatenates, in the order in which they are made
        for level, kind in enumerate(config.down_block_types):
            c_in, c_out = widths[max(level - 1, 0)], widths[level]
            last = level == len(widths) - 1
            c_ins = [c_in] + [c_out] * (config.layers_per_block - 1)
            self.down_blocks.append(
                Block(config, c_ins, c_out, temb, kind.startswith("CrossAttn"), resample=None if last else "down")
            )
            skips += [c_out] * (config.layers_per_block if last else config.layers_per_block + 1)

        self.mid_block = MidBlock(config, widths[-1], temb)

        self.up_blocks = nn.ModuleList()
        c = widths[-1]
        for level, kind in zip(reversed(range(len(widths))), config.up_block_types):
            c_out = widths[level]
            c_ins = []
            for _ in range(config.layers_per_block + 1):
                c_ins.append(c + skips.pop())
                c = c_out
            self.up_blocks.append(
                Block(config, c_ins, c_out, temb, kind.startswith("CrossAttn"), resample="up" if level else None)
            )

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = Conv(widths[0], config.out_channels, 3)

        # The blocks that read the timestep and the text, in the order of their terms. Tuples, so that torch does not
        # list them as submodules twice.
        self.res_blocks = tuple(m for m in self.modules() if isinstance(m, ResBlock))
        self.cross_attention_blocks = tuple(m for m in self.modules() if isinstance(m, SpatialTransformer))
        for index, res_block in enumerate(self.res_blocks):
            res_block.index = index
        for index, block in enumerate(self.cross_attention_blocks):
            block.index = index

    def forward(self, latents: Tensor, t: int | Tensor, context: Tensor) -> Tensor:
        """Predict.

        Args:
            latents: (b, in_channels, F, h, w), any F, h, w >= 1; or (1, ...), shared by the b rows of the context.
            t: diffusion timestep, an int or a tensor of shape () or (b,) of the latents.
            context: (b, n, cross_attention_dim) text embeddings, n is 77 with CLIP.

        Returns:
            (b, out_channels, F, h, w), dtype of `latents`.
        """
        t = torch.as_tensor(t, device=latents.device).reshape(-1)
        return self.forward_projected(latents, self.project_timesteps(t), self.project_text(context))

    def peak_bytes(self, rows: int, shape: tuple[int, ...]) -> int:
        """Bytes that a forward pass takes at its peak, beside the weights.

        Args:
            rows: 1 or 2.
            shape: (1, channels, F, h, w) of the latents.
        """
        _, _, n, h, w = shape
        values = max(
            PEAK_VALUES * rows * self.config.block_out_channels[0],
            PEAK_VALUES_IN * TRANSFORMER_IN_HEADS * self.config.attention_head_dim,
        )
        return values * n * h * w * self.conv_in.weight.element_size()

    def project_timesteps(self, t: Tensor, guidance_scale: float | None = None) -> Tensor:
        """The timestep terms of all residual blocks side by side: (n,) -> (n, d).

        Args:
            guidance_scale: for a network that takes it as an input (see `TimestepEmbedding.add_guidance`).
        """
        temb = F.silu(self.time_embedding(t, guidance_scale))
        return torch.cat([block.time_emb_proj(temb) for block in self.res_blocks], dim=-1)

    def project_text(self, context: Tensor) -> Tensor:
        """The keys and values of all cross-attentions side by side: (b, n, cross_attention_dim) -> (b, n, d)."""
        return torch.cat([y for block in self.cross_attention_blocks for y in block.keys_values(context)], dim=-1)

    def forward_projected(self, latents: Tensor, timestep_terms: Tensor, text_kv: Tensor) -> Tensor:
        """`forward` with projections that were computed before.

        Args:
            latents: as in `forward`.
            timestep_terms: (b or 1, d) rows of `project_timesteps`.
            text_kv: (b, n, d) of `project_text`.
        """
        terms = list(timestep_terms.split([block.conv1.out_channels for block in self.res_blocks], dim=-1))
        parts = text_kv.split([block.width for block in self.cross_attention_blocks for _ in "kv"], dim=-1)
        kv = [block.split(k, v) for block, k, v in zip(self.cross_attention_blocks, parts[::2], parts[1::2])]

        x = latents.permute(0, 2, 3, 4, 1).contiguous()  # (b, F, h, w, c) from here to the last line
        x = conv2d(self.conv_in, x)
        x = self.transformer_in(x)

        skips = [x]
        for block in self.down_blocks:
            x = block.down(x, terms, kv, skips)
        x = self.mid_block(x, terms, kv)
        for block in self.up_blocks:
            x = block.up(x, terms, kv, skips)

        x = conv2d(self.conv_out, frame_norm(self.conv_norm_out, x, silu=True))
        return x.permute(0, 4, 1, 2, 3)


class Block(nn.Module):
    """One resolution of the way down or up: per layer residual, temporal convolution and, if `attention`, the two
    transformers; then a resampling."""

    def __init__(
        self, config: UNet3DConfig, c_ins: list[int], c_out: int, temb: int, attention: bool, resample: str | None
    ):
        super().__init__()
        groups = config.norm_num_groups
        heads, head_dim = c_out // config.attention_head_dim, config.attention_head_dim
        self.resnets = nn.ModuleList(ResBlock(c_in, c_out, temb, groups, config.norm_eps) for c_in in c_ins)
        self.temp_convs = nn.ModuleList(TemporalConvs(c_out, groups) for _ in c_ins)
        self.attentions = nn.ModuleList()
        self.temp_attentions = nn.ModuleList()
        if attention:
            for _ in c_ins:
                self.attentions.append(SpatialTransformer(c_out, heads, head_dim, groups, config.cross_attention_dim))
                self.temp_attentions.append(TemporalTransformer(c_out, heads, head_dim, groups))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def layer(self, i: int, x: Tensor, time_terms: TimeTerms, text_kv: TextKV) -> Tensor:
        x = self.temp_convs[i](self.resnets[i](x, time_terms))
        if self.attentions:
            x = self.temp_attentions[i](self.attentions[i](x, text_kv))
        return x

    def down(self, x: Tensor, time_terms: TimeTerms, text_kv: TextKV, skips: list[Tensor]) -> Tensor:
        """Appends every map that it makes to `skips`."""
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time_terms, text_kv)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x

    def up(self, x: Tensor, time_terms: TimeTerms, text_kv: TextKV, skips: list[Tensor]) -> Tensor:
        """Takes the maps that it concatenates from `skips`, and enlarges the result to the size of the next one."""
        for i in range(len(self.resnets)):
            skip = skips.pop().expand(x.shape[0], -1, -1, -1, -1)
            x = self.layer(i, torch.cat([x, skip], dim=-1), time_terms, text_kv)
        if hasattr(self, "upsamplers"):
            x = unfold_frames(self.upsamplers[0](fold_frames(x), skips[-1].shape[2:4]), x.shape[0])
        return x


class MidBlock(nn.Module):
    def __init__(self, config: UNet3DConfig, c: int, temb: int):
        super().__init__()
        groups, head_dim = config.norm_num_groups, config.attention_head_dim
        self.resnets = nn.ModuleList(ResBlock(c, c, temb, groups, config.norm_eps) for _ in range(2))
        self.temp_convs = nn.ModuleList(TemporalConvs(c, groups) for _ in range(2))
        self.attentions = nn.ModuleList(
            [SpatialTransformer(c, c // head_dim, head_dim, groups, config.cross_attention_dim)]
        )
        self.temp_attentions = nn.ModuleList([TemporalTransformer(c, c // head_dim, head_dim, groups)])

    def forward(self, x: Tensor, time_terms: TimeTerms, text_kv: TextKV) -> Tensor:
        x = self.temp_convs[0](self.resnets[0](x, time_terms))
        x = self.temp_attentions[0](self.attentions[0](x, text_kv))
        return self.temp_convs[1](self.resnets[1](x, time_terms))


class ResBlock(nn.Module):
    """Two 3x3 convolutions on each frame; the timestep is added between them."""

    def __init__(self, c_in: int, c_out: int, temb: int, groups: int, eps: float):
        super().__init__()
        self.index = 0  # of its timestep term
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = Conv(c_in, c_out, 3)
        self.time_emb_proj = nn.Linear(temb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = Conv(c_out, c_out, 3)
        self.conv_shortcut = Conv(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time_terms: TimeTerms) -> Tensor:
        """(b, F, h, w, c_in) -> (b, F, h, w, c_out)."""
        images = fold_frames(x)
        h, bias = self.conv1.apart(fused.group_norm(self.norm1, images, silu=True))
        h, bias = self.conv2.apart(fused.group_norm(self.norm2, h, silu=True, bias=bias, term=time_terms[self.index]))
        shortcut = images if self.conv_shortcut is None else self.conv_shortcut(images)
        return unfold_frames(fused.add(h, shortcut, bias), x.shape[0])


class TemporalConvs(nn.Module):
    """Four norm + SiLU + (3,1,1) convolutions along the frames, around a residual connection."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        # The checkpoint's names: norm, activation, (dropout,) convolution as entries of a sequence.
        self.conv1 = nn.ModuleDict({"0": nn.GroupNorm(groups, c), "2": TemporalConv(c)})
        self.conv2 = nn.ModuleDict({"0": nn.GroupNorm(groups, c), "3": TemporalConv(c)})
        self.conv3 = nn.ModuleDict({"0": nn.GroupNorm(groups, c), "3": TemporalConv(c)})
        self.conv4 = nn.ModuleDict({"0": nn.GroupNorm(groups, c), "3": TemporalConv(c)})

    def forward(self, x: Tensor) -> Tensor:
        image = h = x.flatten(2, 3).permute(0, 3, 1, 2)  # (b, c, F, h*w), channels last
        bias = None
        for stage in (self.conv1, self.conv2, self.conv3, self.conv4):
            norm, conv = stage.values()
            h, bias = conv.apart(fused.group_norm(norm, h, silu=True, bias=bias))
        return fused.add(h, image, bias).permute(0, 2, 3, 1).contiguous().view(x.shape)


class TemporalConv(nn.Module):
    """Convolution over three neighbouring frames at each pixel.

    The weight has the checkpoint's Conv3d shape (c, c, 3, 1, 1); on channels-last memory the same arithmetic is a 2D
    convolution, which both oneDNN and cuDNN run several times faster.
    """

    def __init__(self, c: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c, c, 3, 1, 1))
        self.bias = nn.Parameter(torch.empty(c))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -1 / math.sqrt(3 * c), 1 / math.sqrt(3 * c))

    def forward(self, image: Tensor) -> Tensor:
        """(b, c, F, pixels) -> same."""
        return conv2d_same(image, self.weight[..., 0], self.bias)

    def apart(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Conv.apart`."""
        if fused.runs("bias", image):
            return conv2d_same(image, self.weight[..., 0], None), self.bias
        return self(image), None


class SpatialTransformer(nn.Module):
    """Self-attention within each frame, cross-attention to the text, feed-forward."""

    def __init__(self, c: int, heads: int, head_dim: int, groups: int, context_dim: int):
        super().__init__()
        self.index = 0  # of its keys and values
        self.width = inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, context_dim)])
        self.proj_out = nn.Linear(inner, c)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, context_dim) -> keys and values, (b, n, width) each."""
        attention = self.transformer_blocks[0].attn2
        return attention.to_k(context), attention.to_v(context)

    def split(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, n, width) -> (b, heads, n, head_dim)."""
        attention = self.transformer_blocks[0].attn2
        return attention.split(k), attention.split(v)

    def forward(self, x: Tensor, text_kv: TextKV) -> Tensor:
        """x (b, F, h, w, c), or (1, ...) for all rows of the text -> (b, F, h, w, c)."""
        block = self.transformer_blocks[0]
        h = self.proj_in(frame_norm(self.norm, x))
        tokens = fused.layer_norm(block.norm1, h).flatten(0, 1).flatten(1, 2)  # (b*F, h*w, width)
        h, normed = fused.add_and_layer_norm(block.norm2, h, block.attn1.to_itself(tokens).view(h.shape))
        h, normed = fused.add_and_layer_norm(block.norm3, h, block.attn2.to_text(normed, *text_kv[self.index]))
        h = h + block.ff(normed)
        return x + self.proj_out(h)


class TemporalTransformer(nn.Module):
    """Two self-attentions along the frames at each pixel, feed-forward."""

    def __init__(self, c: int, heads: int, head_dim: int, groups: int):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, inner)])
        self.proj_out = nn.Linear(inner, c)

    def forward(self, x: Tensor) -> Tensor:
        """(b, F, h, w, c) -> (b, F, h, w, c)."""
        block = self.transformer_blocks[0]
        h = self.proj_in(fused.group_norm_by_pixel(self.norm, x))  # (b*h*w, F, inner)
        h, normed = fused.add_and_layer_norm(block.norm2, h, block.attn1.to_itself(fused.layer_norm(block.norm1, h)))
        h, normed = fused.add_and_layer_norm(block.norm3, h, block.attn2.to_itself(normed))
        h = h + block.ff(normed)
        return fused.add_by_pixel(x, self.proj_out(h))


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(self.conv, x)


class TimestepEmbedding(nn.Module):
    """Sinusoids [cos, sin] of the timestep, then two linear layers."""

    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.c = c
        self.linear_1 = nn.Linear(c, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)
        self.cond_proj: nn.Linear | None = None

    def add_guidance(self) -> None:
        """Add the guidance scale as an input (Meng et al., arXiv 2210.03142), with a projection of zeros."""
        weight = self.linear_1.weight
        self.cond_proj = nn.Linear(GUIDANCE_EMBEDDING, self.c, bias=False, device=weight.device, dtype=weight.dtype)
        self.cond_proj.requires_grad_(False).weight.zero_()

    def forward(self, t: Tensor, guidance: float | None = None) -> Tensor:
        """t (n,) -> (n, c_out)."""
        half = self.c // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        if self.cond_proj is not None:
            assert guidance is not None, "this network takes the guidance scale as an input"
            half = GUIDANCE_EMBEDDING // 2
            rates = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / (half - 1))
            angles = 1000 * guidance * rates
            waves = waves + self.cond_proj(torch.cat([angles.sin(), angles.cos()]).to(waves.dtype))
        return self.linear_2(F.silu(self.linear_1(waves)))


def fold_frames(x: Tensor) -> Tensor:
    """(b, F, h, w, c) -> (b*F, c, h, w), a channels_last view."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def unfold_frames(y: Tensor, b: int) -> Tensor:
    """(b*F, c, h, w) -> (b, F, h, w, c); a view when `y` is channels_last, which convolutions of such input return."""
    return y.permute(0, 2, 3, 1).contiguous().unflatten(0, (b, -1))


def conv2d(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2D convolution to every frame of (b, F, h, w, c)."""
    return unfold_frames(conv(fold_frames(x)), x.shape[0])


def frame_norm(norm: nn.Module, x: Tensor, silu: bool = False) -> Tensor:
    """Group norm with statistics of each frame of (b, F, h, w, c), then SiLU if `silu`."""
    return unfold_frames(fused.group_norm(norm, fold_frames(x), silu), x.shape[0])
