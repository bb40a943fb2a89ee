"""Whether a GPU can still be used."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def is_lost(device: torch.device) -> bool:
    """Whether whatever is asked of ``device`` fails, as after an illegal access: CUDA repeats that error for ever.

    An error that was a call's own, too little memory for example, is over with that call.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
