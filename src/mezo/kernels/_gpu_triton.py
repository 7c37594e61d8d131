"""Triton source of `mezo.kernels.gpu`. The polynomials are those of `mezo.philox.tables`.

A counter block's eight normals lie in one thread, so that 16 bytes of bfloat16 are read and written at once. The
arithmetic of a normal, not memory, is what limits these kernels: instructions count.
"""

import triton
import triton.language as tl


@triton.jit
def _philox(block, k0, k1, c2, c3):
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    k0, k1, c2, c3 = k0.to(tl.uint32), k1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57  # one instruction each
        c0, c1 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, product1.to(tl.uint32)
        c2, c3 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1, product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _box_muller(w):
    u = ((w & 0x7FFF8000) | 0x4000).to(tl.int32).to(tl.float32)
    bits = u.to(tl.int32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    h = tl.fma(m, -0.06258977949619293, 0.5813015103340149)
    h = tl.fma(h, m, -2.2754604816436768)
    h = tl.fma(h, m, 4.947486400604248)
    h = tl.fma(h, m, -5.693475246429443)
    s = tl.fma(h, m, tl.fma(bits.to(tl.float32), -1.6525916635146132e-07, 221.53724670410156))
    guess = (0x5F374800 - (s.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    root = s * guess
    error = tl.fma(-root, guess, 1.0)
    root = root * tl.fma(tl.fma(error, 0.3762030601501465, 0.5010913610458374), error, 0.9999994039535522)
    radius = (root.to(tl.int32, bitcast=True) ^ (w.to(tl.int32, bitcast=True) & -0x80000000)).to(
        tl.float32, bitcast=True
    )
    x = ((w & 0x7FFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8404991.0  # 2²³ + 16383
    x2 = x * x
    sin = tl.fma(tl.fma(x2, -1.36728183775711e-32, 6.728349908456157e-23), x2, -1.468590331808739e-13)
    sin = tl.fma(sin, x2, 9.587347449269146e-05) * x
    cos = tl.fma(tl.fma(x2, -9.872256228135723e-28, 3.505254773490422e-18), x2, -4.595087865766345e-09)
    cos = tl.fma(cos, x2, 0.9999933242797852)
    return radius * cos, radius * sin


@triton.jit
def _interleaved(a0, a1, a2, a3):
    """a0[0], a1[0], a2[0], a3[0], a0[1], …"""
    return tl.interleave(tl.interleave(a0, a2), tl.interleave(a1, a3))


@triton.jit
def _normals(block, seed, stream):
    """The normals of counter blocks, 8 of each. A small seed arrives as int32."""
    seed, stream = tl.cast(seed, tl.int64), tl.cast(stream, tl.int64)
    w0, w1, w2, w3 = _philox(block, seed, seed >> 32, stream, stream >> 32)
    a0, b0 = _box_muller(w0)
    a1, b1 = _box_muller(w1)
    a2, b2 = _box_muller(w2)
    a3, b3 = _box_muller(w3)
    return tl.interleave(_interleaved(a0, a1, a2, a3), _interleaved(b0, b1, b2, b3))


@triton.jit(do_not_specialize=["seed", "stream"])
def add_normals(out_ptr, base_ptr, starts_ptr, width, scale, seed, stream, BLOCKS: tl.constexpr):
    """out[r, i] = base[r, i] + scale * z(start[r] + i); program (group, row)."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.load(starts_ptr + row)
    block = start // 8 + tl.program_id(0).to(tl.int64) * BLOCKS
    z = _normals(block + tl.arange(0, BLOCKS), seed, stream)
    i = block * 8 - start + tl.arange(0, 8 * BLOCKS)
    inside = (i >= 0) & (i < width)
    base = tl.load(base_ptr + row * width + i, mask=inside).to(tl.float32)
    value = base + tl.cast(scale, tl.float32) * z
    tl.store(out_ptr + row * width + i, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_probes(out_ptr, place, step, base, block, inside, seed, factor, seeds_ptr, factors_ptr, stream,
                  PROBES: tl.constexpr, PAIRED: tl.constexpr):  # fmt: skip
    """out[p · step + place] = base + factor[p] * z(seed[p]) of the normals of `block`, for all probes.

    The first probe's seed and factor are loaded already: outside of a loop, Philox' keys are made once.
    """
    for p in tl.static_range(0, PROBES, 2 if PAIRED else 1):
        moved = (factor if p == 0 else tl.load(factors_ptr + p)) * _normals(
            block, seed if p == 0 else tl.load(seeds_ptr + p), stream
        )
        out_ptr += step if p > 0 else 0
        tl.store(out_ptr + place, (base + moved).to(out_ptr.dtype.element_ty), mask=inside)
        if PAIRED:
            out_ptr += step
            tl.store(out_ptr + place, (base - moved).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _elements(first_block, block, width, BLOCKS: tl.constexpr):
    """Counters of the blocks from `block` on, places of their normals in a tensor, and which of those it has."""
    i = block * 8 + tl.arange(0, 8 * BLOCKS)
    return tl.cast(first_block, tl.int64) + block + tl.arange(0, BLOCKS), i, i < width


@triton.jit(do_not_specialize=["first_block", "stream"])
def perturb(
    out_ptr, base_ptr, first_block, width, seeds_ptr, factors_ptr, stream,
    PROBES: tl.constexpr, PAIRED: tl.constexpr, BLOCKS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """out[p, i] = base[i] + factor[p] * z(seed[p], 8 · first_block + i); program (group,)."""
    seed, factor = tl.load(seeds_ptr), tl.load(factors_ptr)
    first = tl.program_id(0) * REPEAT * BLOCKS
    for block in range(first, min(first + REPEAT * BLOCKS, (width + 7) // 8), BLOCKS):
        counter, i, inside = _elements(first_block, block, width, BLOCKS)
        base = tl.load(base_ptr + i, mask=inside).to(tl.float32)
        _store_probes(out_ptr, i, width, base, counter, inside, seed, factor, seeds_ptr, factors_ptr, stream,
                      PROBES, PAIRED)  # fmt: skip


@triton.jit(do_not_specialize=["step"])
def perturb_many(
    out_ptr, table_ptr, step, seeds_ptr, factors_ptr, PROBES: tl.constexpr, PAIRED: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """out[p · step + place + i] = base[i] + factor[p] * z(seed[p], i) for each tensor of a table; program (group, row).

    A row is (address, place, size, stream, row of `factors`).
    """
    row = table_ptr + tl.program_id(1) * 5
    base_ptr = tl.load(row).to(tl.pointer_type(out_ptr.dtype.element_ty))
    place, size, stream = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    factors_ptr += tl.load(row + 4) * PROBES
    block = tl.program_id(0) * BLOCKS
    if block * 8 < size:
        counter, i, inside = _elements(0, block, size, BLOCKS)
        base = tl.load(base_ptr + i, mask=inside).to(tl.float32)
        _store_probes(out_ptr, place + i, step, base, counter, inside, tl.load(seeds_ptr), tl.load(factors_ptr),
                      seeds_ptr, factors_ptr, stream, PROBES, PAIRED)  # fmt: skip


@triton.jit(do_not_specialize=["stream"])
def perturb_rows(
    out_ptr, base_ptr, ids_ptr, num_rows, width, seeds_ptr, factors_ptr, stream, BLOCKS: tl.constexpr
):  # fmt: skip
    """out[p, n, i] = base[ids[p, n], i] + factor[p] * z(seed[p], ids[p, n] · width + i); program (group, n, p)."""
    probe = tl.program_id(2)
    place = (probe.to(tl.int64) * num_rows + tl.program_id(1)) * width
    start = tl.load(ids_ptr + probe.to(tl.int64) * num_rows + tl.program_id(1)) * width
    block = start // 8 + tl.program_id(0) * BLOCKS
    i = block * 8 - start + tl.arange(0, 8 * BLOCKS)
    inside = (i >= 0) & (i < width)
    base = tl.load(base_ptr + start + i, mask=inside).to(tl.float32)
    _store_probes(out_ptr, place + i, 0, base, block + tl.arange(0, BLOCKS), inside, tl.load(seeds_ptr + probe),
                  tl.load(factors_ptr + probe), seeds_ptr, factors_ptr, stream, 1, False)  # fmt: skip


@triton.jit(do_not_specialize=["scale", "seed"])
def add_normals_many(table_ptr, scale, seed, PARTS: tl.constexpr, REPEAT: tl.constexpr, BLOCKS: tl.constexpr):
    """out[i] = base[i] + scale * z(start + i), float32, for each piece (base, out, size, stream, start) of a table."""
    row = table_ptr + (tl.program_id(0) // PARTS).to(tl.int64) * 7
    base_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    out_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    size, stream, start = tl.load(row + 2).to(tl.int32), tl.load(row + 3), tl.load(row + 4)
    first = (tl.program_id(0) % PARTS) * REPEAT * BLOCKS
    for block in range(first, min(first + REPEAT * BLOCKS, (size + 7) // 8), BLOCKS):
        i = block * 8 + tl.arange(0, 8 * BLOCKS)
        base = tl.load(base_ptr + i, mask=i < size)
        z = _normals(start // 8 + block + tl.arange(0, BLOCKS), seed, stream)
        tl.store(out_ptr + i, base + tl.cast(scale, tl.float32) * z, mask=i < size)


@triton.jit
def _rounding_bits(block, seed, stream):
    """The 16-bit numbers of counter blocks, 8 of each, int32."""
    w0, w1, w2, w3 = _philox(block, seed, seed >> 32, stream, stream >> 32)
    low = _interleaved(w0 & 0xFFFF, w1 & 0xFFFF, w2 & 0xFFFF, w3 & 0xFFFF)
    return tl.interleave(low, _interleaved(w0 >> 16, w1 >> 16, w2 >> 16, w3 >> 16)).to(tl.int32)


@triton.jit
def _stochastic_round(x, bits, IS_BFLOAT16: tl.constexpr):
    """See `mezo.engines.torch.rounding.stochastic_round`. Infinities have no mantissa that bits could carry from."""
    raw = x.to(tl.int32, bitcast=True)
    if IS_BFLOAT16:
        rounded = tl.minimum(raw, 0x7FC00000) + bits  # a GPU's sums have one NaN, 0x7FFFFFFF
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = ((raw + (bits & 0x1FFF)) & -0x2000).to(tl.float32, bitcast=True)
        steps = tl.floor(x * 16777216.0 + bits.to(tl.float32) * 1.52587890625e-05) * 5.960464477539063e-08
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, steps, rounded)
        return tl.where(x != x, x, rounded).to(tl.float16)  # noqa: PLR0124


@triton.jit
def _updated(
    value, counter, keep, stream, seed, factor, seeds_ptr, factor_ptr, num_records, rounding,
    DECAYS: tl.constexpr, IS_BFLOAT16: tl.constexpr,
):  # fmt: skip
    """The weights of counter blocks after a step, rounded. The first record's seed and factor are loaded already."""
    value = value.to(tl.float32)
    if DECAYS:
        value = value * keep
    value = value + factor * _normals(counter, seed, stream)
    for record in range(1, num_records):
        value = value + tl.load(factor_ptr + record) * _normals(counter, tl.load(seeds_ptr + record), stream)
    return _stochastic_round(value, _rounding_bits(counter, seed, rounding), IS_BFLOAT16)


@triton.jit(do_not_specialize=["keep"])
def update_many(
    table_ptr, seeds_ptr, factors_ptr, num_records, keep, DECAYS: tl.constexpr,
    IS_BFLOAT16: tl.constexpr, PARTS: tl.constexpr, REPEAT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """w[i] = round(keep · w[i] + Σ factor · z(start + i)) in place, for each piece of a table.

    A piece is (address, whether it decays, size, stream of z, start, stream of rounding, tensor); `seeds` has one seed
    for each record, the first one's rounding counts, and `factors` one factor for each record and tensor.
    """
    row = table_ptr + (tl.program_id(0) // PARTS).to(tl.int64) * 7
    weight_ptr = tl.load(row).to(tl.pointer_type(tl.bfloat16 if IS_BFLOAT16 else tl.float16))
    weight_ptr = tl.multiple_of(weight_ptr, 16)
    keep = tl.where(tl.load(row + 1) != 0, tl.cast(keep, tl.float32), 1.0)
    size = tl.load(row + 2).to(tl.int32)
    stream, start, rounding = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    factor_ptr = factors_ptr + tl.load(row + 6) * num_records
    seed, factor = tl.load(seeds_ptr), tl.load(factor_ptr)  # here, so that Philox' keys are made once
    lane, counter = tl.arange(0, 8 * BLOCKS), start // 8 + tl.arange(0, BLOCKS)
    first = (tl.program_id(0) % PARTS) * REPEAT * BLOCKS
    whole = min(first + REPEAT * BLOCKS, size // (8 * BLOCKS) * BLOCKS)  # up to here a program's blocks are all there
    if first < whole:
        following = tl.load(weight_ptr + first * 8 + lane)
        for block in range(first, whole, BLOCKS):
            value = following
            following = tl.load(weight_ptr + min(block + BLOCKS, whole - BLOCKS) * 8 + lane)  # while these are computed
            value = _updated(value, counter + block, keep, stream, seed, factor, seeds_ptr, factor_ptr, num_records,
                             rounding, DECAYS, IS_BFLOAT16)  # fmt: skip
            tl.store(weight_ptr + block * 8 + lane, value)
    rest = max(first, whole)
    if rest < min(first + REPEAT * BLOCKS, (size + 7) // 8):
        i = rest * 8 + lane
        value = tl.load(weight_ptr + i, mask=i < size)
        value = _updated(value, counter + rest, keep, stream, seed, factor, seeds_ptr, factor_ptr, num_records,
                         rounding, DECAYS, IS_BFLOAT16)  # fmt: skip
        tl.store(weight_ptr + i, value, mask=i < size)


@triton.jit(do_not_specialize=["first_block", "keep", "seed", "rounding"])
def fold(
    out_ptr, base_ptr, left_ptr, right_ptr, first_block, size, width, keep, seed, rounding,
    RANK: tl.constexpr, ROUNDS: tl.constexpr, IS_BFLOAT16: tl.constexpr, BLOCKS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """out[i] = keep · base[i] + Σ left[row, k] · right[column, k] of rows of a matrix, rounded; program (group,)."""
    keep, seed, rounding = tl.cast(keep, tl.float32), tl.cast(seed, tl.int64), tl.cast(rounding, tl.int64)
    first = tl.program_id(0) * REPEAT * BLOCKS
    for block in range(first, min(first + REPEAT * BLOCKS, (size + 7) // 8), BLOCKS):
        counter, i, inside = _elements(first_block, block, size, BLOCKS)
        value = tl.load(base_ptr + i, mask=inside).to(tl.float32) * keep
        row = i // width
        left, right = left_ptr + row * RANK, right_ptr + (i - row * width) * RANK
        for k in tl.static_range(RANK):
            value = value + tl.load(left + k, mask=inside) * tl.load(right + k, mask=inside)
        if ROUNDS:
            value = _stochastic_round(value, _rounding_bits(counter, seed, rounding), IS_BFLOAT16)
        tl.store(out_ptr + i, value, mask=inside)


@triton.jit(do_not_specialize=["first_block", "stream", "rounding"])
def update_and_perturb(
    out_ptr, weight_ptr, first_block, width, seeds_ptr, factors_ptr, stream,
    pending_ptr, update_seeds_ptr, update_factors_ptr, keep_ptr, num_records, rounding,
    PROBES: tl.constexpr, PAIRED: tl.constexpr, DECAYS: tl.constexpr, IS_BFLOAT16: tl.constexpr,
    BLOCKS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """`perturb` of weights that take an update first, as in `update_many`, unless `pending` is 0."""
    pending, keep, rounding = tl.load(pending_ptr), tl.load(keep_ptr), tl.cast(rounding, tl.int64)
    update_seed, update_factor = tl.load(update_seeds_ptr), tl.load(update_factors_ptr)
    seed, factor = tl.load(seeds_ptr), tl.load(factors_ptr)
    first = tl.program_id(0) * REPEAT * BLOCKS
    for block in range(first, min(first + REPEAT * BLOCKS, (width + 7) // 8), BLOCKS):
        counter, i, inside = _elements(first_block, block, width, BLOCKS)
        value = tl.load(weight_ptr + i, mask=inside)
        if pending != 0:
            value = _updated(value, counter, keep, stream, update_seed, update_factor, update_seeds_ptr,
                             update_factors_ptr, num_records, rounding, DECAYS, IS_BFLOAT16)  # fmt: skip
            tl.store(weight_ptr + i, value, mask=inside)
        _store_probes(out_ptr, i, width, value.to(tl.float32), counter, inside, seed, factor, seeds_ptr, factors_ptr,
                      stream, PROBES, PAIRED)  # fmt: skip
