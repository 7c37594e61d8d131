"""The Triton kernels in Triton's interpreter against the reference; run with TRITON_INTERPRET=1."""

import torch

from mezo import philox
from mezo.kernels import _gpu_triton, gpu


def check_many() -> None:
    sizes = (37, 256, 1500, 4)
    bases = [torch.randn(n) for n in sizes]
    outs = [torch.zeros(n) for n in sizes]
    streams = [philox.stream_id("direction", str(n)) for n in sizes]
    seed = philox.derive_seed(3, 5)
    table = gpu.segment_table(bases, outs, streams)
    _gpu_triton.add_normals_many[(7, len(sizes))](table, -0.37, seed & 0xFFFFFFFF, seed >> 32, BLOCKS=64)
    for base, out, stream in zip(bases, outs, streams, strict=True):
        assert torch.equal(out, philox.add_normals(base, -0.37, seed, stream, 0))


def check_rows() -> None:
    base = torch.randn(3, 50)
    out = torch.zeros_like(base)
    starts = torch.tensor([0, 7, 2**33 + 1])
    seed, stream = philox.derive_seed(1, 2), philox.stream_id("direction", "rows")
    key = (seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32)
    _gpu_triton.add_normals[(4, 3)](out, base, starts, 50, 0.5, *key, BLOCKS=8)
    for row in range(3):
        assert torch.equal(out[row], philox.add_normals(base[row], 0.5, seed, stream, int(starts[row])))


if __name__ == "__main__":
    torch.manual_seed(0)
    check_many()
    check_rows()
    print("equal")
