"""All small trained parameters under several probes, one after the other in one memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mezo import philox
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Probe
from mezo.kernels import gpu


class ProbeBuffers:
    """base + scale · z(seed) of every parameter of a space, float32 [P, parameters]; P probes.

    The memory for a number of probes stays where it is, as CUDA graphs need it. On a GPU z of a probe is one launch.

    Args:
        space: what is drawn: names and widths.
        bases: float32 tensors in place of the space's own, by name.
        aligned: each parameter of each probe begins where matrix products read it fast; else there are no gaps.
    """

    def __init__(self, space: ParameterSpace, bases: Mapping[str, Tensor] | None = None, *, aligned: bool = True):
        self._space = space
        self._bases = [p.detach() for p in (bases or space.parameters).values()]
        sizes = [p.numel() for p in self._bases]
        self._places, self._size = gpu.aligned_places(sizes) if aligned else gpu.aligned_places(sizes, 1)
        self._ranges = dict(zip(space.parameters, self._places, strict=True))
        self._shapes = {name: base.shape for name, base in zip(space.parameters, self._bases, strict=True)}
        self._buffers: dict[int, _Buffer] = {}  # by number of probes

    def changed(self) -> None:
        """The bases have moved."""
        for buffer in self._buffers.values():
            buffer.written = ()

    def write(self, probes: Sequence[Probe]) -> Tensor:
        """All parameters under the probes, always in the same memory."""
        if len(probes) not in self._buffers:
            memory_PN = torch.empty(len(probes), self._size, device=self._bases[0].device)
            self._buffers[len(probes)] = _Buffer(memory_PN, self._places, self._bases, self._space.streams())
        buffer = self._buffers[len(probes)]
        if tuple(probes) != buffer.written:
            for probe, segments, outs in zip(probes, buffer.segments, buffer.outs, strict=True):
                if probe.scale == 0.0:
                    torch._foreach_copy_(outs, self._bases)
                    continue
                segments.add_normals([probe.scale * scale for scale in self._space.scales(probe.seed)], probe.seed)
            buffer.written = tuple(probes)
        return buffer.flat_PN

    def part(self, flat_PN: Tensor, name: str, first: int = 0) -> Tensor:
        """One parameter out of what `write` returned, or out of a copy of its elements from `first` on: [P, *shape]."""
        place = self._ranges[name]
        return flat_PN[:, place.start - first : place.stop - first].view(-1, *self._shapes[name])


class _Buffer:
    def __init__(self, flat_PN: Tensor, places: Sequence[slice], bases: Sequence[Tensor], streams: Sequence[int]):
        self.flat_PN = flat_PN
        self.outs = [[row_N[place].view(p.shape) for place, p in zip(places, bases, strict=True)] for row_N in flat_PN]
        self.segments = [philox.Segments(bases, outs, streams) for outs in self.outs]
        self.written: tuple[Probe, ...] = ()
