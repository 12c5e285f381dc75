"""`cache.append_rotated` on a CPU."""

from __future__ import annotations

import numba

from strobe.cpu.jit import FASTMATH, compiled
from strobe.cpu.kernel import floats, longs


@numba.njit(fastmath=FASTMATH)
def _rotate(x, cos, sin, out):
    """As `rope.rotate` does one head."""
    half = x.size // 2
    for i in range(half):
        out[i] = x[i] * cos[i] + x[half + i] * sin[i]
    for i in range(half):
        out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i]


@compiled("void(intp, intp, intp, intp, intp, intp, intp, intp, intp, intp, intp, intp, intp, intp)")
def append_rotated(
    qk_at, v_at, cos_at, sin_at, slots_at, k_pages_at, v_pages_at, q_at,
    tokens, q_heads, kv_heads, head_dim, qk_token, v_token,
):  # fmt: skip
    """Strides in elements; a token's heads lie side by side."""
    slots = longs(slots_at, (tokens,))
    cosines, sines = floats(cos_at, (tokens, head_dim)), floats(sin_at, (tokens, head_dim))
    for token in range(tokens):
        cos, sin = cosines[token], sines[token]
        qk = floats(qk_at + 4 * token * qk_token, (q_heads + kv_heads, head_dim))
        v = floats(v_at + 4 * token * v_token, (kv_heads * head_dim,))
        q = floats(q_at + 4 * token * q_heads * head_dim, (q_heads, head_dim))
        stored = 4 * slots[token] * kv_heads * head_dim
        k_stored = floats(k_pages_at + stored, (kv_heads, head_dim))
        v_stored = floats(v_pages_at + stored, (kv_heads * head_dim,))
        for head in range(q_heads):
            _rotate(qk[head], cos, sin, q[head])
        for head in range(kv_heads):
            _rotate(qk[q_heads + head], cos, sin, k_stored[head])
        for i in range(v.size):
            v_stored[i] = v[i]
