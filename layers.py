"""The sublayers of a DeepSeek-V3-family GPT, and the loss at its head: MLA, SwiGLU, DeepSeekMoE. Nothing of mHC.

A sublayer takes x (B, T, C), or (N, C), and gives the same shape; it knows of one stream. model.py puts them together.
MLA and DeepSeekMoE are DeepSeek-V3, arXiv 2412.19437, whose published parameter names are kept. Letters as in model.py.
"""

import importlib.util
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from mhc_ref import map_dtype

LOGITS_AT_ONCE = 2**26  # 256 MB in fp32


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x):
        wide = map_dtype(x)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


def rope_angles(positions, dim, theta):
    """positions (..., T) -> cos, sin (..., T, dim/2), in fp32 (fp64 where positions are fp64)."""
    positions = positions.to(map_dtype(positions))
    freqs = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=positions.dtype) / dim)
    angles = positions.unsqueeze(-1) * freqs
    return angles.cos(), angles.sin()


def apply_rope(x, rope):
    """Turn each pair (x[2i], x[2i+1]) by its angle. x (B, T, ..., R) with cos and sin (B or 1, T, R/2)."""
    cos, sin = (t.view(*t.shape[:2], *[1] * (x.ndim - 3), t.shape[-1]) for t in rope)
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def causal_attention(q, k, v, scale):
    """q, k (B, H, T, D+R), v (B, H, T, V) -> (B, H, T, V). A CPU has a fused kernel for values as wide as keys alone:
    zeros behind them cost less than all scores (B, H, T, T) written out, in time and in what the backward keeps."""
    V, width = v.shape[-1], q.shape[-1]
    if v.device.type == "cpu" and V < width:
        v = F.pad(v, (0, width - V))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :V]


class LatentCache:
    """What generation keeps: per block and position MLA's normed latent (Z) and its one rotated key (R), no heads.

    `length` (B,) counts the positions already written in each row. Rows may differ: pad prompts on the right, run them,
    then set `length` to the true lengths; what the padding wrote is overwritten before anything attends to it.
    `most` is the host's own count, no less than the longest row's: to ask `length` would wait for the device each time.
    """

    def __init__(self, config, batch, max_len, device=None, dtype=None):
        size = (config.n_layer, batch, max_len)
        self.latent = torch.zeros(*size, config.kv_lora_rank, device=device, dtype=dtype)
        self.k_rope = torch.zeros(*size, config.qk_rope_head_dim, device=device, dtype=dtype)
        self.length = torch.zeros(batch, dtype=torch.long, device=device)
        self.most = 0
        self.reach = None  # positions that attention looks at, if more than are there: equal shapes for a CUDA graph

    def rows(self, index, max_len=None):
        """A copy that holds the rows `index` (a row may come several times), with room for max_len positions."""
        other = object.__new__(LatentCache)
        grow = max(0, (max_len or 0) - self.latent.shape[2])
        other.latent, other.k_rope = (F.pad(t[:, index], (0, 0, 0, grow)) for t in (self.latent, self.k_rope))
        other.length, other.most, other.reach = self.length[index].clone(), self.most, None
        return other

    def advance(self, T):
        """Count T more positions in every row: called once per forward, after all blocks have written."""
        self.length += T
        self.most += T

    def write(self, layer, latent, k_rope):
        """Put latent (B, T, Z) and k_rope (B, T, R) behind what each row of `layer` holds; return both so far."""
        T, end = latent.shape[1], self.most + latent.shape[1]
        where = self.length.unsqueeze(1) + torch.arange(T, device=latent.device)  # (B, T)
        if end > self.latent.shape[2]:
            raise ValueError(f"the cache has room for {self.latent.shape[2]} positions, wanted {end}")
        for kept, new in ((self.latent, latent), (self.k_rope, k_rope)):
            kept[layer].scatter_(1, where.unsqueeze(-1).expand_as(new), new.to(kept.dtype))
        end = end if self.reach is None else self.reach
        return self.latent[layer, :, :end], self.k_rope[layer, :, :end]


