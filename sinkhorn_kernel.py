"""mHC's residual connection on a GPU: what lies between two sublayers, in Triton.

The kernels alone. mhc_gpu.py launches them and gives them gradients; mhc.py is what to import, for its mhc_step.

What is fused. Sublayer l reads n streams x through H_pre and writes its output y back through H_post and H_res (Eq 3).
The mappings of sublayer l+1 are functions of x_next alone, and x_next is made from x and y of sublayer l. So the unit
is not the sublayer but the *boundary*: close l, map and read for l+1.

    streams    x_next[i] = sum_j H_res[i, j] x[j] + H_post[i] y       Eq 3; rounded to x's dtype before it is read
               sums = vec(x_next) phi and |vec(x_next)|^2             Eq 14, 15, while x_next's tile is in registers
    maps       r = sqrt(|vec(x_next)|^2 / nC + eps)                   Eq 15
               pre | post | res = alpha / r * vec(x_next) phi + b     Eq 16: the norm is divided out after the product
               H_pre = sigmoid, H_post = 2 sigmoid, H_res = Sinkhorn-Knopp of exp                   Eq 17-19, Eq 9
    read       x_in = sum_i H_pre[i] x_next[i]                        what sublayer l+1 reads

The cut is where the streams end. A token's streams are 10,240 numbers, its sums 25 and its mappings 24, so `maps` is
1/400 of the bytes and can be anything: here Sinkhorn's kernel; for other manifolds plain PyTorch (mhc_gpu.py); and HC's
mappings use the same `streams` and `read`. In single-pass mHC x_next is read through the H_pre of the boundary before,
which is known beforehand, and `streams` makes x_in too.

Layout. x (T, n, C) with C contiguous, T all leading dimensions as one. A program owns BT tokens and walks over tiles of
BC channels; of x a tile is (n, BT, BC), streams first, so that a thread holds all streams of an entry (up to 4 of them)
and mixes them without exchange. phi (nC, n^2+2n) is fp32 with columns pre | post | res; logit (i, j) of H_res is column
2n + n*i + j. Mappings and sums are fp32 whatever x is.

Bytes. The unit is C elements of x a token; n = 4. A boundary is bound by memory, so these are its cost.
                                                                             mHC    single-pass
    forward    streams: reads x, y and writes x_next (single-pass: x_in)     9      10
               read:    reads x_next and writes x_in                         5
                                                                            14      10
    backward   read:    reads x_next and d_x_in, for d_H_pre                 5
               streams: reads d_x_next, d_x_in, x, y; writes d_x, d_y       15      15
               phi:     reads x_next, for d_phi                              4       4
                                                                            24      19
The paper's three forward kernels move 18, unfused ones 34 (its Table 2: 5n+1 read and 3n+1 written). phi comes on top:
24 fp32 columns are 192/BT units a program and pass (3 at BT = 64), most of it from L2. `python tools/bench.py traffic`
counts it all. d_phi inside `streams` would save 4 units more, at the price of an accumulator that the register file
has no room for (LOG.md).

Few tokens. Where BT tokens a program give too few programs for a GPU's processors, several share the channels of the
same tokens, each writes its share of the sums, and the next kernel adds them in order. A decode step of 64 tokens is
one program a channel tile. No program reads what its own launch wrote: the only barriers are between kernels.

Backward. Saved: x, y, H_post, H_res, H_pre, sums, and x_next, which is the next boundary's x: the same tensor, saved
twice, stored once. Nothing of Sinkhorn: all iterations are replayed on chip (a gradient from the final matrix alone is
wrong by more than 100 % at logits of standard deviation 6). Sums over programs (d_alpha, d_b, d_phi, d_H_post, d_H_res,
d_H_pre) are written as shares and added in a fixed order: no atomics, the same bits in every run.

Precision. phi is multiplied as three bf16 terms when x is bf16 (24 bits, products exact in fp32) and as tf32x3 if not,
both on tensor cores; the gradient through phi to a bf16 x is tf32. DOTS = 'ieee' asks for plain fp32 everywhere.

What it trades. Registers (one program to an SM) for bytes; a pointer that is None is a compile-time switch, so that one
kernel serves every form. What compilers make of it is guarded by tests/test_kernel_compile.py; where the order of lines
matters to them, a comment says so.
"""

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # no wheel for this platform (macOS): everything but impl='triton' still works
    from types import SimpleNamespace

    triton, tl = None, SimpleNamespace(constexpr=None)


def jit(kernel):
    """triton.jit where Triton exists, so that this file imports where it does not.

    Token counts are never specialised on: one compilation serves every batch.
    """
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["T", "TILES", "STEPS", "SHARES"])


