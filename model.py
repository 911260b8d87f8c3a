"""A DeepSeek-V3-family GPT with one switch: residual = 'baseline' | 'hc' | 'mhc'. One file, to be read in one sitting.

The model is one loop over 2L sublayers (attention, FFN, attention, FFN, ...): `run_sublayers`. Between two sublayers
lies a residual connection; its kinds are the classes in RESIDUALS below, and all else is shared by them. What the
sublayers compute is in layers.py, what a boundary computes behind mhc.py.

Letters: B batch, T time, C width of one stream (n_embd), n streams, H heads, D = qk_nope_head_dim,
R = qk_rope_head_dim, V = v_head_dim, Z = kv_lora_rank, E routed experts, k of them per token, N = B*T tokens.
Equation numbers (Eq) are those of mHC, arXiv 2512.24880; HC is arXiv 2409.19606.
"""

import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import MLA, MLP, Experts, HeadLoss, MoE, RMSNorm, library_loss, rope_angles, softmax_loss
from manifolds import MANIFOLDS, check_manifold
from mhc import hc_coeffs, hc_step, hyper_step, mhc_coeffs, mhc_post_res, mhc_pre, mhc_step
from mhc_ref import map_dtype

MAPS = ("pre", "post", "res")  # in the order of phi, theta, alpha and b

# What a number of GPTConfig may be, both ends included. Upper ends are far above any model: they are for slips, which
# would otherwise build for hours, or overflow.
SIZE = (1, 2**20)
RANGES = {
    "vocab_size": (1, 2**31), "seq_len": (1, 2**24), "n_layer": (1, 1000), "n_routed_experts": (0, 2**14),
    **dict.fromkeys(("n_embd", "n_head", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), SIZE),
    **dict.fromkeys(("intermediate_size", "num_experts_per_tok", "moe_intermediate_size"), SIZE),
    **dict.fromkeys(("q_lora_rank", "first_k_dense_replace", "n_shared_experts"), (0, 2**20)),
    "rope_theta": (1, 1e12), "route_scale": (1e-6, 1e3), "n_streams": (1, 64), "sinkhorn_iters": (1, 1000),
    "alpha_init": (0, 100), "norm_eps": (0, 1), "init_std": (0, 100),
}  # fmt: skip
CHOICES = {"collapse": ("sum", "head"), "maps_init": ("home", "paper")}


@dataclass
class GPTConfig:
    """Everything that fixes the model. Raises ValueError, `name=value: wanted ...`, for a setting that cannot be."""

    vocab_size: int = 50304
    seq_len: int = 1024  # longest sequence trained on; RoPE itself has no limit
    n_layer: int = 12  # transformer blocks, two sublayers each
    n_embd: int = 768
    # MLA
    n_head: int = 12
    q_lora_rank: int = 0  # 0: queries straight from x
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    # FFN: leading dense blocks, then mixtures of experts
    first_k_dense_replace: int = 1
    intermediate_size: int = 2048  # of the dense FFN
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    n_shared_experts: int = 1
    moe_intermediate_size: int = 512  # of one expert
    route_scale: float = 2.5
    # residual connection
    residual: str = "mhc"
    n_streams: int = 4
    manifold: str = "sinkhorn"  # that mHC's H_res is on: see manifolds.py
    sinkhorn_iters: int = 20
    alpha_init: float = 0.01
    maps_init: str = "home"  # of mHC's b: 'home' | 'paper' (appendix A.6), see GPT.initial_value
    learned_maps: str = "pre,post,res"  # the others are fixed to H_pre = 1/n, H_post = 1, H_res = I (Table 1)
    single_pass: bool = False  # mHC: a sublayer is read through the H_pre made one boundary before
    collapse: str = "sum"  # or 'head': a learned sigmoid head over the streams. Single-pass: neither, the last H_pre
    impl: str = "auto"  # of mhc_step: see mhc.py
    # everywhere
    norm_eps: float = 1e-20
    init_std: float = 0.02

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:  # not <: NaN is refused too
                raise ValueError(f"{name}={getattr(self, name)}: wanted at least {low:g} and at most {high:g}")
        for name, known in (CHOICES | {"residual": RESIDUALS, "manifold": MANIFOLDS}).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: wanted one of {', '.join(map(repr, known))}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim}: RoPE turns pairs, wanted an even number")
        if self.has_moe and self.num_experts_per_tok == 1:
            raise ValueError(
                "num_experts_per_tok=1: wanted at least 2: the weights of a token's experts are made to sum to "
                "route_scale, and one alone would be constant, its gate without a gradient"
            )
        if self.has_moe and self.num_experts_per_tok > self.n_routed_experts:
            k, E = self.num_experts_per_tok, self.n_routed_experts
            hint = "fewer" if E else f"first_k_dense_replace={self.n_layer} for a model without experts"
            raise ValueError(f"num_experts_per_tok={k}: n_routed_experts={E} to pick from; wanted {hint}")
        if RESIDUALS[self.residual].one_stream:
            self.n_streams = 1
        if not {*self.learned_maps.split(",")} <= {*MAPS}:
            raise ValueError(
                f"learned_maps={self.learned_maps!r}: wanted some of {','.join(MAPS)}, with commas between"
            )
        RESIDUALS[self.residual].check(self)
        if self.collapse == "head" and self.n_streams == 1:
            raise ValueError("collapse='head': wanted several streams, got one, whose weight the final norm undoes")

    @property
    def has_moe(self):
        return self.first_k_dense_replace < self.n_layer