class MLA(nn.Module):
    """Multi-head latent attention: keys and values are read from one latent of width Z per token (DeepSeek-V2, 2.1).

    A head's query and key have D dims without position and R with RoPE; the R dims of the key are shared by all heads.
    """

    def __init__(self, config):
        super().__init__()
        c = config
        self.H, self.D, self.R, self.V = c.n_head, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.Z, self.scale = c.kv_lora_rank, (self.D + self.R) ** -0.5
        linear = partial(nn.Linear, bias=False)
        self.q_lora_rank = c.q_lora_rank
        if c.q_lora_rank:
            self.q_a_proj = linear(c.n_embd, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.norm_eps)
            self.q_b_proj = linear(c.q_lora_rank, self.H * (self.D + self.R))
        else:
            self.q_proj = linear(c.n_embd, self.H * (self.D + self.R))
        self.kv_a_proj_with_mqa = linear(c.n_embd, self.Z + self.R)
        self.kv_a_layernorm = RMSNorm(self.Z, c.norm_eps)
        self.kv_b_proj = linear(self.Z, self.H * (self.D + self.V))
        self.o_proj = linear(self.H * self.V, c.n_embd)

    def forward(self, x, rope, cache=None, layer=None):
        """x (B, T, C) -> (B, T, C), causal. With a cache, x continues the sequences that `cache` holds for `layer`."""
        B, T, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_lora_rank else self.q_proj(x)
        q_nope, q_rope = q.view(B, T, self.H, self.D + self.R).split((self.D, self.R), -1)
        q_rope = apply_rope(q_rope, rope)  # (B, T, H, R)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.Z, self.R), -1)
        latent, k_rope = self.kv_a_layernorm(latent), apply_rope(k_rope, rope)  # (B, T, Z), (B, T, R)
        so_far = cache and cache.write(layer, latent, k_rope)
        if cache is None or not cache.most:  # nothing before x: decompressing is cheaper for a whole prompt
            y = self.attend(q_nope, q_rope, latent, k_rope)
        else:
            y = self.attend_absorbed(q_nope, q_rope, *so_far, cache.length)
        return self.o_proj(y.flatten(2))  # (B, T, H, V) -> (B, T, C)

    def attend(self, q_nope, q_rope, latent, k_rope):
        """Attention with keys and values decompressed from the latent: what training runs. -> (B, T, H, V)"""
        B, T, H, _ = q_nope.shape
        k_nope, v = self.kv_b_proj(latent).view(B, T, H, self.D + self.V).split((self.D, self.V), -1)
        k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(B, T, H, self.R)), -1)
        q = torch.cat((q_nope, q_rope), -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, .)
        return causal_attention(q, k, v, self.scale).transpose(1, 2)

    def attend_absorbed(self, q_nope, q_rope, latent, k_rope, start):
        """The same attention without ever decompressing (DeepSeek-V2, 2.1.3): kv_b_proj is absorbed into the query on
        one side and into the output on the other, and all heads attend to the latent itself. -> (B, T, H, V)

        latent (B, S, Z), k_rope (B, S, R): everything so far; start (B,): the position of each row's first query.
        """
        T, S = q_nope.shape[1], latent.shape[1]
        w = self.kv_b_proj.weight.to(q_nope.dtype).view(self.H, self.D + self.V, self.Z)
        w_k, w_v = w.split((self.D, self.V), 1)  # (H, D, Z), (H, V, Z)
        q_latent = torch.einsum("bthd,hdz->bthz", q_nope, w_k)
        scores = torch.einsum("bthz,bsz->bhts", q_latent, latent) + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
        query = start.unsqueeze(1) + torch.arange(T, device=latent.device)  # (B, T)
        unseen = torch.arange(S, device=latent.device) > query.unsqueeze(-1)  # (B, T, S)
        scores = (scores * self.scale).masked_fill(unseen.unsqueeze(1), -torch.inf)
        probs = scores.softmax(-1, dtype=map_dtype(scores)).to(latent.dtype)
        return torch.einsum("bthz,hvz->bthv", torch.einsum("bhts,bsz->bthz", probs, latent), w_v)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Sigmoid scores; a bias that only selects and is moved by load, not by a gradient (DeepSeek-V3, 2.1.2)."""

    def __init__(self, config):
        super().__init__()
        self.k, self.route_scale = config.num_experts_per_tok, config.route_scale
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.n_embd))
        self.register_buffer("e_score_correction_bias", torch.zeros(E))
        # tokens each expert was given since the bias was last moved; MoE counts them, in training forwards only
        self.register_buffer("load", torch.zeros(E, dtype=torch.long), persistent=False)

    def forward(self, x):
        """x (N, C) -> weights (N, k), which sum to route_scale, and expert numbers (N, k)."""
        with torch.autocast(x.device.type, enabled=False):  # which expert is picked must not depend on bf16 rounding
            wide = map_dtype(x)
            scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()  # (N, E)
        experts = (scores.detach() + self.e_score_correction_bias).topk(self.k, -1).indices
        weights = scores.gather(-1, experts)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.route_scale, experts  # never 0/0


def grouped_mm_takes(x, *weights):
    """Whether torch's grouped_mm does: bf16 everywhere, fp32 on a CPU outside torch.compile, rows of whole 16 bytes."""
    aligned = all(d * x.element_size() % 16 == 0 for w in weights for d in w.shape[1:])
    cpu_fp32 = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return aligned and (x.dtype == torch.bfloat16 or cpu_fp32)


