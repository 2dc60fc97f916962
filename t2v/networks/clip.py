"""The text encoder: token ids -> context.

CLIP's text transformer (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv
2103.00020), as OpenCLIP trained its ViT-H/14. Parameter names and shapes are those of transformers' `CLIPTextModel`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.errors import WeightsError
from t2v.networks.config import Config

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """Hyper-parameters of `CLIPText`; the defaults are the 1.7B model's, without the last of CLIP's 24 layers."""

    FOLDER = "text_encoder"
    FILE_KEYS = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "projection_dim": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise WeightsError(f"text_encoder/config.json: hidden_act {self.hidden_act!r} is not supported")


class CLIPText(nn.Module):
    """Transformer with causal self-attention."""

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.max_position_embeddings, width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """(n, l) int64 token ids, l at most 77 -> (n, l, hidden_size), the normalised output of the last layer."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](positions)
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.final_layer_norm(x)


class Layer(nn.Module):
    """Pre-norm self-attention, then a pre-norm MLP, each with a residual connection."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        inner = config.intermediate_size
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(n, l, width) -> same."""
        x = x + self.attend(self.layer_norm1(x))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.self_attn[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (n, heads, l, width / heads)
        return self.self_attn["out_proj"](y.transpose(1, 2).flatten(2))
