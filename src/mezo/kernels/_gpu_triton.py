"""Triton source of `mezo.kernels.gpu`. The polynomials are those of `mezo.philox._log` and `_cos_sin`."""

import triton
import triton.language as tl

_ANGLE = tl.constexpr(3.7450703871400037e-07)  # 2π / 2²⁴, rounded to float32


@triton.jit
def _philox(block, k0, k1, c2, c3):
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57  # one instruction each
        c0, c1 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, product1.to(tl.uint32)
        c2, c3 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1, product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _box_muller(wa, wb):
    u = ((wa >> 8).to(tl.int32) + 1).to(tl.float32)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = (exponent - 24).to(tl.float32)
    y = x * 7.0376836292e-2 + -1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x + -1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x + -1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x + -2.4999993993e-1
    y = y * x + 3.3333331174e-1
    x2 = x * x
    y = y * x * x2 + e * -2.12194440e-4 - x2 * 0.5
    log = x + y + e * 0.693359375
    radius = tl.sqrt_rn(tl.maximum(log * -2.0, 0.0))
    k = (wb >> 8).to(tl.int32)
    quadrant = (k + (1 << 21)) >> 22
    t = (k - (quadrant << 22)).to(tl.float32) * _ANGLE
    t2 = t * t
    sin = ((t2 * -1.9515295891e-4 + 8.3321608736e-3) * t2 + -1.6666654611e-1) * t2 * t + t
    cos = ((t2 * 2.443315711809948e-5 + -1.388731625493765e-3) * t2 + 4.166664568298827e-2) * t2 * t2 - t2 * 0.5 + 1.0
    odd = (quadrant & 1) != 0
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = tl.where(((quadrant + 1) & 2) != 0, -c, c)
    s = tl.where((quadrant & 2) != 0, -s, s)
    return radius * c, radius * s


