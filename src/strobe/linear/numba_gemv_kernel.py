"""The kernel of `numba_gemv`."""

from __future__ import annotations

import numba
import numpy as np

from strobe.cpu.jit import FASTMATH, compiled
from strobe.cpu.kernel import ONE, exp, floats, halves, longs, widened

_WIDTH = 1 << 15
"""Columns whose sums are kept at once, over all tokens: they stay in the second cache."""
_ZERO = np.float32(0.0)


@numba.njit(fastmath=FASTMATH)
def _normed(x, weight, eps, out):
    """RMSNorm of every row of x."""
    for token in range(x.shape[0]):
        row, into = x[token], out[token]
        squares = _ZERO
        for i in range(row.size):
            squares += row[i] * row[i]
        scale = ONE / np.sqrt(squares / np.float32(row.size) + eps)
        for i in range(row.size):
            into[i] = row[i] * scale * weight[i]


@numba.njit(fastmath=FASTMATH)
def _add(x0, x1, x2, x3, w0, w1, w2, w3, sums):
    """Four inputs of one token times their rows of the weight."""
    for j in range(sums.size):
        b0, b1, b2, b3 = widened(w0[j]), widened(w1[j]), widened(w2[j]), widened(w3[j])
        sums[j] += x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3


@numba.njit(fastmath=FASTMATH)
def _add_four(x, w0, w1, w2, w3, sums):
    """As `_add` for four tokens, x `[4, 4]`: a row that was read serves all of them."""
    a0, a1, a2, a3 = sums[0], sums[1], sums[2], sums[3]
    x00, x01, x02, x03 = x[0, 0], x[0, 1], x[0, 2], x[0, 3]
    x10, x11, x12, x13 = x[1, 0], x[1, 1], x[1, 2], x[1, 3]
    x20, x21, x22, x23 = x[2, 0], x[2, 1], x[2, 2], x[2, 3]
    x30, x31, x32, x33 = x[3, 0], x[3, 1], x[3, 2], x[3, 3]
    for j in range(a0.size):
        b0, b1, b2, b3 = widened(w0[j]), widened(w1[j]), widened(w2[j]), widened(w3[j])
        a0[j] += x00 * b0 + x01 * b1 + x02 * b2 + x03 * b3
        a1[j] += x10 * b0 + x11 * b1 + x12 * b2 + x13 * b3
        a2[j] += x20 * b0 + x21 * b1 + x22 * b2 + x23 * b3
        a3[j] += x30 * b0 + x31 * b1 + x32 * b2 + x33 * b3


@numba.njit(fastmath=FASTMATH)
def _multiply(x, weight, first, last, sums):
    """sums `[tokens, last - first]` = x times columns `[first, last)` of weight `[inputs, outputs]`."""
    tokens, inputs = x.shape
    sums[:] = _ZERO
    fours = inputs // 4 * 4
    for i in range(0, fours, 4):
        w0, w1 = weight[i, first:last], weight[i + 1, first:last]
        w2, w3 = weight[i + 2, first:last], weight[i + 3, first:last]
        token = 0
        while token + 4 <= tokens:
            _add_four(x[token : token + 4, i : i + 4], w0, w1, w2, w3, sums[token : token + 4])
            token += 4
        while token < tokens:
            _add(x[token, i], x[token, i + 1], x[token, i + 2], x[token, i + 3], w0, w1, w2, w3, sums[token])
            token += 1
    for i in range(fours, inputs):
        row = weight[i, first:last]
        for token in range(tokens):
            factor, into = x[token, i], sums[token]
            for j in range(into.size):
                into[j] += factor * widened(row[j])


@numba.njit(fastmath=FASTMATH)
def _add_bias(bias, sums):
    for token in range(sums.shape[0]):
        row = sums[token]
        for j in range(row.size):
            row[j] += bias[j]


@numba.njit(fastmath=FASTMATH)
def _swiglu(gate, up):
    """gate becomes `silu(gate) * up`."""
    for token in range(gate.shape[0]):
        row, other = gate[token], up[token]
        for j in range(row.size):
            row[j] = row[j] / (ONE + exp(-row[j])) * other[j]


@numba.njit(fastmath=FASTMATH)
def _columns(x, weight, bias, biased, swiglu, residual, out, begin, end):
    """Columns `[begin, end)` of the result, some at a time."""
    tokens, half = x.shape[0], weight.shape[1] // 2
    most = min(end - begin, max(16, _WIDTH // tokens // 16 * 16))
    memory, other = np.empty(tokens * most, np.float32), np.empty(tokens * most if swiglu else 0, np.float32)
    for first in range(begin, end, most):
        last = min(end, first + most)
        shape = (tokens, last - first)
        sums = memory[: tokens * (last - first)].reshape(shape)
        _multiply(x, weight, first, last, sums)
        if biased:
            _add_bias(bias[first:last], sums)
        if swiglu:
            ups = other[: tokens * (last - first)].reshape(shape)
            _multiply(x, weight, half + first, half + last, ups)
            if biased:
                _add_bias(bias[half + first : half + last], ups)
            _swiglu(sums, ups)
        for token in range(tokens):
            into, row = out[token, first:last], sums[token]
            if residual:
                for j in range(row.size):
                    into[j] += row[j]
            else:
                for j in range(row.size):
                    into[j] = row[j]


@compiled("void(intp, float32, intp, intp, intp, boolean, boolean, boolean, intp, intp)")
def project(fixed_at, eps, x_at, out_at, tokens, normed, swiglu, residual, begin, end):
    """Columns `[begin, end)` of the result.

    `fixed_at` is the address of int64s: the weight's, the bias's and the norm's address (0 where there is
    none), inputs, outputs, and whether the weight is in bfloat16.
    """
    weight_at, bias_at, norm_at, inputs, outputs, narrow = longs(fixed_at, (6,))
    x = floats(x_at, (tokens, inputs))
    if normed:
        given, x = x, np.empty((tokens, inputs), np.float32)
        _normed(given, floats(norm_at, (inputs,)), eps, x)
    out = floats(out_at, (tokens, outputs // 2 if swiglu else outputs))
    bias, biased, shape = floats(bias_at, (outputs,)), bias_at != 0, (inputs, outputs)
    if narrow:
        _columns(x, halves(weight_at, shape), bias, biased, swiglu, residual, out, begin, end)
    else:
        _columns(x, floats(weight_at, shape), bias, biased, swiglu, residual, out, begin, end)