# -----------------------------------------------------------------------------------------------------------------
# The residual connections: one object for each sublayer, at the boundary before it. Whatever another file wants to know
# about a kind of residual connection it asks its class, found by its name in RESIDUALS. README adds a fourth.


class Residual(nn.Module):
    """What every kind answers. One is made for each sublayer s = 0 .. 2L-1, as RESIDUALS[config.residual](config, s).

    carry: what a boundary hands to the next one, None or a tuple of tensors; and what a segment's end hands to the next
    segment, None or one tensor. Only the class itself looks into it.
    """

    one_stream = False  # True: n_streams is 1, whatever the setting
    has_maps = False  # True: there is maps(x), and with it gains, heat maps and alarms

    def __init__(self, config, s):
        super().__init__()
        self.config, self.s, self.n = config, s, config.n_streams

    @staticmethod
    def check(config):
        """Raise ValueError, `name=value: wanted ...`, for settings that this kind cannot have."""
        if config.single_pass:
            raise ValueError(f"single_pass=True: wanted residual='mhc', which alone has it; got {config.residual!r}")

    @staticmethod
    def closed_carry(config, B, T):
        """The carry that `close` hands on, without values (on the meta device); None if it is None. For pipeline.py."""
        return None

    def forward(self, x, y, carry):
        """The boundary: close the sublayer before, read for this one. x (..., n, C); y (..., C) the output of the one
        before, None at the start of a segment -> x after the update, x_in (..., C) the input of this one, carry."""
        raise NotImplementedError

    def close(self, x, y, carry):
        """The update alone, at the end of a segment -> x, and the carry that goes with it into the next segment."""
        raise NotImplementedError

    @staticmethod
    def collapse(x, carry):
        """The end of the last segment: x (..., n, C) -> (..., C)."""
        return collapse_streams(x)

    def first_value(self, name, shape, generator):
        """The first value of this connection's parameter `name`; random ones are drawn from `generator`."""
        raise NotImplementedError

    @staticmethod
    def kept_bytes(config, e):
        """What the backward keeps of one boundary, in bytes per token; e: bytes of an activation. For plan.py."""
        raise NotImplementedError


class Baseline(Residual):
    """x <- x + F(x): one stream, nothing learned, nothing carried."""

    one_stream = True

    def forward(self, x, y, carry):
        x, carry = self.close(x, y, carry)
        return x, x.squeeze(-2), carry  # x_in (B, T, C)

    def close(self, x, y, carry):
        return (x if y is None else x + y.unsqueeze(-2)), None  # (B, T, 1, C)

    @staticmethod
    def kept_bytes(config, e):
        return 0


