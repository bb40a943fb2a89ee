"""The SigLIP encoder that reads images, and the connector into the transformer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.config import VitConfig


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class VitAttention(nn.Module):
    """Full attention over one image's patches."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        size = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [patches, hidden], same shape out."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(0, 1).unsqueeze(0)  # [1, heads, patches, head_dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.squeeze(0).transpose(0, 1).flatten(1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU; the ViT's, and the connector."""

    def __init__(self, size_in: int, hidden: int, size_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size_in, hidden), nn.Linear(hidden, size_out)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        return self.fc2(_gelu(self.fc1(x)))  # type: ignore[no-any-return]


class VitLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VitAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [patches, hidden], same shape out."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class VitEmbeddings(nn.Module):
    """Patches and their positions; the patch embedding is a linear layer already."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.side = config.patches_per_side
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, patches: Tensor, index: Tensor) -> Tensor:
        """patches [n, 3 * patch * patch] and table rows ``index`` [n] -> [n, hidden]."""
        return self.patch_embedding(patches) + self.position_embedding(index)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Embeddings, layers, and the norm after them."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = VitEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VitLayer(config) for _ in range(config.num_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, index: Tensor) -> Tensor:
        """Features of one image: [n, 3 * patch * patch] -> [n, hidden]."""
        x = self.embeddings(patches, index)
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        return self.post_layernorm(x)  # type: ignore[no-any-return]


class VisionModel(nn.Module):
    """One level of naming that the checkpoint has."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)
