"""The autoencoder: latents <-> pixels, frame by frame.

The convolutional autoencoder of latent diffusion, regularised by a KL term (Rombach et al., "High-Resolution Image
Synthesis with Latent Diffusion Models", arXiv 2112.10752). Parameter names and shapes are those of diffusers'
`AutoencoderKL`. Maps are (n, c, h, w) in torch's channels_last memory.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from t2v.errors import WeightsError
from t2v.networks import fused
from t2v.networks.config import Config
from t2v.networks.layers import Conv, Upsample

EPS = 1e-6  # of every group norm


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """Hyper-parameters of `Autoencoder`; the defaults are those of the 1.7B model.

    Attributes:
        scaling_factor: factor from the network's latents to those that the denoiser sees; `VAE` applies it.
    """

    FOLDER = "vae"
    REQUIRED_VALUES = {
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    }
    FILE_KEYS = {"_class_name": "AutoencoderKL", "act_fn": "silu"}

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        kinds = {*self.down_block_types, *self.up_block_types} == {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        levels = {len(self.block_out_channels), len(self.down_block_types), len(self.up_block_types)}
        if not kinds or len(levels) > 1:
            raise WeightsError(f"vae/config.json describes no AutoencoderKL of this family: {self}")


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = Conv(2 * c, 2 * c, 1)
        self.post_quant_conv = Conv(c, c, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """Pixels in -1 ... 1, (n, 3, H, W) -> (n, latent_channels, h, w), the means of the encoder's distributions.

        Their variances are used in training only.
        """
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        """(n, latent_channels, h, w) -> pixels in about -1 ... 1, (n, 3, H, W)."""
        return self.decoder(self.post_quant_conv(z))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], 3)
        self.down_blocks = nn.ModuleList(
            Level(c_in, c_out, config.layers_per_block, groups) for c_in, c_out in pairwise((widths[0], *widths))
        )
        for level, c in zip(self.down_blocks, widths[:-1]):
            level.downsamplers = nn.ModuleList([Downsample(c)])
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, H, W) -> (n, 2 latent_channels, h, w): means and logarithms of variances."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(fused.group_norm(self.conv_norm_out, self.mid_block(x), silu=True))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(c_in, c_out, config.layers_per_block + 1, groups) for c_in, c_out in pairwise((widths[0], *widths))
        )
        for level, c in zip(self.up_blocks, widths[:-1]):
            level.upsamplers = nn.ModuleList([Upsample(c)])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv(widths[-1], config.out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent_channels, h, w) -> (n, out_channels, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(fused.group_norm(self.conv_norm_out, x, silu=True))


class Level(nn.Module):
    """Residual blocks of one resolution; encoder and decoder add the layer that leads to the next one."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_out if i else c_in, c_out, groups) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h, w), or half or twice as high and wide."""
        for parts in self.children():
            for part in parts.children():
                x = part(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c, c, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=EPS)
        self.conv1 = Conv(c_in, c_out, 3)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=EPS)
        self.conv2 = Conv(c_out, c_out, 3)
        self.conv_shortcut = Conv(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h, w)."""
        h, bias = self.conv1.apart(fused.group_norm(self.norm1, x, silu=True))
        h, bias = self.conv2.apart(fused.group_norm(self.norm2, h, silu=True, bias=bias))
        return fused.add(h, x if self.conv_shortcut is None else self.conv_shortcut(x), bias)


class Attention(nn.Module):
    """Self-attention within a frame, with one head."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=EPS)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> same."""
        tokens = fused.group_norm(self.group_norm, x).permute(0, 2, 3, 1).flatten(1, 2)[:, None]  # (n, 1, h*w, c)
        y = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](y).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Half the size. Zeros are padded at the bottom and the right only."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h // 2, w // 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))
