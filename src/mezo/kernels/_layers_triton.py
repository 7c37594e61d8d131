"""Triton source of `mezo.kernels.layers`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["scale"])
def low_rank_sum(
    out_ptr, y_ptr, other_ptr, h_ptr, left_ptr, bias_ptr, num_rows, num_out, h_step, left_probe, bias_probe,
    bias_step, scale, RANK: tl.constexpr, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr, PLUS: tl.constexpr,
    TIMES: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """out[p, n, o] = f(y[p, n, o] + sum over k of h[p, n, k] * left[p, o, k] + bias[p, o]) * scale + other[p, n, o].

    f is relu, silu or nothing; with `TIMES` the last is a product; program (rows, outputs, probe). `out` may be `y`.
    """
    probe = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row_inside, out_inside = n < num_rows, o < num_out
    row = probe * num_rows + n
    place = row[:, None] * num_out + o[None, :]
    inside = row_inside[:, None] & out_inside[None, :]
    total = tl.load(y_ptr + place, mask=inside).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + probe * bias_probe + o * bias_step, mask=out_inside).to(tl.float32)[None, :]
    for k in tl.static_range(RANK):
        h = tl.load(h_ptr + row * h_step + k, mask=row_inside).to(tl.float32)
        left = tl.load(left_ptr + probe * left_probe + o * RANK + k, mask=out_inside)
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
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


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
