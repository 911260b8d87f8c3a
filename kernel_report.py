"""What can be known of the kernels without a GPU: the bytes they ask for, and what the compiler makes of them.

    python kernel_report.py traffic [C n tokens]     # Triton's interpreter, every load and store counted
    python kernel_report.py compile [C n]            # ahead of time, for three NVIDIA chips and one of AMD

Also `hardware_arithmetic`, which the interpreter needs before its numbers mean anything.
"""

import contextlib

import numpy as np


def round_to_bf16(a):
    """fp32 array -> the bits (uint16) of the nearest bf16, ties to even, as the hardware rounds."""
    bits = a.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(a), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def truncate_to_tf32(a):
    """fp32 array -> what a tf32 tensor core sees of it: 10 bits of mantissa, the rest cut off."""
    return (a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@contextlib.contextmanager
def hardware_arithmetic():
    """Make Triton's interpreter (3.7.1) round as the hardware does.

    As it stands it cuts fp32 -> bf16 off instead of rounding, multiplies bf16 operands of a dot as if their bits were
    integers, and computes 'tf32' dots exactly.
    """
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(round_to_bf16(np.ascontiguousarray(src.data)), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(from_bf16(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(from_bf16(t.data), tl.float32) for t in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(truncate_to_tf32(np.ascontiguousarray(t.data)), tl.float32) for t in (a, b))
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
