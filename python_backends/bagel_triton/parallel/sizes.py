"""Which numbers of ranks a model and a configuration allow; free of torch, as the command line asks before a start."""

from __future__ import annotations

from bagel_triton.deploy.config import ConfigError, DeployConfig
from bagel_triton.model.config import LanguageConfig

MOST = 64  # of the sizes that an error lists


def divides(config: LanguageConfig, ranks: int) -> bool:
    """Whether heads, KV heads and the feed-forward can be shared by ``ranks``.

    A rank has whole heads, and the KV heads that they read: several, or one that other ranks have as well.
    """
    kv_heads = config.num_kv_heads
    shared = kv_heads % ranks == 0 or ranks % kv_heads == 0
    return config.num_heads % ranks == 0 and shared and config.intermediate_size % ranks == 0


def summary(config: DeployConfig) -> str:
    """The ranks of stage 1 in words; empty where it has one."""
    tensor, branches = config.dit.tensor_parallel_size, config.dit.cfg_parallel_size
    if config.stage_id == 0 or config.dit.ranks == 1:
        return ""
    shared = "heads" if tensor > 1 else "branches of guidance"
    return f"dit: {max(tensor, branches)} processes share the {shared}, by gloo"


def check(config: DeployConfig, language: LanguageConfig, device: str) -> None:
    """Refuse ranks that the checkpoint, the device or another setting does not allow.

    Raises:
        ConfigError: names the field, its value, and what is allowed.
    """
    dit = config.dit
    if dit.ranks == 1:
        return
    name = "tensor_parallel_size" if dit.tensor_parallel_size > 1 else "cfg_parallel_size"
    field = f"dit.{name}={getattr(dit, name)}"
    if dit.tensor_parallel_size > 1 and dit.cfg_parallel_size > 1:
        raise ConfigError(f"{field} with cfg_parallel_size={dit.cfg_parallel_size} is not supported; set one of them")
    if config.load == "understanding":
        raise ConfigError(f"{field} with load=understanding is not supported: nothing is drawn; set one of them")
    if config.lora_modules:
        raise ConfigError(
            f"{field} with lora_modules is not supported: ranks compute no adapters of requests; set one of them, or "
            "merge one adapter with lora_path"
        )
    if not device.startswith("cpu"):
        raise ConfigError(f"{field} is not supported on {device}: ranks are processes of a CPU today; allowed: 1")
    if dit.tensor_parallel_size > 1 and dit.quantization is not None:
        raise ConfigError(
            f"{field} with quantization={dit.quantization} is not supported: quantised weights are not cut; "
            "set one of them, or cfg_parallel_size"
        )
    if not divides(language, dit.tensor_parallel_size):
        allowed = ", ".join(str(size) for size in range(1, MOST + 1) if divides(language, size))
        raise ConfigError(
            f"{field} does not divide the checkpoint's {language.num_heads} heads, {language.num_kv_heads} KV heads "
            f"and feed-forward of {language.intermediate_size}; allowed: {allowed}"
        )
