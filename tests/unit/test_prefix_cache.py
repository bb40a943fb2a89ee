"""What is kept of a context serves the next request that begins alike, and makes way when blocks are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bagel_triton.deploy.config import DeployConfig, ThinkerConfig
from bagel_triton.engine.thinker import branch_state
from bagel_triton.kv.block_pool import KVSequence, PrefixCache
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest, ImageRef, TextPart, Turn
from tests.support.exact import assert_same
from tests.support.images import png
from tests.support.kv import GEOMETRY, append, contents_of, new_arena, read
from tests.support.nearness import relative_rms
from tests.support.runs import generate
from tests.support.waiting import soon

SIZE = GEOMETRY.block_tokens


def keys(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_what_is_kept_outlives_its_maker_and_is_taken_without_a_copy() -> None:
    pool = new_arena(8)
    cache, maker = PrefixCache(pool), KVSequence(pool)
    append(pool, maker, range(SIZE + 2))
    cache.keep(keys("a", "ab"), maker)
    blocks = list(maker.blocks)
    maker.free()
    taken = cache.take(keys("a", "ab"))
    assert (taken.blocks, taken.tokens, taken.next_position) == (blocks, SIZE + 2, SIZE + 2)
    append(pool, taken, [90])  # the half-filled block is copied, so that what is kept stays as it was
    assert torch.equal(read(pool, cache.take(keys("ab"))), contents_of(range(SIZE + 2)))
    assert torch.equal(read(pool, taken), contents_of([*range(SIZE + 2), 90]))


def test_the_longest_that_is_kept_is_found() -> None:
    pool = new_arena(8)
    cache, context = PrefixCache(pool), KVSequence(pool)
    for length in (1, 3):
        append(pool, context, [length])
        cache.keep(keys("a", "ab", "abc")[:length], context)
    assert cache.longest(keys("a", "ab", "abc", "abcd")) == 3
    assert cache.longest(keys("a", "ab")) == 1
    assert cache.longest(keys("b")) == 0
    assert cache.longest([]) == 0


def test_cached_blocks_count_as_free_only_while_no_sequence_holds_them() -> None:
    pool = new_arena(8)
    cache, context = PrefixCache(pool), KVSequence(pool)
    append(pool, context, range(2 * SIZE))
    cache.keep(keys("a"), context)
    assert cache.blocks == 0
    context.free()
    assert cache.blocks == 2
    taken = cache.take(keys("a"))
    assert cache.blocks == 0
    taken.free()


def test_the_least_recently_used_makes_way_and_the_end_of_a_chain_before_its_beginning() -> None:
    pool = new_arena(4)
    cache = PrefixCache(pool)
    chain = KVSequence(pool)
    append(pool, chain, range(SIZE))
    cache.keep(keys("a"), chain)
    append(pool, chain, range(SIZE))
    cache.keep(keys("a", "ab"), chain)
    chain.free()
    other = KVSequence(pool)
    append(pool, other, range(SIZE))
    cache.keep(keys("x"), other)
    other.free()
    grower = KVSequence(pool)
    grower.extend(2 * SIZE)  # one block is free, one has to be given up
    assert (cache.longest(keys("a", "ab")), cache.longest(keys("x"))) == (1, 1)
    grower.extend(SIZE)
    assert (cache.longest(keys("a", "ab")), cache.longest(keys("x"))) == (0, 1)
    grower.extend(SIZE)
    assert len(cache) == 0


def test_what_others_hold_too_is_kept_as_long_as_dropping_it_frees_nothing() -> None:
    pool = new_arena(4)
    cache, holder = PrefixCache(pool), KVSequence(pool)
    append(pool, holder, range(2 * SIZE))
    cache.keep(keys("held"), holder)
    KVSequence(pool).extend(2 * SIZE)
    assert cache.longest(keys("held")) == 1


def test_a_full_pool_whose_last_block_only_the_cache_shares_takes_the_next_token() -> None:
    pool = new_arena(1)
    cache, context = PrefixCache(pool), KVSequence(pool)
    append(pool, context, [1])
    cache.keep(keys("a"), context)
    append(pool, context, [2])  # no block is free to copy the shared one to: the cache lets go
    assert torch.equal(read(pool, context), contents_of([1, 2]))


# --- through the thinker ---


class Counts:
    """Metrics that only count."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}

    def gauge(self, name: str, value: float) -> None:
        self.total[name] = value

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        self.total[name] = self.total.get(name, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        self.total[name] = self.total.get(name, 0) + 1

    def hits(self) -> float:
        """Tokens taken from the cache since the last call."""
        return self.total.pop("thinker_prefix_hit_tokens", 0)


Make = Callable[..., tuple[LocalStages, Counts]]


@pytest.fixture
def make(checkpoint_dir: Path) -> Iterator[Make]:
    made: list[LocalStages] = []

    def build(**settings: object) -> tuple[LocalStages, Counts]:
        counts = Counts()
        thinker = ThinkerConfig(**settings)  # type: ignore[arg-type]
        config = DeployConfig(checkpoint=str(checkpoint_dir), device="cpu", dtype="float32", thinker=thinker)
        made.append(LocalStages(config, counts))
        return made[-1], counts

    yield build
    for stages in made:
        stages.close()
        assert stages.producer.pool.blocks.used == 0


def edit(prompt: str, seed: int = 1, image: int = 0) -> GenerationRequest:
    image = (png(48, 32, seed=image),)
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    return GenerationRequest(prompt=prompt, image=image, seed=seed, **size)


def chat(*texts: str, image: int | None = None) -> GenerationRequest:
    roles = ["system", *["user", "assistant"] * len(texts)]
    parts: list[list[TextPart | ImageRef]] = [[TextPart(text)] for text in texts]
    if image is not None:
        parts[1].append(ImageRef(0))
    turns = tuple(Turn(role, tuple(part)) for role, part in zip(roles, parts, strict=False))  # type: ignore[arg-type]
    image = None if image is None else (png(40, 40, seed=image),)
    return GenerationRequest(messages=turns, image=image, modality="image", seed=3, height=32, num_inference_steps=2)


REPEATS: dict[str, Sequence[GenerationRequest]] = {
    "the same prompt": [
        GenerationRequest(prompt="A cute cat", seed=s, height=32, num_inference_steps=2) for s in (1, 2)
    ],
    "the same negative prompt": [
        GenerationRequest(prompt=p, negative_prompt="blurry", seed=1, height=32, num_inference_steps=2) for p in "ab"
    ],
    "the same image, and another draw": [edit("make it red"), edit("make it blue"), edit("make it red", seed=2)],
    "the same system prompt": [chat("Be brief.", "A cat"), chat("Be brief.", "A dog")],
    "a conversation goes on": [chat("s", "A cat", image=1), chat("s", "A cat", "Here", "Bigger", image=1)],
    "the same thought": [
        GenerationRequest(prompt="A cat", seed=1, height=32, num_inference_steps=2, think=True, max_think_tokens=9)
    ]
    * 2,
    "a long conversation goes on": [
        chat("Be brief.", *["A cat", "Here"] * turns, "Bigger", image=1) for turns in (30, 60, 90)
    ],
    "a text longer than a chunk": [
        GenerationRequest(prompt="word " * 700 + end, seed=1, height=32, num_inference_steps=2) for end in "ab"
    ],
}


@pytest.mark.parametrize("requests", REPEATS.values(), ids=REPEATS)
def test_a_request_that_begins_like_an_earlier_one_is_served_from_what_is_kept_to_the_last_bit(
    make: Make, requests: Sequence[GenerationRequest]
) -> None:
    warm, counts = make()
    cold, none = make(enable_prefix_caching=False, encoder_cache_mb=0)
    for number, request in enumerate(requests):
        kept, fresh = generate(warm, request), generate(cold, request)
        for one, other in zip(kept.latents, fresh.latents, strict=True):
            assert_same(one.tokens, other.tokens)
        if number:
            assert counts.hits() > 0
    assert none.hits() == 0


def test_many_short_messages_are_prefilled_in_few_steps(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they are what they are one by one, each branch with its own end among them."""
    request = chat("Be brief.", *["A cat", "Here"] * 60, "Bigger")
    (together, counts), (one_by_one, many) = make(), make()
    few = generate(together, request)
    monkeypatch.setattr(branch_state, "OWN_CHUNKS", 10**6)
    expected = generate(one_by_one, request)
    assert relative_rms(few.latents[0].tokens, expected.latents[0].tokens) < 1e-5
    assert counts.total["thinker_step_seconds"] < 50
    assert many.total["thinker_step_seconds"] > 120


def test_only_what_is_the_same_is_taken(make: Make) -> None:
    stages, counts = make()
    generate(stages, edit("make it red", image=1))
    counts.hits()
    generate(stages, edit("make it red", image=2, seed=2))
    instruction = counts.hits()  # the branch without the image is the instruction alone
    assert 0 < instruction < 20
    generate(stages, edit("make it red", image=1))
    assert counts.hits() > 3 * instruction


def test_an_arena_full_of_what_is_kept_serves_on(make: Make) -> None:
    stages, counts = make(kv_tokens=512)
    alone, _ = make(enable_prefix_caching=False)
    for number in range(12):
        request = GenerationRequest(prompt=f"{number} " * 60, seed=1, height=32, num_inference_steps=2)
        assert torch.equal(generate(stages, request).latents[0].tokens, generate(alone, request).latents[0].tokens)
    # The last leases were given back; the thinker, idle, takes them at its next look.
    assert soon(lambda: stages.thinker.blocks_used == 0)
    assert counts.total["thinker_kv_blocks_cached"] > 0