# ----------------------------------------------------------------------------------------------------------------------
# A worked example: Sinkhorn alone. One program takes BT matrices, forward and backward.


@jit
def tokens(T, BT: tl.constexpr):
    """A program's tokens: the first one, in 64 bits, so that 32 do for offsets from it; those offsets; which exist."""
    start = tl.program_id(0).to(tl.int64) * BT
    row = tl.arange(0, BT)
    return start, row, start + row < T


@jit
def logsumexp(a, axis: tl.constexpr):
    top = tl.max(a, axis)
    return top + tl.log(tl.sum(tl.exp(a - tl.expand_dims(top, axis)), axis))


@jit
def sinkhorn_forward(log_M, ITERS: tl.constexpr):
    """(BT, n, n) logits -> H_res, in the log domain (Eq 9)."""
    for _ in range(ITERS):
        # log_M = log_M - log_M.logsumexp(-2, keepdim=True)  # T_c: every column sums to 1
        log_M -= logsumexp(log_M, 1)[:, None, :]
        # log_M = log_M - log_M.logsumexp(-1, keepdim=True)  # T_r: every row sums to 1
        log_M -= logsumexp(log_M, 2)[:, :, None]
    return tl.exp(log_M)


@jit
def sinkhorn_backward(log_M, dM, n: tl.constexpr, ITERS: tl.constexpr, BT: tl.constexpr, HISTORY: tl.constexpr):
    """Gradient of the logits from that of H_res: every iteration replayed, then undone in turn.

    Iterates differ by potentials alone: log M then = log M at the end + u[:, None] + v[None, :], where u sums the row
    norms of the iterations undone so far and v follows from u by T_c. So the whole history is one row norm an
    iteration, (BT, n, HISTORY), in registers; and since u, v start at 0, nothing large cancels where M is not small.
    Undoing a normalisation: with G the gradient of log M after it, the gradient before is G - M * G.sum(its axis).
    """
    step = tl.arange(0, HISTORY)[None, None, :]
    history = tl.zeros((BT, n, HISTORY), tl.float32)
    for k in range(ITERS):
        log_M -= logsumexp(log_M, 1)[:, None, :]
        norm = logsumexp(log_M, 2)[:, :, None]
        log_M -= norm
        history = tl.where(step == k, norm, history)
    G = dM * tl.exp(log_M)
    u = tl.zeros((BT, n), tl.float32)
    for k in range(ITERS):
        before = u + tl.sum(tl.where(step == ITERS - 1 - k, history, 0.0), 2)
        after_T_c = log_M + before[:, :, None]
        after_T_c -= logsumexp(after_T_c, 1)[:, None, :]
        G -= tl.exp(after_T_c + (u - before)[:, :, None]) * tl.sum(G, 2)[:, :, None]  # undo T_r
        G -= tl.exp(after_T_c) * tl.sum(G, 1)[:, None, :]  # undo T_c
        u = before
    return G


@jit
def map_offsets(row, n: tl.constexpr):
    """Offsets of a (tokens, n) and of a (tokens, n, n) map, and their columns in phi, b and proj."""
    i = tl.arange(0, n)
    ij = i[:, None] * n + i[None, :]
    return row[:, None] * n + i[None, :], row[:, None, None] * (n * n) + ij[None, :, :], i, ij


@jit
def sinkhorn_kernel(logits_ptr, H_res_ptr, T, n: tl.constexpr, ITERS: tl.constexpr, BT: tl.constexpr):
    start, row, live = tokens(T, BT)
    _, at, _, _ = map_offsets(row, n)
    log_M = tl.load(logits_ptr + start * n * n + at, live[:, None, None], 0.0).to(tl.float32)
    tl.store(H_res_ptr + start * n * n + at, sinkhorn_forward(log_M, ITERS), live[:, None, None])


