"""Triton source of `mezo.kernels.layers`."""

import triton
import triton.language as tl


@triton.jit
def _finished(
    y_ptr, other_ptr, h_ptr, left_ptr, bias_ptr, row, row_inside, o, out_inside, num_out, h_step, bias_step, scale,
    RANK: tl.constexpr, HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr, PLUS: tl.constexpr,
    TIMES: tl.constexpr,
):  # fmt: skip
    """A tile of what `low_rank_sum` writes, and its places; `left` and `bias` are those of the probe."""
    place = row[:, None] * num_out + o[None, :]
    inside = row_inside[:, None] & out_inside[None, :]
    total = tl.load(y_ptr + place, mask=inside).to(tl.float32) if HAS_Y else tl.zeros(place.shape, tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + o * bias_step, mask=out_inside).to(tl.float32)[None, :]
    for k in tl.static_range(RANK):
        h = tl.load(h_ptr + row * h_step + k, mask=row_inside).to(tl.float32)
        left = tl.load(left_ptr + o * RANK + k, mask=out_inside)
        total += h[:, None] * left[None, :]
    if FUNCTION == "relu":
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays
    if FUNCTION == "silu":
        total *= tl.sigmoid(total)
    total *= tl.cast(scale, tl.float32)
    if PLUS:
        total += tl.load(other_ptr + place, mask=inside).to(tl.float32)
    if TIMES:
        total *= tl.load(other_ptr + place, mask=inside).to(tl.float32)
    return total, place, inside


@triton.jit(do_not_specialize=["scale"])
def low_rank_sum(
    out_ptr, y_ptr, other_ptr, h_ptr, left_ptr, bias_ptr, num_rows, num_out, h_step, left_probe, bias_probe,
    bias_step, scale, RANK: tl.constexpr, HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr,
    PLUS: tl.constexpr, TIMES: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """out[p, n, o] = f(y[p, n, o] + sum over k of h[p, n, k] * left[p, o, k] + bias[p, o]) * scale + other[p, n, o].

    f is relu, silu or nothing; with `TIMES` the last is a product; program (rows, outputs, probe). `out` may be `y`.
    """
    probe = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total, place, inside = _finished(
        y_ptr, other_ptr, h_ptr, left_ptr + probe * left_probe, bias_ptr + probe * bias_probe, probe * num_rows + n,
        n < num_rows, o, o < num_out, num_out, h_step, bias_step, scale, RANK, HAS_Y, HAS_BIAS, FUNCTION, PLUS, TIMES,
    )  # fmt: skip
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product(value, right_ptr, o, out_inside, FITS: tl.constexpr):
    """Sum over o of value[n, o] * right[o]; 0 if it does not fit."""
    if FITS:
        right = tl.load(right_ptr + o, mask=out_inside, other=0.0).to(tl.float32)
        return tl.sum(value * right[None, :], axis=1)
    else:
        return tl.zeros((value.shape[0],), tl.float32)


@triton.jit(do_not_specialize=["scale"])
def low_rank_sum_and_product(
    out_ptr, low_ptr, y_ptr, other_ptr, h_ptr, left_ptr, bias_ptr, right_ptr, num_rows, num_out, h_step, left_probe,
    bias_probe, bias_step, scale, RANK: tl.constexpr, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr,
    PLUS: tl.constexpr, TIMES: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`low_rank_sum`, and low[s, p, n, k] = sum over the outputs o of part s of out[p, n, o] * right[k, o].

    A part is `TILES` tiles, k is 4 at most; program (rows, part, probe).
    """
    probe = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = probe * num_rows + n
    low0 = tl.zeros((ROWS,), tl.float32)
    low1, low2, low3 = low0, low0, low0
    for tile in range(TILES):
        o = (tl.program_id(1) * TILES + tile) * OUTPUTS + tl.arange(0, OUTPUTS)
        out_inside = o < num_out
        total, place, inside = _finished(
            y_ptr, other_ptr, h_ptr, left_ptr + probe * left_probe, bias_ptr + probe * bias_probe, row, n < num_rows,
            o, out_inside, num_out, h_step, bias_step, scale, RANK, True, HAS_BIAS, FUNCTION, PLUS, TIMES,
        )  # fmt: skip
        rounded = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, rounded, mask=inside)
        value = tl.where(inside, rounded.to(tl.float32), 0.0)
        low0 += _product(value, right_ptr, o, out_inside, True)
        low1 += _product(value, right_ptr + num_out, o, out_inside, RANK > 1)
        low2 += _product(value, right_ptr + 2 * num_out, o, out_inside, RANK > 2)
        low3 += _product(value, right_ptr + 3 * num_out, o, out_inside, RANK > 3)
    low_ptr += ((tl.program_id(1) * tl.num_programs(2) + probe) * num_rows + n) * RANK
    tl.store(low_ptr, low0, mask=n < num_rows)
    if RANK > 1:
        tl.store(low_ptr + 1, low1, mask=n < num_rows)
    if RANK > 2:
        tl.store(low_ptr + 2, low2, mask=n < num_rows)
    if RANK > 3:
        tl.store(low_ptr + 3, low3, mask=n < num_rows)


@triton.jit
def layer_norm(
    out_ptr, x_ptr, weight_ptr, bias_ptr, num_rows, size, weight_probe, bias_probe, eps,
    HAS_BIAS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out[p, n] = (x[p, n] − mean) / sqrt(variance + eps) * weight[p] + bias[p], in float32; one program for a row."""
    row = tl.program_id(0).to(tl.int64)
    probe = row // num_rows
    i = tl.arange(0, SIZE)
    inside = i < size
    x = tl.load(x_ptr + row * size + i, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / size, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / size + eps)
    value = centred * scale * tl.load(weight_ptr + probe * weight_probe + i, mask=inside).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + probe * bias_probe + i, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * size + i, value.to(out_ptr.dtype.element_ty), mask=inside)
