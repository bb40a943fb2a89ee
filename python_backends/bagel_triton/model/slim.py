"""Networks without the parts that a server never runs, left out from outside before their weights are read."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from torch import nn

Load = Literal["all", "understanding", "generation"]
LOADS: tuple[Load, ...] = get_args(Load)
#: Modules of the transformer that are left out, by name. The rows of an image's two vision tokens pass through the
#: understanding expert, so denoising needs both experts; an answer in text needs one.
_TRANSFORMER: dict[Load, str] = {
    "understanding": r"language_model\.model\.(layers\.\d+\.gen|norm_moe_gen)"
    r"|time_embedder|vae2llm|llm2vae|latent_pos_embed",
    "generation": r"language_model\.lm_head|vit_model|connector|vit_pos_embed",
}
_AUTOENCODER: dict[Load, str] = {"understanding": r"encoder|decoder", "generation": r"encoder"}


class LeftOut(nn.Module):
    """Stands where a module was left out; to call it is a defect."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a module was called that this server does not load")


def slim_transformer(module: nn.Module, load: Load) -> None:
    """Leave out of a :class:`~bagel_triton.model.bagel.Bagel` what ``load`` does without."""
    _leave_out(module, _TRANSFORMER.get(load))


def slim_autoencoder(module: nn.Module, load: Load) -> None:
    """Leave out of an :class:`~bagel_triton.model.autoencoder.Autoencoder` what ``load`` does without."""
    _leave_out(module, _AUTOENCODER.get(load))


def _leave_out(module: nn.Module, pattern: str | None) -> None:
    if pattern is None:
        return
    for name in [name for name, _ in module.named_modules() if re.fullmatch(pattern, name)]:
        module.set_submodule(name, LeftOut())