class Dispatch(torch.autograd.Function):
    """x (N, C) -> (N*k, C): each token once for each of its k experts, slot order[i] in row i.

    As index_select, but for the backward: that would add with atomics on a GPU, in any order, and in bf16. This one
    gathers: slots[i] = i's place in `order`, so the k copies of a token come together and are summed in fp32.
    """

    @staticmethod
    def forward(ctx, x, order, slots, k):
        ctx.save_for_backward(slots)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (slots,) = ctx.saved_tensors
        return (
            g.index_select(0, slots).unflatten(0, (-1, ctx.k)).sum(1, dtype=map_dtype(g)).to(g.dtype),
            None,
            None,
            None,
        )


class Combine(torch.autograd.Function):
    """y (N*k, C) sorted by expert -> (N, k, C) by token, Dispatch undone; a gather in the backward too."""

    @staticmethod
    def forward(ctx, y, order, slots, k):
        ctx.save_for_backward(order)
        return y.index_select(0, slots).unflatten(0, (-1, k))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g.flatten(0, 1).index_select(0, ctx.saved_tensors[0]), None, None, None


def padded_rows(M, ends, multiple):
    """M rows by expert, ends (E,) -> where each goes (M,) among how many, and ends, if each expert has a multiple.

    How many is for the worst division, so that it is known without asking the device; rows behind the last end are of
    no expert."""
    sizes = ends.diff(prepend=ends.new_zeros(1))
    padded = (sizes + multiple - 1) // multiple * multiple
    new = padded.cumsum(0)
    expert = torch.searchsorted(ends, torch.arange(M, dtype=ends.dtype, device=ends.device), right=True)  # of each row
    shift = (new - padded) - (ends - sizes)
    most = (M + len(ends) * (multiple - 1) + multiple - 1) // multiple * multiple
    return torch.arange(M, device=ends.device) + shift[expert], most, new.to(torch.int32)


class BlockProduct(torch.autograd.Function):
    """x (P, R, K) times the transpose of each block's matrix, w[expert] with w (E, N, K) -> (P, R, N).

    The matrices are gathered, once for each block: memory is paid for not asking the device how many rows an expert
    has. w's gradient is a product too, since a gather's backward would add with atomics on a GPU, in any order.
    """

    @staticmethod
    def forward(ctx, x, w, expert):
        ctx.save_for_backward(x, w, expert)
        return x @ w[expert].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, expert = ctx.saved_tensors
        of = torch.arange(len(w), device=w.device).unsqueeze(1) == expert  # (E, P)
        d_w = of.to(g.dtype) @ (g.transpose(1, 2) @ x).flatten(1)  # (E, P) (P, N*K)
        return g @ w[expert], d_w.view_as(w), None