@triton.jit
def _normals(block, k0, k1, c2, c3, BLOCKS: tl.constexpr):
    """The 4 · BLOCKS normals of `block` … `block` + BLOCKS − 1."""
    zeros = tl.zeros([BLOCKS], dtype=tl.uint32)
    w0, w1, w2, w3 = _philox(
        block,
        zeros + tl.cast(k0, tl.uint32),
        zeros + tl.cast(k1, tl.uint32),
        zeros + tl.cast(c2, tl.uint32),
        zeros + tl.cast(c3, tl.uint32),
    )
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["width", "scale", "k0", "k1", "c2", "c3"])
def add_normals(out_ptr, base_ptr, starts_ptr, width, scale, k0, k1, c2, c3, BLOCKS: tl.constexpr):
    """out[r, i] = base[r, i] + scale * z(start[r] + i); program (group, row)."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.load(starts_ptr + row)
    block = start // 4 + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    z = _normals(block, k0, k1, c2, c3, BLOCKS)
    first = (start // 4 + tl.program_id(0).to(tl.int64) * BLOCKS) * 4 - start
    i = first + tl.arange(0, 4 * BLOCKS)
    inside = (i >= 0) & (i < width)
    base = tl.load(base_ptr + row * width + i, mask=inside).to(tl.float32)
    value = base + tl.cast(scale, tl.float32) * z
    tl.store(out_ptr + row * width + i, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width", "scale", "k0", "k1", "c2", "c3"])
def add_normals_both(plus_ptr, minus_ptr, base_ptr, start_ptr, width, scale, k0, k1, c2, c3, BLOCKS: tl.constexpr):
    """plus[i], minus[i] = base[i] ± scale * z(start + i); program (group,)."""
    start = tl.load(start_ptr)
    block = start // 4 + tl.program_id(0).to(tl.int64) * BLOCKS
    moved = tl.cast(scale, tl.float32) * _normals(block + tl.arange(0, BLOCKS), k0, k1, c2, c3, BLOCKS)
    i = block * 4 - start + tl.arange(0, 4 * BLOCKS)
    inside = (i >= 0) & (i < width)
    base = tl.load(base_ptr + i, mask=inside).to(tl.float32)
    tl.store(plus_ptr + i, (base + moved).to(plus_ptr.dtype.element_ty), mask=inside)
    tl.store(minus_ptr + i, (base - moved).to(minus_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _piece_normals(stream, start, block, k0, k1, BLOCKS: tl.constexpr):
    """z of the blocks from `block` on of a piece that begins at element `start`."""
    blocks = start // 4 + block + tl.arange(0, BLOCKS)
    return _normals(blocks, k0, k1, stream.to(tl.uint32), (stream >> 32).to(tl.uint32), BLOCKS)


@triton.jit(do_not_specialize=["scale", "k0", "k1"])
def add_normals_many(table_ptr, scale, k0, k1, PARTS: tl.constexpr, REPEAT: tl.constexpr, BLOCKS: tl.constexpr):
    """out[i] = base[i] + scale * z(start + i), float32, for each piece (base, out, size, stream, start) of a table."""
    row = table_ptr + (tl.program_id(0) // PARTS).to(tl.int64) * 7
    base_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    out_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    size, stream, start = tl.load(row + 2).to(tl.int32), tl.load(row + 3), tl.load(row + 4)
    first = (tl.program_id(0) % PARTS) * REPEAT * BLOCKS
    for block in range(first, min(first + REPEAT * BLOCKS, (size + 3) // 4), BLOCKS):
        i = block * 4 + tl.arange(0, 4 * BLOCKS)
        base = tl.load(base_ptr + i, mask=i < size)
        value = base + tl.cast(scale, tl.float32) * _piece_normals(stream, start, block, k0, k1, BLOCKS)
        tl.store(out_ptr + i, value, mask=i < size)


@triton.jit
def _rounding_bits(block, k0, k1, c2, c3, BLOCKS: tl.constexpr):
    """The 8 · BLOCKS 16-bit numbers of `block` … `block` + BLOCKS − 1, int32."""
    zeros = tl.zeros([BLOCKS], dtype=tl.uint32)
    w0, w1, w2, w3 = _philox(
        block,
        zeros + tl.cast(k0, tl.uint32),
        zeros + tl.cast(k1, tl.uint32),
        zeros + tl.cast(c2, tl.uint32),
        zeros + tl.cast(c3, tl.uint32),
    )
    even = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(even, odd).to(tl.int32)


@triton.jit
def _stochastic_round(x, bits, IS_BFLOAT16: tl.constexpr):
    """See `mezo.engines.torch.rounding.stochastic_round`; float32."""
    raw = x.to(tl.int32, bitcast=True)
    dropped: tl.constexpr = 0xFFFF if IS_BFLOAT16 else 0x1FFF
    rounded = ((raw + (bits & dropped)) & ~dropped).to(tl.float32, bitcast=True)
    if not IS_BFLOAT16:
        steps = tl.floor(x * 16777216.0 + bits.to(tl.float32) * 1.52587890625e-05) * 5.960464477539063e-08
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, steps, rounded)
    return tl.where((raw & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit(do_not_specialize=["num_records", "keep", "k0", "k1"])
def update_many(
    table_ptr, seeds_ptr, factors_ptr, num_records, keep, k0, k1,
    IS_BFLOAT16: tl.constexpr, PARTS: tl.constexpr, REPEAT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """w[i] = round(keep · w[i] + Σ factor · z(start + i)) in place, for each piece of a table.

    A piece is (address, whether it decays, size, stream of z, start, stream of rounding, tensor); `seeds` has one seed
    for each record and `factors` one factor for each record and tensor.
    """
    row = table_ptr + (tl.program_id(0) // PARTS).to(tl.int64) * 7
    weight_ptr = tl.load(row).to(tl.pointer_type(tl.bfloat16 if IS_BFLOAT16 else tl.float16))
    decays, size = tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    stream, start, rounding = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    factor_ptr = factors_ptr + tl.load(row + 6) * num_records
    first = (tl.program_id(0) % PARTS) * REPEAT * BLOCKS
    for block in range(first, min(first + REPEAT * BLOCKS, (size + 3) // 4), BLOCKS):
        i = block * 4 + tl.arange(0, 4 * BLOCKS)
        value = tl.load(weight_ptr + i, mask=i < size).to(tl.float32)
        value = tl.where(decays != 0, value * tl.cast(keep, tl.float32), value)
        for record in range(num_records):
            seed = tl.load(seeds_ptr + record)
            z = _piece_normals(stream, start, block, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), BLOCKS)
            value = value + tl.load(factor_ptr + record) * z
        pairs = start // 8 + block // 2 + tl.arange(0, BLOCKS // 2)
        bits = _rounding_bits(pairs, k0, k1, rounding.to(tl.uint32), (rounding >> 32).to(tl.uint32), BLOCKS // 2)
        value = _stochastic_round(value, bits, IS_BFLOAT16)
        tl.store(weight_ptr + i, value.to(weight_ptr.dtype.element_ty), mask=i < size)