class HyperConnection(Residual):
    """What n streams with maps H_pre, H_post and H_res share: the update of Eq 3. The carry is (H_post, H_res).

    A map without any effect on the loss still gets a gradient, of rounding noise, and AdamW with its eps of 1e-20 would
    turn that into steps of full size. `live` says which of (pre, post, res) can act with this config; the others are
    cut from the graph and get gradients of exactly zero: alpha and b stay where they are, and phi's or theta's columns
    only decay. Whether mHC's last H_res acts depends on the weights too, and is seen token by token (cut_converged).
    """

    has_maps = True
    res_weight = "what makes H_res"  # its name in messages
    saturates = False  # True: an H_res of zeros and ones alone learns no more

    def __init__(self, config, s):
        super().__init__(config, s)
        n = config.n_streams
        self.sizes = (n, n, n * n)  # of b: pre | post | res
        self.eps, self.impl = config.norm_eps, config.impl
        self.learned = [name in config.learned_maps.split(",") for name in MAPS]
        self.live = tuple(acts and learned for acts, learned in zip(self.live_maps(), self.learned, strict=True))

    def live_maps(self):
        """Which of (pre, post, res) have an effect at sublayer s."""
        return True, True, True

    def pre_is_a_scale(self):
        """Before the first sublayer all streams are equal, and with n = 1 there is one: H_pre is only a scale then, and
        the pre-norm removes it but for norm_eps / mean(x_in^2). The gradient that this leaves, with embeddings of size
        .006 to .02, is in fp32 nothing but noise at norm_eps = 1e-9, and right to some 20 % at 1e-8, 1 % at 1e-7."""
        return (self.s == 0 or self.n == 1) and self.eps < 1e-8

    def cut(self, p, sizes):
        """p (..., sum(sizes)) with the parts of dead maps detached."""
        if all(self.live):
            return p
        return torch.cat([q if live else q.detach() for q, live in zip(p.split(sizes, -1), self.live, strict=True)], -1)

    def fixed(self, name, value, b):
        """The first value of alpha or b, where for each map that is not learned alpha is 0 and b is taken from `b`."""
        sizes, instead = ((1, 1, 1), torch.zeros(3)) if name == "alpha" else (self.sizes, b)
        parts = zip(value.split(sizes), instead.split(sizes), self.learned, strict=True)
        return torch.cat([v if learned else f for v, f, learned in parts])

    def maps(self, x):
        """x (..., n, C) -> H_pre (..., n), H_post (..., n), H_res (..., n, n)."""
        raise NotImplementedError

    def forward(self, x, y, carry):
        with torch.autocast(x.device.type, enabled=False):
            x, x_in, *carry = hyper_step(x, y, *(carry or (None, None)), self.maps, self.impl)
        return x, x_in, tuple(carry)

    def close(self, x, y, carry):
        """The update of Eq 3 alone: x_next[i] = sum_j H_res[i, j] x[j] + H_post[i] y."""
        if y is None:
            return x, None
        with torch.autocast(x.device.type, enabled=False):
            return mhc_post_res(x, y, *carry, self.impl), None

    def res_gradient(self):
        """The gradient of what makes H_res from x; None before a backward, or where there is nothing to watch."""
        return None

    @staticmethod
    def kept_bytes(config, e):
        n, C = config.n_streams, config.n_embd
        return e * (n * C + C) + 4 * (n + n * n)  # the streams after it, F's output, H_post, H_res (fp32)


class HC(HyperConnection):
    """Hyper-Connections: unconstrained maps, from each stream's own RMSNorm, through tanh (Eq 5).

    alpha (3,) and b (n^2+2n,) in the order pre | post | res; theta (C, n+2): columns pre, post, and n of res. The
    norm's weight is absorbed into theta.
    """

    res_weight = "theta_res"

    def __init__(self, config, s):
        super().__init__(config, s)
        self.alpha = nn.Parameter(torch.empty(3))
        self.b = nn.Parameter(torch.empty(sum(self.sizes)))
        self.theta = nn.Parameter(torch.empty(config.n_embd, config.n_streams + 2))

    def live_maps(self):
        """H_res is not stochastic, and acts wherever it stands."""
        return not self.pre_is_a_scale(), True, True

    def projection(self):
        """theta, alpha, b with the maps that have no effect cut out."""
        theta = self.cut(self.theta, (1, 1, self.n))
        return theta, self.cut(self.alpha, (1, 1, 1)), self.cut(self.b, self.sizes)

    def maps(self, x):
        with torch.autocast(x.device.type, enabled=False):  # mappings are fp32 under bf16 training too
            return hc_coeffs(x, *self.projection(), self.eps)

    def forward(self, x, y, carry):
        """HyperConnection's in one operation."""
        H_post, H_res = carry or (None, None)
        with torch.autocast(x.device.type, enabled=False):
            x, x_in, *maps = hc_step(x, y, H_post, H_res, *self.projection(), self.eps, self.impl)
        return x, x_in, tuple(maps)

    def first_value(self, name, shape, generator):
        if name == "theta":
            return torch.zeros(shape)
        one_hot, ones, eye = torch.eye(self.n)[self.s % self.n], torch.ones(self.n), torch.eye(self.n).flatten()
        value = torch.full(shape, self.config.alpha_init) if name == "alpha" else torch.cat((one_hot, ones, eye))
        return self.fixed(name, value, torch.cat((ones / self.n, ones, eye)))

    def res_gradient(self):
        return None if self.theta.grad is None or not self.live[2] else self.theta.grad[:, -self.n :]

    @staticmethod
    def kept_bytes(config, e):
        """Of each stream n + 2 projections and r; and, where impl is not 'eager', bf16 streams also in fp32."""
        n, C = config.n_streams, config.n_embd
        wide = 4 * n * C if e == 2 and config.impl != "eager" else 0
        return HyperConnection.kept_bytes(config, e) + wide + 4 * n * (n + 3)