class Experts(nn.Module):
    """The routed experts' SwiGLUs, each weight stacked over experts: (E, out, in)."""

    def __init__(self, config):
        super().__init__()
        E, C, hidden = config.n_routed_experts, config.n_embd, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, hidden, C))
        self.up_proj = nn.Parameter(torch.empty(E, hidden, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, hidden))

    def in_one_dtype(self, x):
        """x, and the weights of the experts that are here, in the dtype of the products."""
        if torch.is_autocast_enabled(x.device.type):  # grouped_mm is not on autocast's list
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        return x, [(w.to_local() if isinstance(w, DTensor) else w).to(x.dtype) for w in weights]  # expert_parallel.py

    def forward(self, x, ends):
        """x (M, C), rows sorted by expert; ends (E,) int32: the row behind each expert's last -> (M, C)."""
        x, weights = self.in_one_dtype(x)
        if not grouped_mm_takes(x, *weights):
            return self.in_blocks(x, ends, *weights)
        gate_proj, up_proj, down_proj = (w.transpose(1, 2) for w in weights)
        hidden = F.silu(F.grouped_mm(x, gate_proj, offs=ends)) * F.grouped_mm(x, up_proj, offs=ends)
        return F.grouped_mm(hidden, down_proj, offs=ends)

    def in_blocks(self, x, ends, gate_proj, up_proj, down_proj, rows=64):
        """For what grouped_mm does not take: fp64, fp16, fp32 on a GPU, odd widths. Blocks of rows of one expert."""
        at, padded, ends = padded_rows(len(x), ends, rows)
        first = torch.arange(0, padded, rows, dtype=ends.dtype, device=ends.device)  # (P,): the first row of each block
        expert = torch.searchsorted(ends, first, right=True).clamp(max=len(ends) - 1)
        x = x.new_zeros(padded, x.shape[1]).index_copy(0, at, x).unflatten(0, (-1, rows))  # (P, rows, C)
        product = BlockProduct.apply
        hidden = F.silu(product(x, gate_proj, expert)) * product(x, up_proj, expert)
        return product(hidden, down_proj, expert).flatten(0, 1).index_select(0, at)


