"""A branch of a CUDA graph: kernels that need not wait for all of those launched before them.

A matrix product leaves some of a GPU's processors idle while its last tiles are computed, and all of its memory's
bandwidth; a small kernel on a branch takes them. Outside of a capture everything stays in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Branch:
    """A second stream beside the current one.

    Memory needs no further care as long as whatever a branch reads or writes is kept until `join`.

    Args:
        device: where kernels run.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ended: torch.cuda.Event | None = None

    def here(self) -> torch.cuda.Event | None:
        """The point that the current stream has come to; None unless a graph is captured."""
        if self._stream is None or not torch.cuda.is_current_stream_capturing():
            return None
        point: torch.cuda.Event = torch.cuda.current_stream().record_event()
        return point

    @contextmanager
    def after(self, point: torch.cuda.Event | None) -> Iterator[None]:
        """What is launched inside waits for what came before `point` only."""
        if point is None or self._stream is None:
            yield
            return
        self._stream.wait_event(point)
        with torch.cuda.stream(self._stream):
            yield
        self._ended = self._stream.record_event()

    def join(self) -> None:
        """What is launched from now on waits for the branch."""
        if self._ended is not None:
            torch.cuda.current_stream().wait_event(self._ended)
            self._ended = None
