"""FP8: the products of MLA, of SwiGLUs and of the routed experts with operands of 8 bits. Set by fp8=True.

    linears of MLA, dense FFN, shared experts    torchao's Float8Linear: a scale for each tensor, e4m3, gradients e5m2
    the routed experts' three grouped products   torchao's grouped product: a scale for each row, e4m3
    head, embedding, gate, norms, mappings       as they are

Scales are made anew in every product. Parameters stay fp32 and keep their names, so a checkpoint knows nothing of it.
On a CPU it is emulated: operands are rounded to FP8 as on a GPU, and multiplied wide. On a GPU it has not been run.

Rows of an expert are padded to a multiple of 16, which the hardware wants; how many there are is not asked for.
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from layers import MoE, padded_rows

ROWS = 16  # of every operand's sides, and of an expert's rows
E4M3 = torch.float8_e4m3fn


def check(device, dtype, has_moe):
    """Raise ValueError where FP8 cannot be. device: 'cuda' | 'cpu' | 'mps'; dtype: the setting."""
    if not importlib.util.find_spec("torchao"):
        raise ValueError("fp8=True: wanted the package torchao, which is not installed: pip install torchao==0.18.0")
    if dtype != "bfloat16":
        raise ValueError(f"fp8=True: wanted dtype='bfloat16', which all else is computed in; got {dtype!r}")
    if device == "mps" or device == "cuda" and torch.version.hip:
        raise ValueError("fp8=True: wanted an NVIDIA GPU, or a CPU to emulate one")
    wanted = (9, 0) if has_moe else (8, 9)  # the grouped product is Hopper's
    if device == "cuda" and (has := torch.cuda.get_device_capability()) < wanted:
        raise ValueError("fp8=True: wanted a GPU of compute capability {}.{} or more{}, this one has {}.{}".format(
            *wanted, " for experts" if has_moe else "", *has))  # fmt: skip


def apply(model, device, gather=False):
    """Put FP8 products into a GPT, in place, before it is sharded. gather: FSDP brings the linears' weights together in
    FP8, which gloo cannot. Raises ValueError, naming it, for a matrix whose sides the hardware does not take."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    emulate = device == "cpu"
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True, enable_fsdp_float8_all_gather=gather)
    for i, block in model.blocks():
        for part in (block.self_attn, block.mlp):
            for name, p in part.named_parameters():
                narrow = isinstance(part.get_submodule(name.rpartition(".")[0]), nn.Linear) or p.ndim == 3
                if narrow and not emulate and any(side % ROWS for side in p.shape[-2:]):
                    raise ValueError(f"fp8=True: layers.{i}: {name} is {' x '.join(map(str, p.shape))}, wanted "
                                     f"multiples of {ROWS}")  # fmt: skip
            convert_to_float8_training(part, config=config)
        if isinstance(block.mlp, MoE):
            block.mlp.experts.forward = partial(run_experts, block.mlp.experts, Emulated.apply if emulate else grouped)


def run_experts(experts, grouped_mm, x, ends):
    """Experts.forward with its three products in FP8. x (M, C) sorted by expert, ends (E,) int32 -> (M, C)."""
    x, (gate, up, down) = experts.in_one_dtype(x)
    at, padded, ends = padded_rows(len(x), ends, ROWS)
    x = x.new_zeros(padded, x.shape[1]).index_copy(0, at, x)
    hidden = F.silu(grouped_mm(x, gate.transpose(1, 2), ends)) * grouped_mm(x, up.transpose(1, 2), ends)
    return grouped_mm(hidden, down.transpose(1, 2), ends).index_select(0, at)


def grouped(x, w_t, ends):
    """torchao's, on a GPU: x (M, K), w_t (E, K, N), ends (E,) -> (M, N) in bf16."""
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm

    return _to_fp8_rowwise_then_scaled_grouped_mm(x, w_t, ends, pad_token_groups_for_grouped_mm=False)


def rounded(t, dim):
    """t as FP8 holds it with one scale along dim, a power of two, in fp32 again."""
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    scale = tensor_to_scale(t, E4M3, scaling_granularity=ScalingGranularity.AXISWISE, axiswise_dim=dim,
                            round_scales_to_power_of_2=True)  # fmt: skip
    return to_fp8_saturated(t.float() * scale, E4M3).float() / scale


class Emulated(torch.autograd.Function):
    """`grouped` on a CPU: all three products with rounded operands, scaled along the dimension that is summed over."""

    @staticmethod
    def forward(ctx, x, w_t, ends):
        ctx.save_for_backward(x, w_t, ends)
        return by_group(rounded(x, 1), rounded(w_t, 1), ends).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w_t, ends = ctx.saved_tensors
        d_x = by_group(rounded(g, 1), rounded(w_t, 2).transpose(1, 2), ends).to(x.dtype)
        sizes = [int(n) for n in ends.diff(prepend=ends.new_zeros(1))]
        parts = zip(x[: sum(sizes)].split(sizes), g[: sum(sizes)].split(sizes), strict=True)
        d_w_t = [rounded(x_e, 0).t() @ rounded(g_e, 0) if len(x_e) else torch.zeros_like(w_t[0], dtype=torch.float32)
                 for x_e, g_e in parts]  # fmt: skip
        return d_x, torch.stack(d_w_t).to(w_t.dtype), None


def by_group(x, w_t, ends):
    """x (M, K), w_t (E, K, N), fp32 -> (M, N): rows of expert e times its matrix; zeros behind the last end."""
    out = x.new_zeros(len(x), w_t.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        for start, end, w in zip([0, *ends.tolist()], ends.tolist(), w_t, strict=False):
            out[start:end] = x[start:end] @ w
    return out