class MHC(HyperConnection):
    """Manifold-Constrained Hyper-Connections (Eq 7-9): H_res doubly stochastic, H_pre and H_post sigmoids.

    phi (nC, n^2+2n), alpha (3,), b (n^2+2n,), all in the order pre | post | res, mat(.) row-major. Another manifold
    (manifolds.py) takes Sinkhorn's place, and with it another number of logits that of n^2.

    single_pass (DeepSeek-V4.1's): the H_pre made before sublayer s reads the streams of sublayer s + 1, so that one
    pass over them can do the update, the read and the projection. Sublayer 0 reads stream 0, and the final norm reads
    through the last H_pre. The carry is (H_pre, H_post, H_res) then, and H_pre alone from segment to segment.
    """

    res_weight, saturates = "phi_res", True

    def __init__(self, config, s):
        super().__init__(config, s)
        n, manifold = self.n, MANIFOLDS[config.manifold]
        self.sizes = (n, n, manifold.n_logits(n))
        self.manifold = None if config.manifold == "sinkhorn" else partial(manifold.H_res, n=n)
        self.alpha = nn.Parameter(torch.empty(3))
        self.b = nn.Parameter(torch.empty(sum(self.sizes)))
        self.phi = nn.Parameter(torch.empty(config.n_streams * config.n_embd, sum(self.sizes)))
        self.sinkhorn_iters = config.sinkhorn_iters
        self.is_summed = self.ends_in_a_sum() and self.manifold is None

    def ends_in_a_sum(self):
        """Whether this sublayer is the last and the streams are then summed, with equal weights: its H_res acts through
        its column sums alone."""
        equally = not self.learned[0] if self.config.single_pass else self.config.collapse == "sum"
        return self.s == 2 * self.config.n_layer - 1 and equally

    @staticmethod
    def check(config):
        check_manifold(config.manifold, config.n_streams)
        if config.single_pass and config.collapse == "head":
            raise ValueError(
                "collapse='head' with single_pass=True: wanted collapse='sum'; the final norm reads the streams through"
                " the last H_pre, and a head would have nothing to do"
            )
        if "post" not in config.learned_maps:
            raise ValueError(
                f"learned_maps={config.learned_maps!r}: with H_post = 1 every stream gets the same, and a row-"
                "stochastic H_res keeps equal streams equal: no map would act; wanted 'post' among them, or "
                "residual='baseline'"
            )

    @staticmethod
    def closed_carry(config, B, T):
        return torch.empty(B, T, config.n_streams, device="meta") if config.single_pass else None

    def pre_is_a_scale(self):
        """Single-pass: the H_pre made before the first sublayer reads the second's streams, and they differ."""
        return super().pre_is_a_scale() and (self.n == 1 or not self.config.single_pass)

    def live_maps(self):
        """Before the first sublayer all streams are equal, so a row-stochastic H_res changes nothing, whatever the
        weights; nor does it with one stream, or if it is fixed. In the last under collapse='sum' an exactly doubly
        stochastic one changes nothing; Sinkhorn's: see cut_converged."""
        fixed = self.config.manifold == "identity" or self.config.manifold != "sinkhorn" and self.ends_in_a_sum()
        return not self.pre_is_a_scale(), True, self.s > 0 and self.n > 1 and not fixed

    def projection(self):
        """phi, alpha, b with the maps that have no effect cut out."""
        return self.cut(self.phi, self.sizes), self.cut(self.alpha, (1, 1, 1)), self.cut(self.b, self.sizes)

    def maps(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return mhc_coeffs(x, *self.projection(), self.sinkhorn_iters, self.eps, manifold=self.manifold)

    def forward(self, x, y, carry):
        """HyperConnection's in one fused operation."""
        H_pre = None
        if self.config.single_pass:  # the one that reads here
            H_pre = self.stream_0(x) if carry is None else carry if y is None else carry[0]
        H_post, H_res = (None, None) if y is None else carry[-2:]
        with torch.autocast(x.device.type, enabled=False):
            options = {"impl": self.impl, "H_pre": H_pre, "manifold": self.manifold}
            x, x_in, *maps, H_res = mhc_step(
                x, y, H_post, H_res, *self.projection(), self.sinkhorn_iters, self.eps, **options
            )
        return x, x_in, (*maps, cut_converged(H_res) if self.is_summed else H_res)

    def stream_0(self, x):
        """x (..., n, C) -> the H_pre (..., n) that reads its first stream."""
        return torch.eye(1, self.n, dtype=map_dtype(x), device=x.device).expand(x.shape[:-1])

    def close(self, x, y, carry):
        return super().close(x, y, carry[-2:])[0], carry[0] if self.config.single_pass else None

    @staticmethod
    def collapse(x, carry):
        return collapse_streams(x) if carry is None else mhc_pre(x, carry)

    def first_value(self, name, shape, generator):
        if name == "phi":
            return torch.empty(shape).normal_(0, 0.02, generator=generator)
        one_hot, zeros = torch.eye(self.n)[self.s % self.n], torch.zeros(self.n)
        read = torch.eye(self.n)[(self.s + self.config.single_pass) % self.n]  # home of the sublayer that H_pre reads
        manifold = MANIFOLDS[self.config.manifold]
        res = manifold.first(self.n)
        if self.config.manifold == "sinkhorn" and self.config.maps_init == "home":
            res = 2 * torch.eye(self.n).flatten() - 2
        value = {
            "alpha": torch.full((3,), self.config.alpha_init),
            "home": torch.cat((8 * read - 4, 4 * one_hot - 2, res)),
            "paper": torch.cat((3 * read - 3, zeros, res)),
        }[self.config.maps_init if name == "b" else name]
        nearly_one_nth = (zeros + 1 / self.n).logit(1e-6)  # one stream: its factor is nothing to the pre-norm
        return self.fixed(name, value, torch.cat((nearly_one_nth, zeros, manifold.fixed(self.n))))

    def res_gradient(self):
        """None for the last one under collapse='sum' too: there a small one is no reason for an alarm."""
        watched = self.live[2] and not self.is_summed and self.phi.grad is not None
        return self.phi.grad[:, -self.sizes[2] :] if watched else None

    @staticmethod
    def kept_bytes(config, e):
        n_logits = MANIFOLDS[config.manifold].n_logits(config.n_streams)
        H_pre = 4 * config.n_streams if config.single_pass else 0
        return HyperConnection.kept_bytes(config, e) + projection_bytes(config.n_streams, n_logits) + H_pre


def cut_converged(H_res):
    """H_res (..., n, n), detached in the tokens in which all columns sum to 1 up to rounding.

    For an H_res that acts through its column sums alone. These are 1 but for Sinkhorn's truncation, so how much of a
    gradient it has depends on the weights: in the first logits none (20 iterations, logit std .9: 4e-8 of that of the
    sublayer before, under a noise of 1e-6 in fp32), at logit std 8, or after 5 iterations, 3e-3 to 8 times it.
    """
    error = (H_res.detach().sum(-2) - 1).abs().amax(-1)  # (...): with rounding alone up to 2.5 eps (n = 16: 4)
    converged = error <= 4 * torch.finfo(H_res.dtype).eps
    return torch.where(converged[..., None, None], H_res.detach(), H_res)


def projection_bytes(n, n_logits):
    """The projections and r, fp32."""
    return 4 * (2 * n + n_logits) + 4


RESIDUALS = {"baseline": Baseline, "hc": HC, "mhc": MHC}


class CollapseHead(nn.Module):
    """DeepSeek-V4's learned exit: w = sigmoid(alpha RMSNorm(vec x) phi + b), sum_k w_k x_k."""

    def __init__(self, config):
        super().__init__()
        self.config, n, self.eps = config, config.n_streams, config.norm_eps
        self.phi = nn.Parameter(torch.empty(n * config.n_embd, n))
        self.alpha = nn.Parameter(torch.empty(1))
        self.b = nn.Parameter(torch.empty(n))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            v = x.flatten(-2).to(map_dtype(x))  # (B, T, nC)
            v = F.rms_norm(v, (v.shape[-1],), None, self.eps)
            w = torch.sigmoid(self.alpha * (v @ self.phi.to(v.dtype)) + self.b)  # (B, T, n)
        return (w.unsqueeze(-1) * x).sum(-2).to(x.dtype)

    def first_value(self, name, shape, generator):
        if name == "phi":
            return torch.empty(shape).normal_(0, 0.02, generator=generator)
        return torch.full(shape, self.config.alpha_init if name == "alpha" else 0.0)


def expand_streams(x, n):
    """x (B, T, C) -> (B, T, n, C): the embedding copied n times, once, before the first sublayer."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1]).contiguous()


def collapse_streams(x):
    """x (B, T, n, C) -> (B, T, C): the sum, once, after the last. The final RMSNorm makes the mean the same thing."""
    return x.sum(-2)


# -----------------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """The parameters of two sublayers, F = sublayer o RMSNorm, each with the residual connection before it.

    A block has no forward: GPT.sublayers lists the parts of all blocks in order, and run_sublayers is the loop over
    them, because a boundary belongs to two sublayers and so to no block alone.
    """

    def __init__(self, config, i):
        super().__init__()
        self.attn_residual = RESIDUALS[config.residual](config, 2 * i)
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = MLA(config)
        self.mlp_residual = RESIDUALS[config.residual](config, 2 * i + 1)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        dense = i < config.first_k_dense_replace
        self.mlp = MLP(config.n_embd, config.intermediate_size) if dense else MoE(config)


def run_sublayers(x, sublayers, look=None, carry=None):
    """The loop of the model: streams x (B, T, n, C) through some sublayers, (residual, norm, F) each, to their end.

    -> x, carry. look(residual, x) is called with the x of every sublayer. Closed by the update alone, so what comes out
    can go into another such loop: that is how recompute.py cuts the depth into segments. The carry is the residual
    connection's own matter: None before the first sublayer. No sublayers change nothing.
    """
    y = residual = None
    for residual, norm, f in sublayers:
        x, x_in, carry = residual(x, y, carry)
        y = f(norm(x_in))
        if look is not None:
            look(residual, x)
    return (x, carry) if residual is None else residual.close(x, y, carry)


class GPT(nn.Module):
    """The model. Built without values (on the meta device too): call init_weights(seed) or load a checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.run_sublayers = run_sublayers  # recompute.py puts another in its place
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.collapse_head = CollapseHead(config) if config.collapse == "head" else None
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # untied
        self.head_loss = "chunked"  # one of layers.HEAD_LOSSES: HeadLoss, or a library's
        self.softmax_loss = None  # HeadLoss', once it is compiled
        self.head_copies = None  # {dtype: the head's weight in it}, within one_head

    def blocks(self):
        """(number, block) of the blocks that are here: all of them, but in a pipeline (pipeline.py)."""
        return [(i, block) for i, block in enumerate(self.layers) if block is not None]

    def sublayers(self, positions, cache=None, within=None):
        """The 2L triples (residual connection, norm, F) in order, or those of the blocks `within` alone.

        positions (B or 1, T)."""
        c = self.config
        rope = rope_angles(positions, c.qk_rope_head_dim, c.rope_theta)
        for i, block in self.blocks():
            if within is not None and i not in within:
                continue
            attend = partial(block.self_attn, rope=rope, cache=cache, layer=i)
            yield block.attn_residual, block.input_layernorm, attend
            yield block.mlp_residual, block.post_attention_layernorm, block.mlp

    def compile_sublayers(self, **how):
        """torch.compile every F, and the head's loss between its products; how: its arguments.

        The boundaries between them have kernels of their own: mhc.py."""
        self.softmax_loss = torch.compile(softmax_loss, **how)
        for _, block in self.blocks():
            block.self_attn.compile(**how)
            block.mlp.compile(**how)

    def matrices(self):
        """(module, parameter's name) of what every F multiplies by, but for the gates, whose products are fp32."""
        parts = [m for _, block in self.blocks() for f in (block.self_attn, block.mlp) for m in f.modules()]
        linears = [(m, "weight") for m in parts if type(m) is nn.Linear]
        return linears + [(m, name) for m in parts if isinstance(m, Experts) for name, _ in m.named_parameters()]

    @contextmanager
    def with_matrices(self, others, places=None):
        """As long as it lasts, `others`, as many tensors as places (None: matrices()), are in their places."""
        places = self.matrices() if places is None else places
        own = [module._parameters[name] for module, name in places]
        try:
            for (module, name), t in zip(places, others, strict=True):
                module._parameters[name] = t
            yield
        finally:
            for (module, name), p in zip(places, own, strict=True):
                module._parameters[name] = p

    @contextmanager
    def one_head(self):
        """As long as it lasts, during which it must not change, the head's weight is cast once for all losses: by the
        first of them, since FSDP brings it together in a forward."""
        self.head_copies = {}
        try:
            yield
        finally:
            self.head_copies = None

    def narrow_head(self, dtype):
        """The head's weight in dtype, within one_head; None: outside of it, or nothing to cast."""
        if self.head_copies is None or self.lm_head.weight.dtype == dtype:
            return None
        if dtype not in self.head_copies:
            self.head_copies[dtype] = self.lm_head.weight.detach().to(dtype)
        return self.head_copies[dtype]

    def residuals(self):
        """The 2L residual connections in order."""
        return [r for _, block in self.blocks() for r in (block.attn_residual, block.mlp_residual)]

    def embed(self, idx):
        """idx (B, T) -> streams x (B, T, n, C), in the dtype that the sublayers compute in (Eq 11: bf16 under bf16)."""
        x = self.embed_tokens(idx)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return expand_streams(x, self.config.n_streams)

    def hidden(self, idx, cache=None, look=None):
        """idx (B, T) -> the final norm's output (B, T, C). look(residual, x) is called with the x of every sublayer."""
        positions = torch.arange(idx.shape[1], device=idx.device).unsqueeze(0)  # (1, T)
        if cache is not None:
            positions = positions + cache.length.unsqueeze(1)  # (B, T)
        x, carry = self.run_sublayers(self.embed(idx), self.sublayers(positions, cache), look)
        if cache is not None:
            cache.advance(idx.shape[1])
        return self.exit(x, carry)

    def exit(self, x, carry):
        """The streams after the last sublayer (B, T, n, C), and their carry -> the final norm's output (B, T, C)."""
        collapse = RESIDUALS[self.config.residual].collapse
        return self.norm(self.collapse_head(x) if self.collapse_head else collapse(x, carry))

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) of token numbers -> (logits (B, T, vocab), None), or with targets (B, T) -> (None, mean loss).

        A target of -1 is ignored. With a LatentCache, idx continues the sequences in it, and the cache is advanced.
        """
        h = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(h), None
        return None, self.loss(h.flatten(0, 1), targets.flatten())

    def loss(self, h, targets):
        """Mean cross entropy in nats of h (N, C) against targets (N,); -1 is ignored. See layers.py's head."""
        if torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))
        with torch.autocast(h.device.type, enabled=False):  # it would round the fp32 logits on a CPU
            w = self.lm_head.weight
            if self.head_loss == "chunked":
                how = torch.is_grad_enabled(), self.softmax_loss, self.narrow_head(h.dtype)
                total = HeadLoss.apply(h, w, targets, *how)
            else:
                total = library_loss(self.head_loss, h, w, targets)
        return total / (targets != -1).sum().clamp(min=1)

    @torch.no_grad()
    def look(self, idx, see):
        """see(residual, x) for each of the 2L sublayers, x (B, T, n, C) the streams it reads -> list of the results.

        Runs in eval mode: a look at the model must not count as load on its experts. Afterwards each module is in the
        mode it was in."""
        seen, modes = [], [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            self.hidden(idx, look=lambda residual, x: seen.append(see(residual, x)))
        finally:
            for module, training in modes:
                module.training = training
        return seen

    def residual_maps(self, idx):
        """idx (B, T) -> over the 2L sublayers, a list of H_pre (B, T, n), H_post (B, T, n), H_res (B, T, n, n)."""
        if not RESIDUALS[self.config.residual].has_maps:
            having = ", ".join(repr(name) for name, kind in RESIDUALS.items() if kind.has_maps)
            raise ValueError(f"residual={self.config.residual!r} has no mappings: residual_maps is for {having}")
        return self.look(idx, lambda residual, x: residual.maps(x))

    # --- experts ---

    def gates(self):
        return [block.mlp.gate for _, block in self.blocks() if isinstance(block.mlp, MoE)]

    def expert_load(self):
        """(MoE blocks, E) tokens per expert since the bias was last moved; empty without MoE."""
        loads = [gate.load for gate in self.gates()]
        return torch.stack(loads) if loads else torch.zeros(0, 0, device=next(self.parameters()).device)

    @torch.no_grad()
    def update_expert_bias(self, gamma, load):
        """Once per optimizer step: an expert above its block's mean load is made less likely by gamma, one below more.

        load (MoE blocks, E): expert_load() summed over all processes (DeepSeek-V3, 2.1.2). Counting starts anew.
        """
        for gate, load_i in zip(self.gates(), load.float(), strict=True):
            gate.e_score_correction_bias += gamma * (load_i.mean() - load_i).sign()
            gate.load.zero_()

    # --- initialisation ---

    @torch.no_grad()
    def init_weights(self, seed, assign=torch.Tensor.copy_):
        """Give every parameter its first value. All initialisation is in `initial_value`: its table, and what it calls.

        Each parameter is drawn from a generator keyed by (seed, its name): the value depends on nothing else, so the
        backbone is the same whatever the residual connection, and whatever the number of processes.
        assign(p, value) puts a whole value into a parameter; a sharded one needs its own (parallel.py).
        """
        for name, p in self.named_parameters():
            assign(p, self.initial_value(name, p.shape, seed))
        for gate in self.gates():
            gate.e_score_correction_bias.zero_()
            gate.load.zero_()

    def initial_value(self, name, shape, seed):
        """The first value of parameter `name`, a whole fp32 CPU tensor. h is the home stream of sublayer s: s mod n.

        | parameter            | value                                  | why                                        |
        | -------------------- | -------------------------------------- | ------------------------------------------ |
        | embeddings, matrices | N(0, init_std)                         | DeepSeek-V3 takes 0.006                    |
        | RMSNorm weights      | 1                                      |                                            |
        | alpha                | alpha_init                             | the paper's 0.01                           |
        | HC theta             | 0                                      | HC's own                                   |
        | HC b                 | pre one-hot(h), post 1, res I          | HC's own: starts as the baseline           |
        | mHC phi, head phi    | N(0, 0.02)                             | see below                                  |
        | mHC b, 'home': pre   | +4 at h, -4 elsewhere: H_pre .98, .02  | a sublayer reads its home stream (single-  |
        |                      |                                        | pass: so h is that of the next sublayer)   |
        |                post  | +2 at h, -2 elsewhere: H_post 1.8, .24 | and writes mostly there, so streams differ |
        |                res   | 0 on the diagonal, -2 elsewhere        | H_res .71 on, .10 off: has room to move    |
        | mHC b, 'paper': pre  | 0 at h, -3 elsewhere: H_pre .5, .05    | A.6: starts as the baseline, and yet       |
        |                post  | 0: H_post 1                            | sublayers tell the streams apart           |
        |                res   | 3 on the diagonal, -3 elsewhere        | H_res .993 on, .002 off: keeps what it has |
        | other manifolds: res | `first` in manifolds.py: as 'paper'    | whatever maps_init is                      |
        | head b               | 0                                      | every stream at one half                   |
        | not in learned_maps  | alpha 0; b at H_pre 1/n, H_post 1, I   | and never learned: Table 1                 |

        The symmetry trap: with phi = 0 and b equal across streams, the n copies of the embedding stay identical for
        ever, and H_res gets no gradient. Here home streams take turns, so the streams differ after one sublayer.
        A diagonal pushed to +-8 would start nearer to the identity, and leaves H_res a gradient near zero.
        Under 'paper' every stream gets the same y, so with phi = 0 the streams are equal in the first step (measured in
        fp64: to 1e-15), H_pre, H_res and every alpha get rounding noise for a gradient, and with adam_eps = 1e-20 that
        noise would make full-size steps; H_post alone would learn, because sublayers read streams with other weights.
        The first gradient of H_res is in proportion to phi: 2.6e-8 at .02, 1.3e-9 at .001 (C = 64, b_res; b_post's is
        3.6e-4), over a noise of 1.5e-11 in fp32 and 3e-8 with bf16 streams. So phi is N(0, .02) here too: the streams
        part by 1e-3 of their size.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it reads 32 bits
        path = name.split(".")
        depth = 3 if path[0] == "layers" else 1  # layers.3.attn_residual, collapse_head
        part = self.get_submodule(".".join(path[:depth]))
        if isinstance(part, (Residual, CollapseHead)):
            return part.first_value(".".join(path[depth:]), shape, generator)
        if path[-1] == "weight" and "norm" in path[-2]:
            return torch.ones(shape)
        return torch.empty(shape).normal_(0, self.config.init_std, generator=generator)

    # --- counting ---

    def num_params(self):
        """Parameters: all; those that act on one token (without the input embedding, which is a look-up, and without
        the routed experts a token does not pick); and those of the vocabulary (input embedding and output head)."""
        total = sum(p.numel() for p in self.parameters())
        embedding = self.embed_tokens.weight.numel()
        experts = [p for block in self.layers if isinstance(block.mlp, MoE) for p in block.mlp.experts.parameters()]
        idle = sum(p.numel() // len(p) * (len(p) - self.config.num_experts_per_tok) for p in experts)
        return {"total": total, "active": total - embedding - idle, "vocab": embedding + self.lm_head.weight.numel()}

    def flops_per_token(self):
        """Training FLOPs per token, forward and backward: 6 per active parameter, and 6 T H (D + R + V) a block for
        attention, counted as if it were not causal (PaLM, appendix B). Recomputation is not counted."""
        c = self.config
        head_dims = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
        return 6 * self.num_params()["active"] + 6 * c.n_layer * c.seq_len * c.n_head * head_dims
