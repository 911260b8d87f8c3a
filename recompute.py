"""Recomputation: what is thrown away in the forward pass and made again in the backward.

    apply(model, "mhc")                      # the paper's: blocks of L_r* sublayers
    apply(model, "mhc", block=4)
    apply(model, "full")                     # everything inside a sublayer, F too

The depth of L sublayers is cut into segments of `block` sublayers. A segment opens with x and what the residual
connection carries over (nothing in HC and mHC), and ends with the update alone (`residual.close`), so that a segment,
or several, can be a pipeline stage.

    recompute   kept for the backward                                      run twice
    'none'      everything                                                 nothing
    'mhc'       x at each segment's start (nC), F's output at every        mappings, post_res, H_pre x, RMSNorm(H_pre x)
                sublayer (C), and what F itself keeps, without its input   (Table 3)
    'full'      x at each segment's start                                  everything, F too

The replay of a segment needs, at its peak, nC + 2C for each of its sublayers: x, x_in and RMSNorm(x_in). What
is kept and what is replayed are smallest together at L_r* (Eq 20).

How 'mhc' works. torch.utils.checkpoint replays a function to get back the tensors that autograd had saved in it. Here
the function is the model's own loop over one segment, with every F wrapped in `Kept`: the first call runs F, outside of
checkpoint's reach, and keeps its output; the replay gets that output and runs nothing. F's own graph thus stays as it
is, but for its input RMSNorm(x_in): whatever F saves that lies in the input's memory is replaced by a note of where it
lay, and read from the replay when the backward asks.
"""

import math

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from model import run_sublayers

RECOMPUTE = ("none", "mhc", "full")


def block_cost(L, L_r, n):
    """Eq 20: elements per token and channel that a block length L_r holds at the peak, nceil(L/L_r) + (n+2)L_r.

    F's outputs, C for each of the L sublayers whatever L_r is, are left out, as they are in the paper.
    """
    return n * math.ceil(L / L_r) + (n + 2) * L_r


def best_block(L, n):
    """L_r* of Eq 20 for L sublayers and n streams: the smallest integer among the best, about sqrt(nL / (n+2))."""
    return min(range(1, L + 1), key=lambda L_r: block_cost(L, L_r, n))


def block_length(config, recompute, block=-1):
    """Sublayers in a segment of a model of this GPTConfig; arguments and errors as of `apply`."""
    L = 2 * config.n_layer
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r}: wanted one of {', '.join(map(repr, RECOMPUTE))}")
    if not (block == -1 or 1 <= block <= L):
        raise ValueError(f"recompute_block={block}: wanted -1 for the best, or 1 to {L}, the number of sublayers")
    return block if block > 0 else {"none": L, "mhc": best_block(L, config.n_streams), "full": 1}[recompute]


def apply(model, recompute, block=-1):
    """Make a GPT recompute. Returns the number of sublayers in a segment.

    recompute: one of RECOMPUTE. block: sublayers in a segment, or -1 for the best: L_r* of Eq 20 with 'mhc', 1 with
    'full', all with 'none' (where shorter segments cut the depth in the same places without recomputing anything).
    Raises ValueError naming the setting that cannot be.
    """
    L, block = 2 * model.config.n_layer, block_length(model.config, recompute, block)
    if recompute == "none" and block == L:
        model.run_sublayers = run_sublayers
        return block

    def run(x, sublayers, look=None, carry=None):
        """model.run_sublayers, segment by segment."""
        if not torch.is_grad_enabled():  # nothing is kept anyway
            return run_sublayers(x, sublayers, look, carry)
        sublayers = list(sublayers)
        for start in range(0, len(sublayers), block):  # a pipeline stage has its own sublayers only
            segment = sublayers[start : start + block]
            if recompute == "none":
                x, carry = run_sublayers(x, segment, look, carry)
                continue
            wrap = Kept if recompute == "mhc" else CountedOnce
            segment = [(residual, norm, wrap(f)) for residual, norm, f in segment]
            x, carry = checkpoint(run_sublayers, x, segment, look, carry, use_reentrant=False, preserve_rng_state=False)
        return x, carry

    model.run_sublayers = run
    return block


class CountedOnce:
    """F for 'full': run in the forward and again in the replay, where a mixture of experts must not count its tokens a
    second time. The count is put back rather than switched off: both runs are then the same code, compiled or not."""

    def __init__(self, f):
        self.f, self.replay = f, False

    def __call__(self, z):
        load = getattr(getattr(self.f, "gate", None), "load", None)
        before = load.clone() if self.replay and load is not None else None
        self.replay = True
        try:
            return self.f(z)
        finally:
            if before is not None:
                load.copy_(before)


class Kept:
    """F for 'mhc': run in the forward, its output kept; the replay gets that output, and hands F's input back."""

    def __init__(self, f):
        self.f, self.y = f, None

    def __call__(self, z):
        z = Marked.apply(z)  # in the replay too, which hands z back through it
        if self.y is not None:
            return self.y
        source = Input(z)
        with saved_tensors_hooks(source.pack, source.unpack):
            y = self.f(z)
        # detached, or the replay's closure would hold the graph that holds the closure; a leaf that wants a gradient,
        # so that the replay saves what the forward saved
        self.y = y.detach().requires_grad_(y.requires_grad)
        return y


class Marked(torch.autograd.Function):
    """The identity. Saves z for the backward, which under checkpoint means: its place among what the replay returns."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.view_as(z)

    @staticmethod
    def backward(ctx, g):
        return g


class Input:
    """F's input z, as the tensors that F saves refer to it. They live in F's graph; z itself is not kept by them."""

    def __init__(self, z):
        self.node, self.z = z.grad_fn, None  # the node of Marked
        self.memory, self.dtype = z.untyped_storage().data_ptr(), z.dtype
        self.offset = z.storage_offset()

    def pack(self, t):
        """What F's graph holds in t's place: t, or for (a view of) z the view's geometry."""
        foreign = t.is_meta or t.dtype != self.dtype or is_traceable_wrapper_subclass(t)  # an FP8 weight, say
        if foreign or t.untyped_storage().data_ptr() != self.memory:
            return t.detach()  # an output that held the node it is saved in would never be freed
        return t.size(), t.stride(), t.storage_offset() - self.offset

    def unpack(self, packed):
        if isinstance(packed, torch.Tensor):
            return packed
        if self.z is None:  # the first to ask triggers the segment's replay, if it has not run yet
            (self.z,) = self.node.saved_tensors
        size, stride, offset = packed
        return self.z.as_strided(size, stride, self.z.storage_offset() + offset)
