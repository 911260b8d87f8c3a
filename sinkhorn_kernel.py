"""mHC's residual connection on a GPU: everything between two sublayers as one operation, in Triton.

The kernels alone; mhc.py launches them, gives them gradients, and is what to import:

    x_next, x_in, H_post, H_res = mhc_step(x, y, H_post, H_res, phi, alpha, b)    # first sublayer: y = H_* = None
    x_next = mhc_post_res(x, y, H_post, H_res)                                    # after the last one

What is fused. Sublayer l reads n streams x through H_pre and writes its output y back through H_post and H_res (Eq 3).
The mappings of sublayer l+1 are functions of x_next alone, and x_next is made from x and y of sublayer l. So the unit
is not the sublayer but the *boundary*: close l, map and read for l+1, while x_next's tiles are in registers.

    x_next[i] = sum_j H_res[i, j] x[j] + H_post[i] y               Eq 3; rounded to x's dtype before anything reads it
    proj = vec(x_next) phi ;  r = |vec(x_next)| / sqrt(nC)          Eq 14, 15: one pass, the norm divided out after
    pre | post | res = alpha / r * proj + b                         Eq 16
    H_pre = sigmoid, H_post = 2 sigmoid, H_res = Sinkhorn-Knopp     Eq 17-19, Eq 9
    x_in = sum_i H_pre[i] x_next[i]                                 what sublayer l+1 reads

Layout. x (T, n, C) with C contiguous, T all leading dimensions as one. A program owns BT tokens and walks over tiles of
BC channels; of x a tile is (n, BT, BC), streams first, so that a thread holds all streams of an entry (up to 4 of them)
and mixes them without exchange. phi (nC, n^2+2n) is fp32 with columns pre | post | res; logit (i, j) of H_res is column
2n + n*i + j. Mappings and sums are fp32 whatever x is.

Bytes. The unit is C elements of x a token; n = 4. The arithmetic is nothing, these are the cost.
    forward    pass 1:  reads x, y and writes x_next                     4 + 1 + 4
               pass 2:  reads x, y and writes x_in                       4 + 1 + 1                15
    backward   maps:    reads x_next and d_x_in, for d_H_pre             4 + 1
               streams: reads d_x_next, d_x_in, x, y; writes d_x, d_y    4 + 1 + 4 + 1 + 4 + 1
               phi:     reads x_next, for d_phi                          4                        24
The paper's three forward kernels move 18, unfused ones 34 (its Table 2: 5n+1 read and 3n+1 written).
phi comes on top: 24 fp32 columns are 192/BT units a program and pass (3 at BT = 64), most of it from L2. Counted, not
estimated, by `python tools/bench.py traffic`. What would go lower: pass 2 needs all of x_next before its first channel,
and 64 tokens of it (1.3 MB) fit no register file or shared memory, so 10 units is only for a cache that holds every
program's tile; folding d_phi into `streams` would save 4 but holds one more accumulator than the register file has.

No barrier. Pass 2 recomputes x_next from x and y (5 units) instead of reading back what pass 1 wrote (4). The read-back
would be within one program, but between threads unless the layouts agree, so it needs a barrier, and on AMD a wait
for stores before it, that no test here can see fail. One unit buys not having to argue. Across kernels the launch order
is the barrier.

Backward. Saved: x, y, H_post, H_res, proj, r, and x_next, which is the next boundary's x: the same tensor, saved twice,
stored once. Nothing of Sinkhorn: all iterations are replayed on chip (a gradient from the final matrix alone is wrong
by more than 100 % at logits of standard deviation 6). Sums over programs (d_alpha, d_b, d_phi, d_H_post, d_H_res) are
written as shares and added in a fixed order: no atomics, the same bits in every run.

Precision. phi is multiplied as three bf16 terms when x is bf16 (24 bits, products exact in fp32) and as tf32x3 if not,
both on tensor cores; the gradient through phi to a bf16 x is tf32. DOTS = 'ieee' asks for plain fp32 everywhere.

What it trades. Compile-time switches (HAS_Y, HAS_NEXT) instead of three operations; registers (one program to an SM)
for bytes. The forward has one program a 64 tokens, so 4096 tokens fill half of an H100's 132 processors and 8192 all;
smaller programs would read phi more often. What compilers make of it is guarded by tests/test_kernel_compile.py; where
the order of lines matters to them, a comment says so.
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
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["T"])


# ----------------------------------------------------------------------------------------------------------------------
# Pieces. A tile is (BT, BC), tokens by channels of one stream, or (n, BT, BC), all streams.


@jit
def logsumexp(a, axis: tl.constexpr):
    top = tl.max(a, axis)
    return top + tl.log(tl.sum(tl.exp(a - tl.expand_dims(top, axis)), axis))


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


# ----------------------------------------------------------------------------------------------------------------------
# Forward.


@jit
def mhc_step_kernel(
    x_ptr, y_ptr, H_post_ptr, H_res_ptr, phi_ptr, alpha_ptr, b_ptr,
    x_next_ptr, x_in_ptr, H_post_next_ptr, H_res_next_ptr, proj_ptr, r_ptr,
    T, C, eps,
    n: tl.constexpr, ITERS: tl.constexpr, HAS_Y: tl.constexpr, HAS_NEXT: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One boundary for BT tokens: all channels twice."""
    M: tl.constexpr = n * n + 2 * n  # columns of phi
    MR: tl.constexpr = n * n if n * n > 16 else 16  # width of the two products: at least 16, for the tensor cores
    UNROLL: tl.constexpr = n if n < 8 else 1  # unrolled, 8 streams hoist their loads and spill kilobytes
    dtype = x_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BT  # 64 bits here, so that 32 do for offsets inside the program
    row = tl.arange(0, BT)
    live = start + row < T
    x_ptr += start * n * C
    x_next_ptr += start * n * C
    if HAS_Y:
        y_ptr += start * C
        H_post = load_gate(H_post_ptr + start * n, row, live, n)
        H_res = tl.load(H_res_ptr + start * n * n + H_res_offsets(row, n), live[None, :, None], 0.0)

    square = tl.zeros((BT,), tl.float32)
    gates = tl.zeros((BT, 16), tl.float32)  # columns pre | post of proj, then zeros
    res = tl.zeros((BT, MR), tl.float32)  # columns res, then zeros
    g = tl.arange(0, 16)[None, :]
    m = tl.arange(0, MR)[None, :]
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        tile = live[:, None] & (c < C)[None, :]
        if HAS_Y:
            x = tl.load(x_ptr + stream_offsets(row, c, C, n), tile[None, :, :], 0.0).to(tl.float32)
            y = tl.load(y_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
        for i in tl.range(0, n, loop_unroll_factor=UNROLL):
            at = row[:, None] * (n * C) + i * C + c[None, :]
            # x_next = x if y is None else mhc_post_res_ref(x, y, H_post, H_res), rounded before anything reads it
            if HAS_Y:
                x_next = mix(x, y, pick(H_post, i), pick(H_res, i)).to(dtype)
                tl.store(x_next_ptr + at, x_next, tile)
            else:
                x_next = tl.load(x_ptr + at, tile, 0.0)
            if HAS_NEXT:
                # proj = v @ phi.to(v.dtype)  # Eq 14
                phi_i = phi_ptr + (i * C + c)[:, None] * M
                phi_gates = tl.load(phi_i + g, (c < C)[:, None] & (g < 2 * n), 0.0)
                phi_res = tl.load(phi_i + 2 * n + m, (c < C)[:, None] & (m < n * n), 0.0)
                gates = dot(x_next, phi_gates, gates, PRECISION)
                res = dot(x_next, phi_res, res, PRECISION)
                square += tl.sum(x_next.to(tl.float32) * x_next.to(tl.float32), 1)

    if HAS_NEXT:
        # r = (v.square().mean(-1, keepdim=True) + eps).sqrt()  # Eq 15
        r = tl.sqrt(square / (n * C) + eps)
        tl.store(r_ptr + start + row, r, live)
        proj_ptr += start * M
        tl.store(proj_ptr + row[:, None] * M + g, gates, live[:, None] & (g < 2 * n))
        tl.store(proj_ptr + row[:, None] * M + 2 * n + m, res, live[:, None] & (m < n * n))
        # pre, post, res = logits.split([n, n, n * n], -1)
        at_n, at_nn, s, ij = map_offsets(row, n)
        pre, post = tl.split(tl.permute(tl.sum(tl.reshape(gates, (BT, 16 // (2 * n), 2, n)), 1), (0, 2, 1)))
        res = tl.sum(tl.reshape(res, (BT, MR // (n * n), n, n)), 1)
        # logits = scale / r * proj + b.to(v.dtype)  # Eq 16: dividing after the matmul is the RMSNorm
        pre = tl.load(alpha_ptr) / r[:, None] * pre + tl.load(b_ptr + s)[None, :]
        post = tl.load(alpha_ptr + 1) / r[:, None] * post + tl.load(b_ptr + n + s)[None, :]
        res = tl.load(alpha_ptr + 2) / r[:, None, None] * res + tl.load(b_ptr + 2 * n + ij)[None, :, :]
        # return pre.sigmoid(), 2 * post.sigmoid(), H_res  # Eq 17, 18, 19
        H_pre = tl.sigmoid(pre)
        tl.store(H_post_next_ptr + start * n + at_n, 2 * tl.sigmoid(post), live[:, None])
        tl.store(H_res_next_ptr + start * n * n + at_nn, sinkhorn_forward(res, ITERS), live[:, None, None])

        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            tile = live[:, None] & (c < C)[None, :]
            x = tl.load(x_ptr + stream_offsets(row, c, C, n), tile[None, :, :], 0.0).to(tl.float32)
            # x_in = (H_pre.unsqueeze(-1) * x_next).sum(-2).to(x.dtype), x_next again from x and y
            if HAS_Y:
                y = tl.load(y_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
                x_in = tl.zeros((BT, BC), tl.float32)
                for i in tl.range(0, n, loop_unroll_factor=UNROLL):
                    x_next = mix(x, y, pick(H_post, i), pick(H_res, i)).to(dtype)
                    x_in += pick(H_pre, i)[:, None] * x_next.to(tl.float32)
            else:
                x_in = tl.sum(tl.trans(H_pre)[:, :, None] * x, 0)
            tl.store(x_in_ptr + start * C + row[:, None] * C + c[None, :], x_in, tile)


# ----------------------------------------------------------------------------------------------------------------------
# Backward, in three kernels: the mappings, the streams, phi.


@jit
def maps_backward_kernel(
    x_next_ptr, d_x_in_ptr, d_H_post_ptr, d_H_res_ptr, proj_ptr, r_ptr, alpha_ptr, b_ptr,
    H_pre_ptr, d_proj_ptr, d_square_ptr, d_alpha_b_ptr,
    T, C,
    n: tl.constexpr, ITERS: tl.constexpr, HISTORY: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Back through the mappings for BT tokens: to proj and r, and to this program's share of alpha and b."""
    M: tl.constexpr = n * n + 2 * n
    start = tl.program_id(0).to(tl.int64) * BT
    row = tl.arange(0, BT)
    live = start + row < T
    at_n, at_nn, i, ij = map_offsets(row, n)
    live_n, live_nn = live[:, None], live[:, None, None]

    # d_H_pre[i] = sum_c d_x_in[c] x_next[i, c]
    x_next_ptr += start * n * C
    d_x_in_ptr += start * C
    d_H_pre = tl.zeros((BT, n), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        tile = live[:, None] & (c < C)[None, :]
        d_x_in = tl.load(d_x_in_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
        streams = row[:, None, None] * (n * C) + i[None, :, None] * C + c[None, None, :]
        x_next = tl.load(x_next_ptr + streams, tile[:, None, :], 0.0).to(tl.float32)  # (BT, n, BC)
        d_H_pre += tl.sum(x_next * d_x_in[:, None, :], 2)

    # the logits again: scale / r * proj + b
    r = tl.load(r_ptr + start + row, live, 1.0)
    proj_ptr += start * M
    at_pre, at_post, at_res = row[:, None] * M + i[None, :], row[:, None] * M + n + i[None, :], 2 * n + ij[None, :, :]
    at_res += row[:, None, None] * M
    pre = tl.load(proj_ptr + at_pre, live_n, 0.0) / r[:, None]
    post = tl.load(proj_ptr + at_post, live_n, 0.0) / r[:, None]
    res = tl.load(proj_ptr + at_res, live_nn, 0.0) / r[:, None, None]
    alpha_pre, alpha_post, alpha_res = tl.load(alpha_ptr), tl.load(alpha_ptr + 1), tl.load(alpha_ptr + 2)
    H_pre = tl.sigmoid(alpha_pre * pre + tl.load(b_ptr + i)[None, :])
    half_H_post = tl.sigmoid(alpha_post * post + tl.load(b_ptr + n + i)[None, :])
    res_logits = alpha_res * res + tl.load(b_ptr + 2 * n + ij)[None, :, :]
    tl.store(H_pre_ptr + start * n + at_n, H_pre, live_n)

    # back through sigmoid, 2 sigmoid and Sinkhorn (Eq 17-19); dead rows come in as zero and stay zero
    d_H_post = tl.load(d_H_post_ptr + start * n + at_n, live_n, 0.0)
    d_H_res = tl.load(d_H_res_ptr + start * n * n + at_nn, live_nn, 0.0)
    d_pre = d_H_pre * H_pre * (1 - H_pre)
    d_post = 2 * d_H_post * half_H_post * (1 - half_H_post)
    d_res = sinkhorn_backward(res_logits, d_H_res, n, ITERS, BT, HISTORY)

    # back through Eq 16: to proj; to b and alpha, summed over this program's tokens; to r
    d_proj_ptr += start * M
    tl.store(d_proj_ptr + at_pre, alpha_pre / r[:, None] * d_pre, live_n)
    tl.store(d_proj_ptr + at_post, alpha_post / r[:, None] * d_post, live_n)
    tl.store(d_proj_ptr + at_res, alpha_res / r[:, None, None] * d_res, live_nn)
    d_b_ptr = d_alpha_b_ptr + tl.program_id(0) * 2 * M
    tl.store(d_b_ptr + i, tl.sum(d_pre, 0))
    tl.store(d_b_ptr + n + i, tl.sum(d_post, 0))
    tl.store(d_b_ptr + 2 * n + ij, tl.sum(d_res, 0))
    tl.store(d_b_ptr + M + i, tl.sum(d_pre * pre, 0))
    tl.store(d_b_ptr + M + n + i, tl.sum(d_post * post, 0))
    tl.store(d_b_ptr + M + 2 * n + ij, tl.sum(d_res * res, 0))
    # Eq 15: r falls with every logit's dynamic part, and d r = x_next . d x_next / (nC r)
    dynamic = alpha_pre * tl.sum(d_pre * pre, 1) + alpha_post * tl.sum(d_post * post, 1)
    dynamic += alpha_res * tl.sum(tl.sum(d_res * res, 2), 1)
    tl.store(d_square_ptr + start + row, -dynamic / (r * r * (n * C)), live)


@jit
def streams_backward_kernel(
    x_ptr, y_ptr, H_post_ptr, H_res_ptr, phi_ptr, d_x_next_ptr, d_x_in_ptr, H_pre_ptr, d_proj_ptr, d_square_ptr,
    d_x_ptr, d_y_ptr, d_H_post_ptr, d_H_res_ptr,
    T, C, TILES,
    n: tl.constexpr, MP: tl.constexpr, HAS_Y: tl.constexpr, HAS_NEXT: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Back through Eq 3 and the two reads of x_next, for BT tokens and TILES channel tiles."""
    M: tl.constexpr = n * n + 2 * n
    start = tl.program_id(0).to(tl.int64) * BT
    row = tl.arange(0, BT)
    live = start + row < T
    dtype = x_ptr.dtype.element_ty
    UNROLL: tl.constexpr = n if n < 8 else 1  # as in mhc_step_kernel
    s = tl.arange(0, n)
    x_ptr += start * n * C
    d_x_ptr += start * n * C
    if HAS_Y:
        y_ptr += start * C
        d_y_ptr += start * C
        d_x_next_ptr += start * n * C
        H_post = load_gate(H_post_ptr + start * n, row, live, n)
        H_res = tl.load(H_res_ptr + start * n * n + H_res_offsets(row, n), live[None, :, None], 0.0)
        d_H_post = tl.zeros((BT, n), tl.float32)
        d_H_res = tl.zeros((n, BT, n), tl.float32)  # as H_res: j, token, i
    if HAS_NEXT:
        d_x_in_ptr += start * C
        H_pre = load_gate(H_pre_ptr + start * n, row, live, n)
        d_square = tl.load(d_square_ptr + start + row, live, 0.0)
        m = tl.arange(0, MP)
        at_m = start * M + row[None, :] * M + m[:, None]
        d_proj_T = tl.load(d_proj_ptr + at_m, live[None, :] & (m < M)[:, None], 0.0)  # (MP, BT)

    first = tl.program_id(1) * TILES * BC
    for c0 in range(first, first + TILES * BC, BC):
        c = c0 + tl.arange(0, BC)
        tile = live[:, None] & (c < C)[None, :]
        if HAS_Y:
            x = tl.load(x_ptr + stream_offsets(row, c, C, n), tile[None, :, :], 0.0).to(tl.float32)
            y = tl.load(y_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
            d_x = tl.zeros((n, BT, BC), tl.float32)
            d_y = tl.zeros((BT, BC), tl.float32)
        if HAS_NEXT:
            d_x_in = tl.load(d_x_in_ptr + row[:, None] * C + c[None, :], tile, 0.0).to(tl.float32)
        for i in tl.range(0, n, loop_unroll_factor=UNROLL):
            at = row[:, None] * (n * C) + i * C + c[None, :]
            # d: gradient of x_next[i]. Its three readers here were proj = v @ phi (Eq 14), r = sqrt(mean(v^2) + eps)
            # (Eq 15) and x_in = sum_i H_pre[i] x_next[i]. d_x_next is loaded after the product: before it, the compiler
            # gives the load the product's layout, and spills hundreds of bytes.
            d = tl.zeros((BT, BC), tl.float32)
            if HAS_NEXT:
                at_phi = (i * C + c)[:, None] * M + m[None, :]
                phi = tl.load(phi_ptr + at_phi, (c < C)[:, None] & (m < M)[None, :], 0.0)  # (BC, MP)
                if HAS_Y:
                    x_next = mix(x, y, pick(H_post, i), pick(H_res, i)).to(dtype)
                else:
                    x_next = tl.load(x_ptr + at, tile, 0.0)
                d = tl.trans(tl.dot(phi, d_proj_T, input_precision=PRECISION))
                d += pick(H_pre, i)[:, None] * d_x_in + d_square[:, None] * x_next.to(tl.float32)
                d = d.to(dtype).to(tl.float32)
            if HAS_Y:
                # The fourth reader is the next boundary. Rounded before this sum and after it, as where recomputation
                # cuts the depth here and autograd adds the two: cut or not, the bits are the same.
                d += tl.load(d_x_next_ptr + at, tile, 0.0).to(tl.float32)
                d = d.to(dtype).to(tl.float32)
                # x_next[i] = sum_j H_res[i, j] x[j] + H_post[i] y
                d_y += pick(H_post, i)[:, None] * d
                d_x += pick(H_res, i)[:, :, None] * d[None, :, :]
                d_H_post += tl.where(s == i, tl.sum(d * y, 1)[:, None], 0.0)
                d_H_res += tl.where(s == i, tl.sum(d[None, :, :] * x, 2)[:, :, None], 0.0)
            else:
                tl.store(d_x_ptr + at, d, tile)
        if HAS_Y:
            tl.store(d_x_ptr + stream_offsets(row, c, C, n), d_x, tile[None, :, :])
            tl.store(d_y_ptr + row[:, None] * C + c[None, :], d_y, tile)
    if HAS_Y:
        share = tl.program_id(1).to(tl.int64) * T + start
        tl.store(d_H_post_ptr + share * n + row[:, None] * n + s[None, :], d_H_post, live[:, None])
        tl.store(d_H_res_ptr + share * n * n + H_res_offsets(row, n), d_H_res, live[None, :, None])


@jit
def phi_backward_kernel(
    x_next_ptr, d_proj_ptr, d_phi_ptr,
    T, K, STEPS,
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
        at_m = start * M + row[:, None] * M + m[None, :]
        d_proj = tl.load(d_proj_ptr + at_m, live[:, None] & (m < M)[None, :], 0.0)
        d_phi = dot(tl.trans(x_next), d_proj, d_phi, PRECISION)
    share = d_phi_ptr + tl.program_id(1).to(tl.int64) * K * M
    tl.store(share + k[:, None] * M + m[None, :], d_phi, (k < K)[:, None] & (m < M)[None, :])


@jit
def sinkhorn_kernel(logits_ptr, H_res_ptr, T, n: tl.constexpr, ITERS: tl.constexpr, BT: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BT
    row = tl.arange(0, BT)
    live = (start + row < T)[:, None, None]
    _, at_nn, _, _ = map_offsets(row, n)
    log_M = tl.load(logits_ptr + start * n * n + at_nn, live, 0.0).to(tl.float32)
    tl.store(H_res_ptr + start * n * n + at_nn, sinkhorn_forward(log_M, ITERS), live)


@jit
def sinkhorn_backward_kernel(
    logits_ptr, d_H_res_ptr, d_logits_ptr, T,
    n: tl.constexpr, ITERS: tl.constexpr, HISTORY: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BT
    row = tl.arange(0, BT)
    live = (start + row < T)[:, None, None]
    _, at_nn, _, _ = map_offsets(row, n)
    L = tl.load(logits_ptr + start * n * n + at_nn, live, 0.0).to(tl.float32)
    d_H_res = tl.load(d_H_res_ptr + start * n * n + at_nn, live, 0.0)
    tl.store(d_logits_ptr + start * n * n + at_nn, sinkhorn_backward(L, d_H_res, n, ITERS, BT, HISTORY), live)


# ----------------------------------------------------------------------------------------------------------------------
# What one program takes.

# Tokens, channels, warps and pipeline stages of one program, by maker and kernel, for bf16 x; the table after it
# replaces rows. Chosen by compiling, not by timing: the largest tiles that spill nothing. phi costs 192/BT units a
# pass, so BT is as large as registers allow; 64 bytes a row (BC = 32) are two full sectors. AMD's warps are twice as
# wide (8 channels a thread, one 128-bit access, take tiles twice as large) and share 64 KB a workgroup, hence fewer
# stages. `maps` has no product, so nothing to pipeline for. Widths smaller than a tile shrink it (blocks).
BLOCKS = {
    "nvidia": {
        "step": (64, 32, 8, 3),
        "maps": (16, 64, 4, 1),
        "streams": (32, 64, 8, 3),
        "phi": (32, 256, 8, 3),
        "sinkhorn": (64, 1, 4, 1),
        "sinkhorn_backward": (16, 1, 4, 1),
    },
    "amd": {
        "step": (64, 32, 4, 2),
        "maps": (16, 128, 4, 1),
        "streams": (32, 64, 4, 2),
        "phi": (32, 256, 8, 2),
        "sinkhorn": (64, 1, 4, 1),
        "sinkhorn_backward": (16, 1, 4, 1),
    },
}
# Rows instead, by maker, dtype of x and whether it has 8 streams. Products in tf32x3 hold two parts of each operand,
# and 80 columns of phi are padded to 128: smaller tiles. With 8 streams `streams` moves 64 bits at a time (one entry of
# fp16 or fp32 on NVIDIA, where `step` moves 64 bits of fp16); everything else moves 128.
BLOCKS_INSTEAD = {
    ("nvidia", torch.float16, False): {"step": (64, 16, 4, 1), "streams": (16, 64, 4, 3)},
    ("nvidia", torch.float32, False): {"step": (64, 16, 8, 2), "streams": (16, 64, 8, 3)},
    ("amd", torch.float32, False): {"streams": (16, 64, 4, 2)},
    ("nvidia", torch.bfloat16, True): {"step": (64, 16, 4, 2), "streams": (32, 32, 8, 1), "phi": (32, 64, 8, 2)},
    ("nvidia", torch.float16, True): {"step": (32, 32, 8, 1), "streams": (16, 16, 8, 1), "phi": (32, 64, 8, 2)},
    ("nvidia", torch.float32, True): {"step": (64, 16, 8, 2), "streams": (16, 16, 8, 1), "phi": (32, 64, 8, 2)},
    ("amd", torch.bfloat16, True): {"streams": (16, 64, 4, 2), "phi": (32, 128, 8, 2)},
    ("amd", torch.float16, True): {"streams": (16, 64, 4, 2), "phi": (32, 128, 8, 2)},
    ("amd", torch.float32, True): {"streams": (16, 64, 4, 2), "phi": (32, 128, 8, 2)},
}
CHANNEL_SHARES = 4  # programs that split the channels in `streams`; each writes its share of d_H_post and d_H_res
TOKEN_SHARES = 8  # at most so many programs split the tokens in `phi`, 256 or more each; each writes its share of d_phi
DOTS = "auto"  # or 'ieee': products in plain fp32, without tensor cores on NVIDIA
MAKER = "amd" if torch.version.hip else "nvidia"


def blocks(kernel, n, C, dtype=torch.bfloat16):
    """Tokens, channels, and the launch options of one program."""
    rows = BLOCKS[MAKER] | BLOCKS_INSTEAD.get((MAKER, dtype, n == 8), {})
    BT, BC, warps, stages = rows[kernel]
    return BT, max(16, min(BC, triton.next_power_of_2(C))), {"num_warps": warps, "num_stages": stages}


def precision(x, to_bf16=False):
    """How a product with fp32 phi or d_proj is multiplied; to_bf16: the result ends in a bf16 gradient."""
    if DOTS not in ("auto", "ieee"):
        raise ValueError(f"sinkhorn_kernel.DOTS={DOTS!r}: wanted 'auto' or 'ieee'")
    if DOTS == "ieee" or (MAKER == "amd" and x.dtype != torch.bfloat16):
        return "ieee"
    if x.dtype != torch.bfloat16:
        return "tf32x3"
    return "tf32" if to_bf16 else "3xbf16"


def _tokens(x):
    return x.numel() // (x.shape[-2] * x.shape[-1])