class MoE(nn.Module):
    """DeepSeekMoE: shared experts see every token, routed ones those that picked them. No token is ever dropped."""

    def __init__(self, config):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(config.n_embd, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)  # (N, C)
        weights, picked = self.gate(x)
        k = picked.shape[1]
        experts, order = picked.flatten().sort(stable=True)  # (N*k,): slots in the order of their experts
        # where each expert's rows end: bincount would do, but waits for the device and breaks torch.compile's graph
        ends = torch.searchsorted(experts, torch.arange(len(self.gate.weight), device=x.device), right=True)
        if self.training:
            self.gate.load += ends.diff(prepend=ends.new_zeros(1))
        slots = order.argsort()
        y = self.run_experts(Dispatch.apply(x, order, slots, k), ends.to(torch.int32))  # (N*k, C) sorted by expert
        y = Combine.apply(y, order, slots, k)  # (N, k, C): the same order of summation every time
        y = (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y.view(shape)

    def run_experts(self, x, ends):
        """expert_parallel.py puts another in its place, which sends the rows to other ranks' experts."""
        return self.experts(x, ends)


# -----------------------------------------------------------------------------------------------------------------
# The head and its loss: HeadLoss ('chunked'), or a library's fused function

HEAD_LOSSES = ("chunked", "torch", "liger")


def check_head_loss(name, device):
    """Raise ValueError where a library's function is missing, or does not run on 'cuda' | 'cpu' | 'mps'."""
    if name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ValueError(f"head_loss='torch': wanted torch 2.13, which has linear_cross_entropy in chunks; this is "
                         f"{torch.__version__}; head_loss='chunked' runs everywhere")  # fmt: skip
    if name == "liger" and not importlib.util.find_spec("liger_kernel"):
        raise ValueError("head_loss='liger': wanted the package liger-kernel, which is not installed: pip install "
                         "--no-deps liger-kernel==0.8.5; head_loss='chunked' runs without")  # fmt: skip
    if name == "liger" and device != "cuda":
        raise ValueError(f"head_loss='liger': its kernels are for GPUs and this is {device!r}; head_loss='chunked' and "
                         "'torch' run here")  # fmt: skip


def rows_at_once(vocab):
    """Of h, in one chunk of the head."""
    rows = max(1, LOGITS_AT_ONCE // vocab)
    return rows if rows < 256 else rows // 256 * 256  # whole tiles for the products


@contextmanager
def tf32(on):
    """fp32 products on a GPU's tensor cores as long as it lasts. They see 10 bits of an operand; bf16 has 7."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def library_loss(name, h, weight, targets):
    """HeadLoss by a library: h (N, C), W (V, C), targets (N,) -> the sum of the cross entropies in nats; -1 is ignored.

    Handed bf16, either library makes some of logits, loss and W's gradient in it (LOG.md). So both are handed fp32, and
    where h was bf16 a GPU multiplies in TF32: h loses nothing by it, W less than by a cast. Not run on a GPU.
    Both make the gradients with the loss. Liger waits for the device, to count the targets.
    """
    wide = map_dtype(h)
    operands = h.to(wide), weight.to(wide), targets
    with tf32(h.dtype != wide):
        if name == "torch":
            chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows_at_once(len(weight)))
            return F.linear_cross_entropy(*operands, reduction="sum", ignore_index=-1, options=chunks)
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        # bias, weights of classes, ignore_index, z-loss, smoothing, reduction, softcap, return z-loss, sums of d_W in
        return Liger.apply(*operands, None, None, -1, 0.0, 0.0, "sum", None, False, wide)[0]


def wide_mm(a, b):
    """a @ b in fp32 (fp64 for fp64), also where a and b are bf16: rounded nowhere after the products."""
    if a.dtype == map_dtype(a):
        return a @ b
    return torch.mm(a, b, out_dtype=map_dtype(a)) if a.is_cuda else a.to(map_dtype(a)) @ b.to(map_dtype(b))


def softmax_loss(logits, target, dtype):
    """logits (M, V), target (M, 1) -> the sum of their cross entropies, and its gradient by the logits in dtype.

    For torch.compile, which makes of it few passes over the logits. Uncompiled, what HeadLoss does in place is cheaper.
    """
    log_p = logits - logits.logsumexp(1, keepdim=True)
    picked = torch.arange(logits.shape[1], device=logits.device) == target  # (M, V); nothing in a row to be ignored
    d = (log_p.exp() - picked.to(log_p.dtype)) * (target != -1)
    return -torch.where(picked, log_p, 0.0).sum(), d.to(dtype)


class HeadLoss(torch.autograd.Function):
    """h (N, C), W (V, C), targets (N,) -> the sum of the cross entropies of the logits h W^T, in nats. -1 is ignored.

    No more than LOGITS_AT_ONCE logits exist at once. While a chunk of them is there, its share of both gradients is
    made too: nothing is computed twice, and the backward only scales. W's gradient is summed over chunks in fp32.
    fused: softmax_loss, compiled, or None. narrow: W in h's dtype, where it is there already.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, wants_gradients, fused=None, narrow=None):
        w = weight.to(h.dtype) if narrow is None else narrow
        total = torch.zeros((), dtype=map_dtype(h), device=h.device)
        d_h, d_w = (
            (torch.empty_like(h), torch.zeros_like(weight, dtype=map_dtype(h))) if wants_gradients else (None, None)
        )
        chunk = rows_at_once(len(w))
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            logits, target = wide_mm(h[rows], w.t()), targets[rows].unsqueeze(1)
            if fused and wants_gradients:
                loss, d = fused(logits, target, h.dtype)
                total += loss
            else:
                seen, target = target != -1, target.clamp(min=0)
                log_p = logits.sub_(logits.logsumexp(1, keepdim=True))
                total -= (log_p.gather(1, target) * seen).sum()
            if wants_gradients:
                if not fused:
                    d = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_p.dtype)).mul_(seen)
                    d = d.to(h.dtype)  # the gradient of the logits: p - one-hot
                d_h[rows] = wide_mm(d, w)
                d_w += wide_mm(d.t(), h[rows])
        ctx.save_for_backward(d_h, d_w)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        d_h, d_w = ctx.saved_tensors
        return (d_h * g).to(d_h.dtype), (d_w * g).to(ctx.dtype), None, None, None, None
