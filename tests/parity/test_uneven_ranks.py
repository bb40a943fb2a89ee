"""Checkpoints whose heads few numbers divide: ranks give what one gives, and other sizes are refused with those."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import msgspec
import pytest

from bagel_triton.deploy.config import ConfigError, DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.model.config import LanguageConfig
from bagel_triton.parallel import sizes
from bagel_triton.weights.checkpoint import inspect
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from tests.conftest import OTHER
from tests.parity.test_ranks import check_mixed_load, stages_of

# By heads/KV heads/feed-forward.
GEOMETRIES = {
    "8/1/172": OTHER,
    "6/2/90": TinyConfig(hidden_size=72, heads=6, kv_heads=2, intermediate_size=90, seed=1),
    "12/4/88": TinyConfig(hidden_size=72, heads=12, kv_heads=4, intermediate_size=88, seed=2),
    "7/1/70": TinyConfig(hidden_size=56, heads=7, kv_heads=1, intermediate_size=70, vae_channels=96, seed=3),
    "14/2/99": TinyConfig(hidden_size=84, heads=14, kv_heads=2, intermediate_size=99, seed=4),
    "28/4/62": TinyConfig(hidden_size=112, heads=28, kv_heads=4, intermediate_size=62, seed=5),
}
MOST = 16  # of the sizes that are tried
BOTH = ThinkerConfig(tensor_parallel_size=2), DitConfig(tensor_parallel_size=2)
ONE = ThinkerConfig()
hsdp = partial(DitConfig, use_hsdp=True)


@pytest.fixture(scope="module")
def uneven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "uneven"
    tiny_checkpoint.write(directory, GEOMETRIES[request.param])
    return directory


@pytest.mark.long
@pytest.mark.parametrize(
    ("uneven", "thinker", "dit", "decoders"),
    [
        ("8/1/172", ThinkerConfig(tensor_parallel_size=4), DitConfig(tensor_parallel_size=4), 1),
        ("8/1/172", ONE, DitConfig(cfg_parallel_size=4), 1),  # most requests have fewer branches
        ("8/1/172", ONE, DitConfig(ulysses_degree=4), 1),
        ("8/1/172", BOTH[0], DitConfig(tensor_parallel_size=2, ulysses_degree=2), 1),
        ("6/2/90", *BOTH, 2),
        ("6/2/90", ONE, DitConfig(tensor_parallel_size=2, ulysses_degree=3), 3),
        ("6/2/90", ThinkerConfig(tensor_parallel_size=6), DitConfig(), 4),
        ("12/4/88", ThinkerConfig(tensor_parallel_size=4), DitConfig(tensor_parallel_size=4), 3),
        ("12/4/88", ONE, DitConfig(ulysses_degree=2, cfg_parallel_size=2), 4),
        ("7/1/70", ThinkerConfig(tensor_parallel_size=7), DitConfig(tensor_parallel_size=7), 1),
        ("7/1/70", ONE, DitConfig(cfg_parallel_size=3), 3),
        ("7/1/70", ONE, hsdp(hsdp_shard_size=3), 2),
        ("14/2/99", ONE, hsdp(hsdp_shard_size=2, hsdp_replicate_size=2), 1),
        ("14/2/99", ONE, hsdp(hsdp_shard_size=4, cfg_parallel_size=2, ulysses_degree=2), 1),
        ("14/2/99", ONE, hsdp(hsdp_shard_size=-1, ulysses_degree=2), 2),
        ("28/4/62", *BOTH, 1),
        ("28/4/62", ONE, DitConfig(ulysses_degree=4), 4),
        ("28/4/62", ONE, hsdp(ulysses_degree=4, hsdp_shard_size=2, hsdp_replicate_size=2), 1),
    ],
    indirect=["uneven"],
    ids=lambda value: str(value) if isinstance(value, str | int) else "",
)
def test_ranks_give_what_one_does(uneven: Path, thinker: ThinkerConfig, dit: DitConfig, decoders: int) -> None:
    several = stages_of(uneven, thinker, dit, VaeDecodeConfig(patch_parallel_size=decoders))
    try:
        check_mixed_load(several, uneven)
    finally:
        several.close()


@pytest.mark.parametrize("uneven", GEOMETRIES, indirect=True)
@pytest.mark.parametrize("field", ["thinker.tensor_parallel_size", "dit.tensor_parallel_size", "dit.ulysses_degree"])
def test_a_size_is_served_or_refused_with_those_that_are(uneven: Path, field: str) -> None:
    language = inspect(str(uneven)).language
    refused = {size: said for size in range(1, MOST + 1) if (said := refusal(language, field, size)) is not None}
    served = [size for size in range(1, MOST + 1) if size not in refused]
    assert 1 in served
    for size, said in refused.items():
        assert said.startswith(f"{field}={size} does not divide the checkpoint's {language.num_heads} heads")
        found = re.search(r"; allowed: ([\d, ]+)$", said)
        assert found is not None
        assert [allowed for allowed in map(int, found[1].split(", ")) if allowed <= MOST] == served


def refusal(language: LanguageConfig, field: str, size: int) -> str | None:
    """What the configuration's check says of so many ranks; None where it takes them."""
    stage, _, name = field.partition(".")
    config = DeployConfig(checkpoint="unread")
    config = msgspec.structs.replace(config, **{stage: msgspec.structs.replace(getattr(config, stage), **{name: size})})
    try:
        sizes.check(config, language)
    except ConfigError as error:
        return str(error)
    return None
