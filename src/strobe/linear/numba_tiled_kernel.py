"""The kernel of `numba_tiled`."""

from __future__ import annotations

from functools import cache

import numba
import numpy as np

from strobe.cpu import jit
from strobe.cpu.jit import FASTMATH
from strobe.cpu.kernel import ONE, address, exp, floats, longs, take
from strobe.cpu.vector import PANEL, WIDEST_VECTOR, multiply_tile

WIDEST = 4 * PANEL
"""Columns of the widest tile."""
_TALL = WIDEST_VECTOR // 2
_MIDDLE, _FLAT = _TALL // 2, _TALL // 4
"""Tokens of a tile: of one panel, of two, of four. As many sums each, which is half of the registers."""
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


@numba.njit
def _copy(weight, into):
    """Columns of a weight that lies input by input, and zeros where `into` is wider."""
    into[:, weight.shape[1] :] = _ZERO
    for i in range(weight.shape[0]):
        row, copied = weight[i], into[i]
        for j in range(row.size):
            copied[j] = row[j]


@numba.njit(fastmath=FASTMATH)
def _add_bias(bias, sums):
    for token in range(sums.shape[0]):
        row = sums[token]
        for j in range(bias.size):
            row[j] += bias[j]


@numba.njit(fastmath=FASTMATH)
def _swiglu(gate, up):
    """gate becomes `silu(gate) * up`."""
    for token in range(gate.shape[0]):
        row, other = gate[token], up[token]
        for j in range(row.size):
            row[j] = row[j] / (ONE + exp(-row[j])) * other[j]


@numba.njit(fastmath=FASTMATH)
def _store(sums, residual, out):
    """The sums of out's columns into it, or onto what is there."""
    for token in range(out.shape[0]):
        row, into = sums[token], out[token]
        if residual:
            for j in range(into.size):
                into[j] += row[j]
        else:
            for j in range(into.size):
                into[j] = row[j]


@cache
def kernel(narrow: bool) -> jit.Kernel:
    """`project` for a weight in bfloat16, in panels, or for one in float32 that lies input by input."""
    bits = 16 if narrow else 32

    @jit.kernel
    def project(call_at):
        """Columns of the result, as many at a time as a tile has, as they are taken."""
        _, _, fixed_at, x_at, out_at, tokens, normed, swiglu, residual = longs(call_at, (9,))
        weight_at, bias_at, norm_at, eps_at, inputs, outputs = longs(fixed_at, (6,))
        count, width = 1, WIDEST
        if tokens >= _TALL:
            count, width = _TALL, PANEL
        elif tokens >= _MIDDLE:
            count, width = _MIDDLE, 2 * PANEL
        elif tokens >= _FLAT:
            count = _FLAT
        parts = 2 if swiglu else 1
        columns = outputs // parts
        panels = -(-columns // WIDEST) * (WIDEST // PANEL)
        sums = np.empty((parts, tokens, width), np.float32)
        whole = np.empty((0 if narrow else inputs, width), np.float32)
        normed_x = np.empty((tokens if normed else 0, inputs), np.float32)
        x_row, sums_row = 4 * inputs, 4 * width
        while True:
            first = take(call_at) * width
            if first >= columns:
                return
            if normed:
                x, eps = floats(x_at, (tokens, inputs)), floats(eps_at, (1,))[0]
                _normed(x, floats(norm_at, (inputs,)), eps, normed_x)
                x_at, normed = address(normed_x), 0
            last = min(columns, first + width)
            for part in range(parts):
                begin, end = part * columns + first, part * columns + last
                into = address(sums[part])
                if narrow:
                    panel, row = 2 * PANEL * inputs, 2 * PANEL
                    at = weight_at + (part * panels + first // PANEL) * panel
                elif end - begin == width:
                    panel, row = 4 * PANEL, 4 * outputs
                    at = weight_at + 4 * begin
                else:
                    panel, row = 4 * PANEL, 4 * width
                    _copy(floats(weight_at, (inputs, outputs))[:, begin:end], whole)
                    at = address(whole)
                strides = (x_row, panel, row, sums_row)
                for token in range(0, tokens, count):
                    # the last tile begins early enough to be whole: what two tiles share they compute alike
                    here = min(token, tokens - count)
                    x_here, out_here = x_at + here * x_row, into + here * sums_row
                    if count == _TALL:
                        multiply_tile(x_here, at, out_here, inputs, strides, _TALL, 1, bits)
                    elif count == _MIDDLE:
                        multiply_tile(x_here, at, out_here, inputs, strides, _MIDDLE, 2, bits)
                    elif count == _FLAT:
                        multiply_tile(x_here, at, out_here, inputs, strides, _FLAT, 4, bits)
                    else:
                        multiply_tile(x_here, at, out_here, inputs, strides, 1, 4, bits)
                if bias_at != 0:
                    _add_bias(floats(bias_at, (outputs,))[begin:end], sums[part])
            if swiglu:
                _swiglu(sums[0], sums[1])
            _store(sums[0], residual, floats(out_at, (tokens, columns))[:, first:last])

    return project
