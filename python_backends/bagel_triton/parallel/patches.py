"""The autoencoder's decoder over ranks: each decodes some rows of every image, and rank 0 gets the pixels.

A rank decodes its rows in strips. It exchanges one row with each neighbour before a convolution, and sums of each
group of channels before a norm; for the one attention it gets the whole normed map, of latent size. So there are no
patches to blend: the pixels are those of one rank, but for the rounding of sums.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bagel_triton.model.autoencoder import Decoder
from bagel_triton.model.cpu.strip_decoder import decode_in_strips
from bagel_triton.model.cpu.thread_pool import ThreadPool


class OtherRanks:
    """The first ``size`` ranks of the process group that was joined; build it on all ranks at once."""

    def __init__(self, size: int) -> None:
        self.size, self._rank = size, dist.get_rank()
        self._group = None if size == dist.get_world_size() else dist.new_group(list(range(size)))

    def rows(self, height: int) -> slice:
        """This rank's rows of a latent image of ``height`` rows."""
        return self._parts(height)[self._rank]

    def edges(self, first: Tensor, last: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows above this rank's ``first`` one and below its ``last``; None beyond the image."""
        found: list[Tensor | None] = []
        operations = []
        for other, own in ((self._rank - 1, first), (self._rank + 1, last)):
            if not 0 <= other < self.size:
                found.append(None)
                continue
            row = torch.empty_like(own, memory_format=torch.contiguous_format)
            operations.append(dist.P2POp(dist.isend, own.contiguous(), other, self._group))
            operations.append(dist.P2POp(dist.irecv, row, other, self._group))
            found.append(row)
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        above, below = found
        return above, below

    def all_of(self, own: Tensor) -> list[Tensor]:
        """Gather the tensor ``own`` of every rank, all of one shape, in the order of the ranks."""
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self._group)
        return found

    def whole(self, own: Tensor, height: int) -> Tensor:
        """The map of ``height`` rows, of which ``own`` [batch, channels, rows, width] are this rank's."""
        parts = self._parts(height)
        most = max(part.stop - part.start for part in parts)
        padded = F.pad(own, (0, 0, 0, most - own.shape[2]))
        gathered = self.all_of(padded)
        return torch.cat([x[:, :, : part.stop - part.start] for x, part in zip(gathered, parts, strict=True)], dim=2)

    def on_first(self, own: Tensor, height: int, scale: int) -> Tensor:
        """On rank 0 an image of ``height`` latent rows, of which ``own`` are this rank's pixels; elsewhere ``own``.

        A latent row has ``scale`` rows of pixels.
        """
        if self._rank:
            dist.send(own.contiguous(), 0, group=self._group)
            return own
        found = [own]
        for rank, part in enumerate(self._parts(height)[1:], start=1):
            pixels = own.new_empty(*own.shape[:2], (part.stop - part.start) * scale, own.shape[3])
            dist.recv(pixels, rank, group=self._group)
            found.append(pixels)
        return torch.cat(found, dim=2)

    def _parts(self, height: int) -> list[slice]:
        """Each rank's rows, of each about as many."""
        least, more = divmod(height, self.size)
        ends = accumulate((least + (rank < more) for rank in range(self.size)), initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]


class RankDecoder:
    """A rank's ``decoder``; the first ``ranks`` ranks decode, and all ranks build one."""

    def __init__(self, decoder: Decoder, ranks: int, pool: ThreadPool) -> None:
        self.ranks, self._decoder, self._pool = ranks, decoder, pool
        self._others = OtherRanks(ranks)

    def decode(self, z: Tensor) -> Tensor:
        """Decode this rank's rows of ``z`` [batch, latent_channels, height, width], of at least a row for each rank.

        Returns:
            On rank 0 the image, [batch, 3, 8 * height, 8 * width].
        """
        own = self._pool.run_with_intraop_threads(lambda: decode_in_strips(self._decoder, z, self._others))
        return self._others.on_first(own, z.shape[2], own.shape[3] // z.shape[3])

    def alone(self, z: Tensor) -> Tensor:
        """The same on this rank alone."""
        return self._pool.run_with_intraop_threads(lambda: self._decoder(z))  # type: ignore[no-any-return]
