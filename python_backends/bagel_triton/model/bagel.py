"""BAGEL's transformer with the projections of the flow into and out of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bagel_triton.model.config import ModelConfig
from bagel_triton.model.image import patchified
from bagel_triton.model.mot import Transformer
from bagel_triton.model.vit import Mlp, VisionModel

TIMESTEP_CHANNELS = 256
MAX_PERIOD = 10000.0


class LanguageModel(nn.Module):
    """The transformer and its vocabulary head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Transformer(config.language)
        self.lm_head = nn.Linear(config.language.hidden_size, config.language.vocab_size, bias=False)


class TimestepEmbedder(nn.Module):
    """Embeds a flow time in [0, 1]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_CHANNELS, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, times: Tensor) -> Tensor:
        """times [n] float32 -> [n, hidden]."""
        half = TIMESTEP_CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=times.device)
        angles = times.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)  # [n, 256]
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # type: ignore[no-any-return, arg-type]


def grid_index(rows: int, columns: int, side: int) -> Tensor:
    """Row-major indices of the top-left ``rows`` x ``columns`` of a ``side`` x ``side`` table."""
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).flatten()


class PositionTable(nn.Module):
    """A learned or sinusoidal table of 2-D positions, row-major over a square grid."""

    def __init__(self, side: int, hidden_size: int) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side * side, hidden_size))

    def forward(self, rows: int, columns: int) -> Tensor:
        """Embeddings of the top-left ``rows`` x ``columns`` grid: [rows * columns, hidden]."""
        return self.pos_embed[grid_index(rows, columns, self.side).to(self.pos_embed.device)]


class Bagel(nn.Module):
    """The whole network but for the autoencoder.

    Its parameters have the checkpoint's names, but for the layers of the transformer:
    ``weights/checkpoint.py`` has the tensors that are packed into each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.language.hidden_size
        self.language_model = LanguageModel(config)
        self.time_embedder = TimestepEmbedder(hidden)
        self.vae2llm = nn.Linear(config.latent.token_channels, hidden)
        self.llm2vae = nn.Linear(hidden, config.latent.token_channels)
        self.latent_pos_embed = PositionTable(config.latent.max_latent_size, hidden)
        self.vit_model = VisionModel(config.vit)
        self.connector = Mlp(config.vit.hidden_size, hidden, hidden)
        self.vit_pos_embed = PositionTable(config.vit.patches_per_side, hidden)

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return self.language_model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the transformer computes in."""
        return self.language_model.model.norm.weight.dtype

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """Token embeddings: [tokens] int64 -> [tokens, hidden]."""
        return self.language_model.model.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def embed_latents(self, latents: Tensor, time: Tensor, positions: Tensor) -> Tensor:
        """Latent tokens at one flow time.

        Args:
            latents: [tokens, token_channels] float32.
            time: [1, hidden], from ``time_embedder``.
            positions: [tokens, hidden], from ``latent_pos_embed``.

        Returns:
            [tokens, hidden].
        """
        return self.vae2llm(latents.to(self.dtype)) + time + positions  # type: ignore[no-any-return]

    def embed_image(self, pixels: Tensor) -> Tensor:
        """An image for understanding: pixels [height, width, 3] in [-1, 1] -> [patches, hidden]."""
        vit = self.config.vit
        rows, columns = pixels.shape[0] // vit.patch_size, pixels.shape[1] // vit.patch_size
        patches = patchified(pixels, vit.patch_size).to(self.device, self.dtype)
        index = grid_index(rows, columns, vit.patches_per_side).to(self.device)
        features = self.vit_model.vision_model(patches, index)
        return self.connector(features) + self.vit_pos_embed(rows, columns)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores of understanding tokens, before the final norm.

        hidden [tokens, hidden] -> [tokens, vocabulary].
        """
        return self.language_model.lm_head(self.language_model.model.norm(hidden))  # type: ignore[no-any-return]

    def velocity(self, hidden: Tensor) -> Tensor:
        """The flow's velocity of latent tokens' last hidden states, before the final norm.

        hidden [tokens, hidden] -> [tokens, token_channels].
        """
        return self.llm2vae(self.language_model.model.norm_moe_gen(hidden))  # type: ignore[no-any-return]
