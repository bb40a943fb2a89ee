"""Sampling the next tokens of many texts from their logits, on any device.

The order is vLLM's: bias, repetition penalty, frequency and presence penalties, temperature, min-p, top-k, nucleus.
Log-probabilities are of the logits before all of these. A token is drawn with one number from its text's own
generator on the host, so a seed means the same on every device. On a GPU (not run yet) the texts of a step take one
copy up and one down; on a CPU each is done by itself, and pays for its own settings alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bagel_triton.model.cuda.upload import Numbers, Upload
from bagel_triton.protocol.messages import Decoding

Entries = list[tuple[int, float]]  # of logits that are changed: a token and a value


class Choice(NamedTuple):
    """A token, and where they are wanted its log-probability and those of the best tokens, best first.

    A token of -1 is none: the scores were not finite.
    """

    token_id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TextState:
    """The settings and the state that choose a text's next token, beside the scores.

    ``seen`` are the tokens of prompt and text, for the repetition penalty, ``counts`` those of the text alone.
    """

    how: Decoding
    generator: torch.Generator
    seen: Collection[int]
    counts: Mapping[int, int]

    @property
    def reads_scores(self) -> bool:
        """Whether choosing a token, or telling of it, takes more than the number of the largest score."""
        how = self.how
        shaped = how.logit_bias or how.repetition_penalty != 1.0 or how.frequency_penalty or how.presence_penalty
        return bool(shaped) or how.temperature != 0.0 or how.top_logprobs is not None

    def changes(self) -> tuple[Entries, Entries, Entries]:
        """Terms added to logits, their penalties for repetition, and terms added after these."""
        how = self.how
        seen = self.seen if how.repetition_penalty != 1.0 else ()
        counts = self.counts if how.frequency_penalty or how.presence_penalty else {}
        return (
            list(how.logit_bias.items()),
            [(token, how.repetition_penalty) for token in seen],
            [(token, -how.frequency_penalty * count - how.presence_penalty) for token, count in counts.items()],
        )


class Sampler:
    """Chooses the next token of each text."""

    def __init__(self, device: torch.device) -> None:
        self._upload, self._together = Upload(device), device.type != "cpu"

    def __call__(self, logits: Tensor, best: Tensor, texts: Sequence[TextState]) -> list[Choice]:
        """A choice for each text from logits [texts, vocabulary], whose largest are number ``best`` [texts]."""
        if not any(text.reads_scores for text in texts):
            return [Choice(token_id) for token_id in best.cpu().tolist()]
        if self._together:
            return self.choose(logits, texts)
        return [
            self.choose(logits[row : row + 1], [text])[0] if text.reads_scores else Choice(int(best[row]))
            for row, text in enumerate(texts)
        ]

    def choose(self, logits: Tensor, texts: Sequence[TextState]) -> list[Choice]:
        """The same for all at once, with one copy up and one down."""
        vocabulary, hows = logits.shape[1], [text.how for text in texts]
        scores = logits.float()
        numbers: list[Numbers] = []
        changes = list(zip(*(text.changes() for text in texts), strict=True))
        for change_of in changes:
            numbers += [[row * vocabulary + token for row, entries in enumerate(change_of) for token, _ in entries]]
            numbers += [_bits([value for _, value in chain.from_iterable(change_of)])]
        top_k = [how.top_k if how.top_k < vocabulary else 0 for how in hows]
        numbers += [
            _bits([how.temperature or 1.0 for how in hows]),
            _bits([how.min_p for how in hows]),
            _bits([how.top_p if how.top_p < 1.0 else 2.0 for how in hows]),
            _bits([_uniform(text) for text in texts]),
            top_k,
            [how.temperature == 0.0 for how in hows],
        ]
        placed, _ = self._upload(numbers, ())
        *lists, temperature, min_p, top_p, uniform, keep, greedy = placed
        shaped = scores
        for number, change in enumerate((added, penalised, added)):
            if any(changes[number]):
                shaped = change(shaped, lists[2 * number], _values(lists[2 * number + 1]))
        chosen = shaped.argmax(dim=-1)
        if any(how.temperature for how in hows):
            chances = distribution(
                shaped,
                _column(temperature),
                min_p=_column(min_p) if any(how.min_p for how in hows) else None,
                top_k=(keep[:, None], max(top_k)) if any(top_k) else None,
                top_p=_column(top_p) if any(how.top_p < 1.0 for how in hows) else None,
            )
            drawn = draw(chances, uniform.view(torch.float64)[:, None])
            chosen = torch.where(greedy > 0, chosen, drawn)
        out = [chosen.double()[:, None]]
        wanted = [how.top_logprobs for how in hows if how.top_logprobs is not None]
        if wanted:
            out.append(log_probabilities(scores, chosen, max(wanted)))
        return [
            _choice(values, how.top_logprobs)
            for values, how in zip(torch.cat(out, 1).cpu().tolist(), hows, strict=True)
        ]


def _uniform(text: TextState) -> float:
    """The text's next number in [0, 1); none is used up where nothing is drawn."""
    if text.how.temperature == 0.0:
        return 0.0
    return float(torch.rand((), dtype=torch.float64, generator=text.generator))