@jit
def sinkhorn_backward_kernel(
    logits_ptr, d_H_res_ptr, d_logits_ptr, T,
    n: tl.constexpr, ITERS: tl.constexpr, HISTORY: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    start, row, live = tokens(T, BT)
    live = live[:, None, None]
    _, at, _, _ = map_offsets(row, n)
    log_M = tl.load(logits_ptr + start * n * n + at, live, 0.0).to(tl.float32)
    d_H_res = tl.load(d_H_res_ptr + start * n * n + at, live, 0.0)
    tl.store(d_logits_ptr + start * n * n + at, sinkhorn_backward(log_M, d_H_res, n, ITERS, BT, HISTORY), live)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of the boundary. A tile is (BT, BC), tokens by channels of one stream, or (n, BT, BC), all streams.


@jit
def stream_offsets(row, c, C, n: tl.constexpr):
    """Offsets (n, BT, BC) in a (tokens, n, C) tensor.

    Layouts fill warps from the last axis on, so a thread holds all n of an entry (4 of 8 in `streams` on NVIDIA).
    """
    return tl.arange(0, n)[:, None, None] * C + row[None, :, None] * (n * C) + c[None, None, :]


@jit
def H_res_offsets(row, n: tl.constexpr):
    """Offsets of H_res[i, j] as (n of j, BT, n of i): x's own axes in front, the axis that pick takes from last."""
    j, i = tl.arange(0, n)[:, None, None], tl.arange(0, n)[None, None, :]
    return row[None, :, None] * (n * n) + i * n + j


@jit
def load_gate(ptr, row, live, n: tl.constexpr):
    """H_pre or H_post as (BT, n)."""
    return tl.load(ptr + row[:, None] * n + tl.arange(0, n)[None, :], live[:, None], 0.0)


@jit
def pick(entries, i):
    """entries[..., i], as a sum: what is in registers cannot be indexed, and a load would fetch it in every tile."""
    return tl.sum(tl.where(tl.arange(0, entries.shape[-1]) == i, entries, 0.0), len(entries.shape) - 1)


@jit
def mix(x, y, H_post_i, H_res_i):
    """Stream i of Eq 3 before rounding: x (n, BT, BC), y (BT, BC), H_post_i (BT,), H_res_i (n, BT) -> (BT, BC)."""
    return H_post_i[:, None] * y + tl.sum(H_res_i[:, :, None] * x, 0)


@jit
def dot(a, w, acc, PRECISION: tl.constexpr):
    """acc + a @ w, with a in x's dtype and w in fp32.

    '3xbf16': w = w1 + w2 + w3 in bf16, 24 bits in all, and bf16 products are exact in fp32: as good as fp32, on
    tensor cores. Other names are Triton's: 'tf32' (Eq 10), 'tf32x3', 'ieee'.
    """
    if PRECISION == "3xbf16":
        w1 = w.to(tl.bfloat16)
        w2 = (w - w1.to(tl.float32)).to(tl.bfloat16)
        w3 = (w - w1.to(tl.float32) - w2.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(a, w1, tl.dot(a, w2, tl.dot(a, w3, acc)))
    else:
        return tl.dot(a.to(tl.float32), w, acc, input_precision=PRECISION)


# ----------------------------------------------------------------------------------------------------------------------
# Forward: the streams, the mappings, the read. A pointer that is None stands for what the form has not.


@jit
def streams_kernel(
    x_ptr, y_ptr, H_post_ptr, H_res_ptr, phi_ptr, H_pre_ptr, x_next_ptr, x_in_ptr, sums_ptr,
    T, C, TILES,
    n: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BT tokens, TILES tiles of their channels: x_next; its sums with phi and its square; x_in if H_pre is known."""
    UNROLL: tl.constexpr = n if n < 8 else 1  # unrolled, 8 streams hoist their loads and spill kilobytes
    dtype = x_ptr.dtype.element_ty
    start, row, live = tokens(T, BT)
    x_ptr += start * n * C
    if y_ptr is not None:
        x_next_ptr += start * n * C
        y_ptr += start * C
        H_post = load_gate(H_post_ptr + start * n, row, live, n)
        H_res = tl.load(H_res_ptr + start * n * n + H_res_offsets(row, n), live[None, :, None], 0.0)
    if H_pre_ptr is not None:
        H_pre = load_gate(H_pre_ptr + start * n, row, live, n)
        x_in_ptr += start * C
    if phi_ptr is not None:
        m = tl.arange(0, MP)[None, :]
        proj = tl.zeros((BT, MP), tl.float32)  # columns pre | post | res, then zeros
        square = tl.zeros((BT,), tl.float32)

    first = tl.program_id(1) * TILES * BC
    for c0 in range(first, first + TILES * BC, BC):
        c = c0 + tl.arange(0, BC)
        tile = live[:, None] & (c < C)[None, :]
        if y_ptr is not None:
            x = tl.load(x_ptr + stream_offsets(row, c, C, n), tile[None, :, :], 0.0).to(tl.float32)
            y = tl.load(y_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
        if H_pre_ptr is not None:
            x_in = tl.zeros((BT, BC), tl.float32)
        for i in tl.range(0, n, loop_unroll_factor=UNROLL):
            at = row[:, None] * (n * C) + i * C + c[None, :]
            # x_next = x if y is None else mhc_post_res_ref(x, y, H_post, H_res), rounded before anything reads it
            if y_ptr is not None:
                x_next = mix(x, y, pick(H_post, i), pick(H_res, i)).to(dtype)
                tl.store(x_next_ptr + at, x_next, tile)
            else:
                x_next = tl.load(x_ptr + at, tile, 0.0)
            if phi_ptr is not None:
                # proj = v @ phi.to(v.dtype)  # Eq 14
                phi = tl.load(phi_ptr + (i * C + c)[:, None] * M + m, (c < C)[:, None] & (m < M), 0.0)  # (BC, MP)
                proj = dot(x_next, phi, proj, PRECISION)
                square += tl.sum(x_next.to(tl.float32) * x_next.to(tl.float32), 1)
            if H_pre_ptr is not None:
                # x_in = (H_pre.unsqueeze(-1) * x_next).sum(-2).to(x.dtype)
                x_in += pick(H_pre, i)[:, None] * x_next.to(tl.float32)
        if H_pre_ptr is not None:
            tl.store(x_in_ptr + row[:, None] * C + c[None, :], x_in, tile)

    if phi_ptr is not None:
        sums_ptr += (tl.program_id(1).to(tl.int64) * T + start) * (M + 1)
        tl.store(sums_ptr + row[:, None] * (M + 1) + m, proj, live[:, None] & (m < M))
        tl.store(sums_ptr + row * (M + 1) + M, square, live)


@jit
def load_logits(sums_ptr, alpha_ptr, b_ptr, start, row, live, T, SHARES, size, eps, n: tl.constexpr):
    """Eq 15, 16 -> proj / r and alpha * proj / r + b, each as pre (BT, n), post (BT, n), res (BT, n, n); r (BT,)."""
    WIDTH: tl.constexpr = n * n + 2 * n + 1
    UNROLL: tl.constexpr = 4 if n < 8 else 1  # several shares on their way at once
    sums_ptr += start * WIDTH
    i, ij = tl.arange(0, n), tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    at_n, at_nn = row[:, None] * WIDTH + i[None, :], row[:, None, None] * WIDTH + 2 * n + ij[None, :, :]
    square, res = tl.zeros((row.shape[0],), tl.float32), tl.zeros((row.shape[0], n, n), tl.float32)
    pre, post = tl.zeros((row.shape[0], n), tl.float32), tl.zeros((row.shape[0], n), tl.float32)
    for _ in tl.range(0, SHARES, loop_unroll_factor=UNROLL):  # of `sums` (SHARES, T, WIDTH): added in order
        square += tl.load(sums_ptr + row * WIDTH + WIDTH - 1, live, 0.0)
        pre += tl.load(sums_ptr + at_n, live[:, None], 0.0)
        post += tl.load(sums_ptr + at_n + n, live[:, None], 0.0)
        res += tl.load(sums_ptr + at_nn, live[:, None, None], 0.0)
        sums_ptr += T.to(tl.int64) * WIDTH
    # r = (v.square().mean(-1, keepdim=True) + eps).sqrt()  # Eq 15
    r = tl.where(live, tl.sqrt(square / size + eps), 1.0)
    # logits = scale / r * proj + b.to(v.dtype)  # Eq 16: dividing after the matmul is the RMSNorm
    pre, post, res = pre / r[:, None], post / r[:, None], res / r[:, None, None]
    pre_logits = tl.load(alpha_ptr) * pre + tl.load(b_ptr + i)[None, :]
    post_logits = tl.load(alpha_ptr + 1) * post + tl.load(b_ptr + n + i)[None, :]
    res_logits = tl.load(alpha_ptr + 2) * res + tl.load(b_ptr + 2 * n + ij)[None, :, :]
    return pre, post, res, pre_logits, post_logits, res_logits, r


@jit
def maps_kernel(
    sums_ptr, alpha_ptr, b_ptr, H_pre_ptr, H_post_ptr, H_res_ptr, T, SHARES, size, eps,
    n: tl.constexpr, ITERS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The three mappings of BT tokens; size is nC."""
    start, row, live = tokens(T, BT)
    _, _, _, pre, post, res, _ = load_logits(sums_ptr, alpha_ptr, b_ptr, start, row, live, T, SHARES, size, eps, n)
    at_n, at_nn, _, _ = map_offsets(row, n)
    # return pre.sigmoid(), 2 * post.sigmoid(), H_res  # Eq 17, 18, 19
    tl.store(H_pre_ptr + start * n + at_n, tl.sigmoid(pre), live[:, None])
    tl.store(H_post_ptr + start * n + at_n, 2 * tl.sigmoid(post), live[:, None])
    tl.store(H_res_ptr + start * n * n + at_nn, sinkhorn_forward(res, ITERS), live[:, None, None])


@jit
def read_kernel(x_ptr, H_pre_ptr, x_in_ptr, T, C, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """x_in = sum_i H_pre[i] x[i], a tile a program."""
    start, row, live = tokens(T, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    tile = live[:, None] & (c < C)[None, :]
    H_pre = tl.load(H_pre_ptr + start * n + tl.arange(0, n)[:, None] + row[None, :] * n, live[None, :], 0.0)
    x = tl.load(x_ptr + start * n * C + stream_offsets(row, c, C, n), tile[None, :, :], 0.0).to(tl.float32)
    # x_in = (H_pre.unsqueeze(-1) * x).sum(-2).to(x.dtype)
    tl.store(x_in_ptr + start * C + row[:, None] * C + c[None, :], tl.sum(H_pre[:, :, None] * x, 0), tile)


# ----------------------------------------------------------------------------------------------------------------------
# Backward: the read and the mappings, as far as H_pre goes; the streams; phi.


@jit
def read_backward_kernel(
    x_ptr, d_x_in_ptr, d_H_pre_ptr, T, C, TILES, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """d_H_pre[i] = sum_c d_x_in[c] x[i, c]: BT tokens, TILES tiles of their channels."""
    start, row, live = tokens(T, BT)
    i = tl.arange(0, n)
    x_ptr += start * n * C
    d_x_in_ptr += start * C
    d_H_pre = tl.zeros((BT, n), tl.float32)
    first = tl.program_id(1) * TILES * BC
    for c0 in range(first, first + TILES * BC, BC):
        c = c0 + tl.arange(0, BC)
        tile = live[:, None] & (c < C)[None, :]
        d_x_in = tl.load(d_x_in_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
        streams = row[:, None, None] * (n * C) + i[None, :, None] * C + c[None, None, :]
        x = tl.load(x_ptr + streams, tile[:, None, :], 0.0).to(tl.float32)  # (BT, n, BC)
        d_H_pre += tl.sum(x * d_x_in[:, None, :], 2)
    d_H_pre_ptr += (tl.program_id(1).to(tl.int64) * T + start) * n
    tl.store(d_H_pre_ptr + row[:, None] * n + i[None, :], d_H_pre, live[:, None])


@jit
def maps_backward_kernel(
    d_H_pre_ptr, d_H_post_ptr, d_H_res_ptr, sums_ptr, alpha_ptr, b_ptr, d_sums_ptr, d_params_ptr, T, SHARES, size, eps,
    n: tl.constexpr, ITERS: tl.constexpr, HISTORY: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Back through the mappings of BT tokens: to `sums`, and to this program's share of b and alpha."""
    M: tl.constexpr = n * n + 2 * n
    start, row, live = tokens(T, BT)
    at_n, at_nn, i, ij = map_offsets(row, n)
    live_n, live_nn = live[:, None], live[:, None, None]
    pre, post, res, pre_logits, post_logits, res_logits, r = load_logits(
        sums_ptr, alpha_ptr, b_ptr, start, row, live, T, SHARES, size, eps, n
    )

    # back through sigmoid, 2 sigmoid and Sinkhorn (Eq 17-19); dead rows come in as zero and stay zero. H (1 - H) would
    # be 0 for a gate near 1: 1 - H = sigmoid(-logit)
    d_pre = tl.load(d_H_pre_ptr + start * n + at_n, live_n, 0.0) * tl.sigmoid(pre_logits) * tl.sigmoid(-pre_logits)
    d_post = tl.load(d_H_post_ptr + start * n + at_n, live_n, 0.0)
    d_post *= 2 * tl.sigmoid(post_logits) * tl.sigmoid(-post_logits)
    d_H_res = tl.load(d_H_res_ptr + start * n * n + at_nn, live_nn, 0.0)
    d_res = sinkhorn_backward(res_logits, d_H_res, n, ITERS, BT, HISTORY)

    # back through Eq 16: to b and alpha, summed over this program's tokens; to proj
    d_params_ptr += tl.program_id(0) * (M + 3)
    tl.store(d_params_ptr + i, tl.sum(d_pre, 0))
    tl.store(d_params_ptr + n + i, tl.sum(d_post, 0))
    tl.store(d_params_ptr + 2 * n + ij, tl.sum(d_res, 0))
    pre, post, res = tl.sum(d_pre * pre, 1), tl.sum(d_post * post, 1), tl.sum(tl.sum(d_res * res, 2), 1)
    tl.store(d_params_ptr + M, tl.sum(pre, 0))
    tl.store(d_params_ptr + M + 1, tl.sum(post, 0))
    tl.store(d_params_ptr + M + 2, tl.sum(res, 0))
    alpha_pre, alpha_post, alpha_res = tl.load(alpha_ptr), tl.load(alpha_ptr + 1), tl.load(alpha_ptr + 2)
    d_sums_ptr += start * (M + 1)
    at = row[:, None] * (M + 1) + i[None, :]
    tl.store(d_sums_ptr + at, alpha_pre / r[:, None] * d_pre, live_n)
    tl.store(d_sums_ptr + at + n, alpha_post / r[:, None] * d_post, live_n)
    at = row[:, None, None] * (M + 1) + 2 * n + ij[None, :, :]
    tl.store(d_sums_ptr + at, alpha_res / r[:, None, None] * d_res, live_nn)
    # Eq 15: r divides every logit's dynamic part, and d r = d square / (2 nC r)
    dynamic = alpha_pre * pre + alpha_post * post + alpha_res * res
    tl.store(d_sums_ptr + row * (M + 1) + M, -dynamic / (2 * r * r * size), live)


@jit
def streams_backward_kernel(
    d_x_next_ptr, d_x_in_ptr, d_sums_ptr, x_ptr, y_ptr, H_post_ptr, H_res_ptr, phi_ptr, H_pre_ptr,
    d_x_ptr, d_y_ptr, d_maps_ptr,
    T, C, TILES,
    n: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SINGLE_PASS: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Back through streams_kernel, and read_kernel too, for BT tokens and TILES tiles of their channels."""
    UNROLL: tl.constexpr = n if n < 8 else 1  # as in streams_kernel
    dtype = x_ptr.dtype.element_ty
    start, row, live = tokens(T, BT)
    s = tl.arange(0, n)
    x_ptr += start * n * C
    d_x_ptr += start * n * C
    if y_ptr is not None:
        y_ptr += start * C
        d_y_ptr += start * C
        H_post = load_gate(H_post_ptr + start * n, row, live, n)
        H_res = tl.load(H_res_ptr + start * n * n + H_res_offsets(row, n), live[None, :, None], 0.0)
        d_H_post = tl.zeros((BT, n), tl.float32)
        d_H_res = tl.zeros((n, BT, n), tl.float32)  # as H_res: j, token, i
    if d_x_next_ptr is not None:
        d_x_next_ptr += start * n * C
    if d_x_in_ptr is not None:
        d_x_in_ptr += start * C
        H_pre = load_gate(H_pre_ptr + start * n, row, live, n)
    if SINGLE_PASS:
        d_H_pre = tl.zeros((BT, n), tl.float32)
    if d_sums_ptr is not None:
        d_sums_ptr += start * (M + 1)
        m = tl.arange(0, MP)
        at_m = row[None, :] * (M + 1) + m[:, None]
        d_proj_T = tl.load(d_sums_ptr + at_m, live[None, :] & (m < M)[:, None], 0.0)  # (MP, BT)
        two_d_square = 2 * tl.load(d_sums_ptr + row * (M + 1) + M, live, 0.0)  # times x_next

    first = tl.program_id(1) * TILES * BC
    for c0 in tl.range(first, first + TILES * BC, BC, num_stages=STAGES):
        c = c0 + tl.arange(0, BC)
        tile = live[:, None] & (c < C)[None, :]
        if y_ptr is not None:
            x = tl.load(x_ptr + stream_offsets(row, c, C, n), tile[None, :, :], 0.0).to(tl.float32)
            y = tl.load(y_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
            d_x = tl.zeros((n, BT, BC), tl.float32)
            d_y = tl.zeros((BT, BC), tl.float32)
        if d_x_in_ptr is not None:
            d_x_in = tl.load(d_x_in_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
        for i in tl.range(0, n, loop_unroll_factor=UNROLL):
            at = row[:, None] * (n * C) + i * C + c[None, :]
            # d: gradient of x_next[i]. Its readers here were proj = v @ phi (Eq 14), the square (Eq 15), and
            # x_in = sum_i H_pre[i] x_next[i]. d_x_next is loaded after the product: before it, the compiler gives the
            # load the product's layout, and spills hundreds of bytes.
            d = tl.zeros((BT, BC), tl.float32)
            if d_sums_ptr is not None:
                at_phi = (i * C + c)[:, None] * M + m[None, :]
                phi = tl.load(phi_ptr + at_phi, (c < C)[:, None] & (m < M)[None, :], 0.0)  # (BC, MP)
            if d_sums_ptr is not None or SINGLE_PASS:
                if y_ptr is not None:
                    x_next = mix(x, y, pick(H_post, i), pick(H_res, i)).to(dtype).to(tl.float32)
                else:
                    x_next = tl.load(x_ptr + at, tile, 0.0).to(tl.float32)
            if d_sums_ptr is not None:
                # T > 0 always holds, but the compiler does not know. A branch keeps the product's layout to itself:
                # without, the tiles around are held in that layout too, and spill. With 8 streams it is the reverse.
                if n == 8 or T > 0:
                    d = tl.trans(tl.dot(phi, d_proj_T, input_precision=PRECISION))
                d += two_d_square[:, None] * x_next
            if d_x_in_ptr is not None:
                d += pick(H_pre, i)[:, None] * d_x_in
            if SINGLE_PASS:
                d_H_pre += tl.where(s == i, tl.sum(d_x_in * x_next, 1)[:, None], 0.0)
            if d_x_next_ptr is not None:
                # The last reader is the next boundary. Rounded before this sum and after it, as where recomputation
                # cuts the depth here: cut or not, the bits are the same.
                d = d.to(dtype).to(tl.float32) + tl.load(d_x_next_ptr + at, tile, 0.0).to(tl.float32)
            if y_ptr is not None:
                d = d.to(dtype).to(tl.float32)
                # x_next[i] = sum_j H_res[i, j] x[j] + H_post[i] y
                d_y += pick(H_post, i)[:, None] * d
                d_x += pick(H_res, i)[:, :, None] * d[None, :, :]
                d_H_post += tl.where(s == i, tl.sum(d * y, 1)[:, None], 0.0)
                d_H_res += tl.where(s == i, tl.sum(d[None, :, :] * x, 2)[:, :, None], 0.0)
            else:
                tl.store(d_x_ptr + at, d, tile)
        if y_ptr is not None:
            tl.store(d_x_ptr + stream_offsets(row, c, C, n), d_x, tile[None, :, :])
            tl.store(d_y_ptr + row[:, None] * C + c[None, :], d_y, tile)
    # d_H_post, d_H_res and d_H_pre of all tokens, one after the other: this program's share
    if y_ptr is not None:
        d_maps_ptr += tl.program_id(1).to(tl.int64) * T * (n * n + (2 * n if SINGLE_PASS else n))
        tl.store(d_maps_ptr + start * n + row[:, None] * n + s[None, :], d_H_post, live[:, None])
        d_maps_ptr += T.to(tl.int64) * n
        tl.store(d_maps_ptr + start * n * n + H_res_offsets(row, n), d_H_res, live[None, :, None])
        d_maps_ptr += T.to(tl.int64) * n * n
    else:
        d_maps_ptr += tl.program_id(1).to(tl.int64) * T * n
    if SINGLE_PASS:
        tl.store(d_maps_ptr + start * n + row[:, None] * n + s[None, :], d_H_pre, live[:, None])


@jit
def phi_backward_kernel(
    x_next_ptr, d_sums_ptr, d_phi_ptr, T, K, STEPS,
    M: tl.constexpr, MP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """d_phi = vec(x_next)^T d_proj for BK of its K = nC rows, over STEPS * BT tokens: one share of the sum."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    m = tl.arange(0, MP)
    row = tl.arange(0, BT)
    d_phi = tl.zeros((BK, MP), tl.float32)
    for step in range(STEPS):
        start = (tl.program_id(1) * STEPS + step).to(tl.int64) * BT
        live = start + row < T
        x_next = tl.load(x_next_ptr + start * K + row[:, None] * K + k[None, :], live[:, None] & (k < K)[None, :], 0.0)
        at_m = start * (M + 1) + row[:, None] * (M + 1) + m[None, :]
        d_proj = tl.load(d_sums_ptr + at_m, live[:, None] & (m < M)[None, :], 0.0)
        d_phi = dot(tl.trans(x_next), d_proj, d_phi, PRECISION)
    share = d_phi_ptr + tl.program_id(1).to(tl.int64) * K * M
    tl.store(share + k[:, None] * M + m[None, :], d_phi, (k < K)[:, None] & (m < M)[None, :])


# ----------------------------------------------------------------------------------------------------------------------
# What one program takes.

# Tokens, channels, warps and pipeline stages of one program, by maker and kernel, for bf16 x; the table after it
# replaces rows. Chosen by compiling, not by timing: the largest tiles that spill nothing. phi costs 192/BT units a
# pass, so BT is as large as registers allow; 64 bytes a row (BC = 32) are two full sectors. On NVIDIA
# `streams_backward` moves 64 bits a thread, so that its loads can be pipelined without a spill: with 128 they cannot
# ((32, 32, 4, 1), which is not pipelined, spills nothing either: for a GPU to decide). AMD's warps are twice as wide (8
# channels a thread, one 128-bit access, take tiles twice as large) and share 64 KB a workgroup, hence fewer stages.
# Widths smaller than a tile shrink it (blocks).
BLOCKS = {
    "streams": {"nvidia": (64, 32, 8, 3), "amd": (64, 32, 4, 2)},
    "maps": {"nvidia": (16, 1, 1, 1), "amd": (64, 1, 4, 1)},
    "read": {"nvidia": (16, 128, 4, 1), "amd": (16, 128, 4, 1)},
    "read_backward": {"nvidia": (16, 64, 4, 1), "amd": (16, 128, 4, 1)},
    "maps_backward": {"nvidia": (16, 1, 1, 1), "amd": (16, 1, 4, 1)},
    "streams_backward": {"nvidia": (32, 32, 8, 3), "amd": (32, 64, 4, 1)},
    "phi_backward": {"nvidia": (32, 256, 8, 3), "amd": (32, 256, 8, 2)},
}
# Rows instead, by maker, dtype of x and whether it has 8 streams. Products in tf32x3 hold two parts of each operand,
# and 80 columns of phi are padded to 128: smaller tiles.
BLOCKS_INSTEAD = {
    ("nvidia", torch.float16, False): {"streams": (64, 16, 4, 1), "streams_backward": (16, 64, 8, 1)},
    ("nvidia", torch.float32, False): {"streams": (64, 16, 8, 2), "streams_backward": (16, 64, 8, 1)},
    ("amd", torch.float32, False): {"streams_backward": (16, 64, 4, 1)},
    ("nvidia", torch.bfloat16, True): {
        "streams": (64, 16, 4, 2), "streams_backward": (32, 32, 8, 1), "phi_backward": (32, 64, 8, 2),
        "maps_backward": (16, 1, 4, 1),
    },
    ("nvidia", torch.float16, True): {
        "streams": (32, 32, 8, 1), "streams_backward": (16, 16, 8, 1), "phi_backward": (32, 64, 8, 2),
    },
    ("nvidia", torch.float32, True): {
        "streams": (64, 16, 8, 2), "streams_backward": (16, 16, 8, 1), "phi_backward": (32, 64, 8, 2),
    },
    ("amd", torch.bfloat16, True): {"streams_backward": (16, 64, 4, 2), "phi_backward": (32, 128, 8, 2)},
    ("amd", torch.float16, True): {"streams_backward": (16, 64, 4, 2), "phi_backward": (32, 128, 8, 2)},
    ("amd", torch.float32, True): {"streams_backward": (16, 64, 4, 2), "phi_backward": (32, 128, 8, 2)},
}  # fmt: skip
PROGRAMS = 264  # where tokens alone give fewer, programs share the channels too: twice an H100's processors
TOKEN_SHARES = 8  # at most so many programs split the tokens in `phi_backward`, 256 or more each
DOTS = "auto"  # or 'ieee': products in plain fp32, without tensor cores on NVIDIA
MAKER = "amd" if torch.version.hip else "nvidia"


def cdiv(a, b):  # Triton's own cost the host 10 us each
    return -(-a // b)


def power_of_2(a):
    return 1 << (a - 1).bit_length()


def blocks(kernel, n, C, dtype=torch.bfloat16):
    """Tokens, channels, and the launch options of one program."""
    instead = BLOCKS_INSTEAD.get((MAKER, dtype, n == 8), {})
    BT, BC, warps, stages = instead.get(kernel) or BLOCKS[kernel][MAKER]
    return BT, max(16, min(BC, power_of_2(C))), {"num_warps": warps, "num_stages": stages}


def channel_tiles(T, BT, C, BC):
    """How many of the ceil(C / BC) channel tiles a program walks over -> tiles, and programs that share them."""
    rows, tiles = max(1, cdiv(T, BT)), cdiv(C, BC)
    each = cdiv(tiles, min(tiles, cdiv(PROGRAMS, rows)))
    return each, cdiv(tiles, each)


def precision(x, to_bf16=False):
    """How a product with fp32 phi or d_proj is multiplied; to_bf16: the result ends in a bf16 gradient."""
    if DOTS not in ("auto", "ieee"):
        raise ValueError(f"sinkhorn_kernel.DOTS={DOTS!r}: wanted 'auto' or 'ieee'")
    if DOTS == "ieee" or (MAKER == "amd" and x.dtype != torch.bfloat16):
        return "ieee"
    if x.dtype != torch.bfloat16:
        return "tf32x3"
    return "tf32" if to_bf16 else "3xbf16"