def _bits(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Numbers as int64, so that all go up in one copy."""
    return np.asarray(values, dtype=np.float64).view(np.int64)


def _values(bits: Tensor) -> Tensor:
    return bits.view(torch.float64).float()


def _column(bits: Tensor) -> Tensor:
    return _values(bits)[:, None]


def _choice(values: Sequence[float], top: int | None) -> Choice:
    if top is None:
        return Choice(int(values[0]))
    best, most = values[2:], (len(values) - 2) // 2
    pairs = zip(map(int, best[:top]), best[most : most + top], strict=True)
    return Choice(int(values[0]), values[1], tuple(pairs))


def added(logits: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """``logits`` [rows, vocabulary] with ``values`` added to those numbered ``at``, over all rows."""
    return logits.flatten().index_add(0, at, values).view_as(logits)


def penalised(logits: Tensor, at: Tensor, penalties: Tensor) -> Tensor:
    """``logits`` [rows, vocabulary] with the tokens numbered ``at``, over all rows, made less likely (CTRL, 2019)."""
    flat = logits.flatten()
    scores = flat[at]
    return flat.scatter(0, at, torch.where(scores > 0, scores / penalties, scores * penalties)).view_as(logits)


def distribution(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor | None = None,
    top_k: tuple[Tensor, int] | None = None,
    top_p: Tensor | None = None,
) -> Tensor:
    """Probabilities [rows, vocabulary] after temperature, then min-p, top-k and nucleus.

    Args:
        logits: [rows, vocabulary] float32.
        temperature: [rows, 1], as all others; None is for no row.
        min_p: keeps tokens at least so many times as probable as the most probable one.
        top_k: how many tokens are kept, below the vocabulary's size, 0 for all; and the most of any row.
        top_p: the token that crosses it is kept; above 1 keeps all.
    """
    logits = logits / temperature
    if min_p is not None:
        chances = logits.softmax(dim=-1)
        logits = logits.masked_fill(chances < min_p * chances.amax(dim=-1, keepdim=True), -torch.inf)
    if top_k is not None:
        keep, most = top_k
        least = logits.topk(most, dim=-1).values.gather(1, (keep - 1).clamp(min=0))
        logits = logits.masked_fill((logits < least) & (keep > 0), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        # The first is kept by itself: in float32 a tiny top_p is 0.
        kept = torch.cat((ordered[:, :1], ordered[:, 1:].masked_fill(before[:, 1:] >= top_p, 0.0)), dim=-1)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, kept)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [rows] where the sums of probabilities [rows, vocabulary] pass ``uniform`` [rows, 1] of their whole.

    ``uniform`` is float64 in [0, 1). A row that is not finite gives -1.
    """
    reached = probabilities.cumsum(dim=-1, dtype=torch.float64)
    whole = reached[:, -1:]
    ids = torch.searchsorted(reached, uniform * whole, right=True).clamp(max=probabilities.shape[1] - 1)
    return torch.where(whole.isfinite(), ids, -1).squeeze(1)


def log_probabilities(logits: Tensor, token_ids: Tensor, top: int) -> Tensor:
    """Natural log-probabilities of logits [rows, vocabulary]: [rows, 1 + 2 * top] float64.

    They are that of ``token_ids`` [rows], then the ids of the ``top`` best tokens, best first, then theirs.
    """
    values = logits.float().log_softmax(dim=-1)
    best = values.topk(min(top, values.shape[1]), dim=-1)
    own = values.gather(1, token_ids.clamp(min=0)[:, None])
    return torch.cat((own.double(), best.indices.double(), best.values.double()), dim=1)
