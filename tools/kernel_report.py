"""Kernel reports. Without a GPU: memory traffic (interpreter) and registers and spills (compiler). With one: timings.

    python tools/kernel_report.py traffic [C n tokens]     # Triton's interpreter, every load and store counted; bf16
    python tools/kernel_report.py compile [C n]            # ahead of time, for four chips; bf16
    python tools/kernel_report.py gpu [C n tokens]         # times; needs a GPU
    python tools/kernel_report.py retune [C n tokens]      # the fastest block sizes; needs a GPU, and some minutes

`python tools/bench.py traffic`, `kernels`, `gpu` and `retune` print the same. `hardware_arithmetic` is for whoever runs
the kernels in Triton's interpreter: its numbers mean little without.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules in the root
import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import contextlib
import importlib.util
import itertools
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


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


def round_to_tf32(a):
    """fp32 array -> the nearest tf32, ties away from zero: cvt.rna.tf32.f32."""
    return truncate_to_tf32((a.view(np.uint32) + np.uint32(0x1000)).view(np.float32))


def big_and_rest(a):
    """fp32 array -> what tf32x3 multiplies of it: two tf32 arrays."""
    big = round_to_tf32(a)
    return big, truncate_to_tf32(a - big)


@contextlib.contextmanager
def hardware_arithmetic():
    """Make Triton's interpreter (3.7.1) round as the hardware does.

    As it stands it cuts fp32 -> bf16 off instead of rounding, multiplies bf16 operands of a dot as if their bits were
    integers, and computes 'tf32' and 'tf32x3' dots exactly. tf32x3 here is what Triton compiles it to: each operand as
    a big part, rounded, and the rest, which the tensor core cuts off; the product of both rests is left out.
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
        elif a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32x3:
            (a, a_rest), (b, b_rest) = (big_and_rest(np.ascontiguousarray(t.data)) for t in (a, b))
            d = TensorHandle(d.data + (a_rest @ b + a @ b_rest), tl.float32)
            a, b = TensorHandle(a, tl.float32), TensorHandle(b, tl.float32)
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


# ----------------------------------------------------------------------------------------------------------------------
# Traffic.

STREAMS = {"x", "y", "x_next", "x_in", "d_x", "d_y", "d_x_next", "d_x_in"}
STREAMS |= {"f", "out", "grad_x", "grad_f", "grad_out"}  # Liger's names
SHARED = {"phi", "d_phi", "d_params", "d_maps", "grad_phi"}  # not per token, or shares of sums


def group(kernel, name):
    if "sinkhorn" in kernel:
        return "maps"
    return "streams" if name in STREAMS else "phi" if name in SHARED else "maps"


class Traffic(TorchDispatchMode):
    """Counts what kernels run by Triton's interpreter, and PyTorch operations around them, read and write.

    self.asked and self.distinct: bytes by (kernel, group), of unmasked lanes; distinct counts a byte once a launch for
    reading and once for writing. Raises RuntimeError for an access outside every argument, for two programs of a launch
    that write one element, for a read of what the same launch wrote, and for any atomic unless `atomics`, when each
    counts once. PyTorch operations count as streams if a tensor in them has rows of C, or of several times C, elements.
    """

    def __init__(self, C=None, atomics=False):
        super().__init__()
        self.C, self.atomics = C, atomics
        self.asked, self.distinct = defaultdict(int), defaultdict(int)
        self.kernel = None  # while one runs, its name

    def __enter__(self):
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        self.patched = [
            (InterpreterBuilder, "create_masked_load", self.load),
            (InterpreterBuilder, "create_masked_store", self.store),
            (InterpreterBuilder, "create_atomic_rmw", self.atomic),
            (InterpreterBuilder, "create_atomic_cas", self.refuse),
            (GridExecutor, "__call__", self.launch),
        ]
        self.patched = [(where, name, getattr(where, name), hook) for where, name, hook in self.patched]
        for where, name, original, hook in self.patched:
            setattr(where, name, self.hooked(hook, original))
        return super().__enter__()

    def __exit__(self, *exc):
        for where, name, original, _ in self.patched:
            setattr(where, name, original)
        return super().__exit__(*exc)

    def hooked(self, hook, original):
        return lambda obj, *args, **kwargs: hook(original, obj, *args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.kernel is None and not func.is_view and "empty" not in func.name():
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            moved = sum(t.numel() * t.itemsize for t in tensors)
            wide = self.C and any(t.ndim and t.shape[-1] and t.shape[-1] % self.C == 0 for t in tensors)
            self.asked["PyTorch operations", "streams" if wide else "phi"] += moved
            self.distinct["PyTorch operations", "streams" if wide else "phi"] += moved
        return out

    def launch(self, original, executor, *args, **kwargs):
        names = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = [(name.removesuffix("_ptr"), t) for name, t in names.items() if isinstance(t, torch.Tensor)]
        self.buffers = sorted((t.data_ptr(), t.numel() * t.itemsize, name, t.itemsize) for name, t in tensors)
        self.bases = np.array([base for base, *_ in self.buffers], dtype=np.uint64)
        self.read = [np.zeros(size // item, bool) for _, size, _, item in self.buffers]
        self.writer = [np.full(size // item, -1) for _, size, _, item in self.buffers]
        self.kernel = executor.fn.__name__
        original(executor, *args, **kwargs)
        for (_, _, name, item), read, writer in zip(self.buffers, self.read, self.writer, strict=True):
            self.distinct[self.kernel, group(self.kernel, name)] += item * int(read.sum() + (writer >= 0).sum())
        self.kernel = None

    def find(self, pointers, mask):
        """Which buffer these lanes touch, and which of its elements; None if no lane is live."""
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        at = at[np.broadcast_to(mask.data, at.shape)]
        if not at.size:
            return None
        k = int(np.searchsorted(self.bases, at.min(), side="right")) - 1
        if k < 0 or int(at.max()) >= self.buffers[k][0] + self.buffers[k][1]:
            raise RuntimeError(f"{self.kernel}: an access outside every argument")
        base, _, name, item = self.buffers[k]
        self.asked[self.kernel, group(self.kernel, name)] += at.size * item
        return k, (at - np.uint64(base)) // np.uint64(item)

    def load(self, original, builder, pointers, mask, *rest):
        if found := self.find(pointers, mask):
            k, elements = found
            if (self.writer[k][elements] >= 0).any():
                raise RuntimeError(f"{self.kernel} reads {self.buffers[k][2]}, which the same launch wrote")
            self.read[k][elements] = True
        return original(builder, pointers, mask, *rest)

    def store(self, original, builder, pointers, value, mask, *rest):
        if found := self.find(pointers, mask):
            k, elements = found
            (x, y, z), (nx, ny, _) = builder.grid_idx, builder.grid_dim
            program, before = x + nx * (y + ny * z), self.writer[k][elements]
            if ((before >= 0) & (before != program)).any():
                raise RuntimeError(f"{self.kernel}: two programs write the same element of {self.buffers[k][2]}")
            self.writer[k][elements] = program
        return original(builder, pointers, value, mask, *rest)

    def atomic(self, original, builder, operation, pointers, value, mask, *rest):
        if not self.atomics:
            self.refuse()
        if found := self.find(pointers, mask):
            self.writer[found[0]][found[1]] = 0
        return original(builder, operation, pointers, value, mask, *rest)

    def refuse(self, *args):
        raise RuntimeError(f"{self.kernel}: an atomic operation")


def example(C, n, T, dtype=torch.bfloat16, device="cpu", form="middle"):
    """mhc_step's seven tensors for T tokens, random (or without memory, on the device 'meta'); None where the form,
    'first', 'middle' or 'last', has none."""
    M, randn = n * n + 2 * n, lambda *shape: torch.randn(*shape, device=device)
    maps = randn(T, n).sigmoid(), randn(T, n, n).softmax(-1)
    before = randn(T, C).to(dtype), *maps
    after = randn(n * C, M) / (n * C) ** 0.5, randn(3), randn(M)
    before, after = (None,) * 3 if form == "first" else before, (None,) * 3 if form == "last" else after
    return randn(T, n, C).to(dtype), *before, *after


def one_hot(x):
    """H_pre (..., n) before the first sublayer of single-pass mHC: stream 0."""
    H_pre = torch.zeros(x.shape[:-1], device=x.device)
    H_pre[..., 0] = 1
    return H_pre


def run_boundary(tensors, single_pass=False, forward=None, backward=None):
    """One boundary forward, then backward, as a model runs it; each within its context, if any."""
    import mhc_gpu

    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    H_pre = one_hot(tensors[0]).requires_grad_() if single_pass else None
    with forward or contextlib.nullcontext():
        if tensors[4] is None:
            outs = [mhc_gpu.mhc_post_res(*leaves[:4])]
        else:
            outs = mhc_gpu.mhc_step(*leaves, 20, 1e-20, H_pre, None)
    grads, leaves = [torch.ones_like(out) for out in outs], [t for t in (*leaves, H_pre) if t is not None]
    with backward or contextlib.nullcontext():
        torch.autograd.grad(outs, leaves, grads)


def traffic(C=2560, n=4, T=1024, single_pass=False):
    """[forward, backward]: {(kernel, group): (asked, distinct)} in units of C elements of bf16 a token."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("counting runs in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
    passes = Traffic(C), Traffic(C)
    with hardware_arithmetic():
        run_boundary(example(C, n, T), single_pass, *passes)
    return [in_units(p, 2 * C * T) for p in passes]


def in_units(counted, unit):
    return {key: (counted.asked[key] / unit, counted.distinct[key] / unit) for key in counted.asked}


def has_liger():
    return importlib.util.find_spec("liger_kernel") is not None


def liger_step(x, y, H_post, H_res, phi, alpha, b, *_):
    """mhc_step by Liger's kernels (0.8.5): post_res of one sublayer, then the mappings and pre of the next. phi in x's
    dtype, for its tensor cores; iterations and eps are Liger's own defaults."""
    from liger_kernel.ops import mhc

    x_next = mhc.LigerMHCPostResFunction.apply(x, y, H_post, H_res)
    options = (True, 20, 1e-6, 0.0, 1e-6, 2.0)  # fp32 allowed, iterations, the three eps, 2 sigmoid
    H_pre, H_post, H_res = mhc.LigerMHCCoeffsFunction.apply(x_next, phi.to(x.dtype), b, *alpha, *options)
    return x_next, mhc.LigerMHCPreFunction.apply(x_next, H_pre), H_post, H_res


def liger_traffic(C=2560, n=4, T=1024):
    """As `traffic`, of Liger's kernels and the casts and sums around them; phi already in bf16."""
    passes = Traffic(C, atomics=True), Traffic(C, atomics=True)
    tensors = list(example(C, n, T))
    tensors[4] = tensors[4].bfloat16()
    tensors = [t.requires_grad_() for t in tensors]
    with hardware_arithmetic():
        with passes[0]:
            outs = liger_step(*tensors)
        ones = [torch.ones_like(out) for out in outs]
        with passes[1]:
            torch.autograd.grad(outs, tensors, ones)
    return [in_units(p, 2 * C * T) for p in passes]


def total(counted, *groups):
    """(asked, distinct) of one pass, summed over the groups."""
    return tuple(sum(v[i] for (_, g), v in counted.items() if g in groups) for i in (0, 1))


def print_traffic(C=2560, n=4, T=1024):
    print(f"bytes moved at one boundary, n = {n}, C = {C}, {T} tokens, bf16; unit: {2 * C} bytes a token (counted)")
    print(f"{'':44}{'streams':>16}{'maps':>16}{'phi, d_phi, sums':>18}\n{'':44}" + "  asked distinct" * 3)
    for form in ("", "single-pass "):
        for title, counted in zip(("forward", "backward"), traffic(C, n, T, bool(form)), strict=True):
            print_pass(form + title, counted)
    print(f"forward, for comparison: {2 * n + 2} read and written once each; {4 * n + 2} the paper's fused kernels;")
    print(f"    {8 * n + 2} unfused (Table 2, (5n+1) + (3n+1)). Backward: {3 * n + 3} read and written once each.")
    if not has_liger():
        print("Liger is not installed (pip install --no-deps liger-kernel): not counted")
        return
    print("Liger, the same boundary, phi in bf16; an atomic counts once (its Sinkhorn takes minutes to interpret):")
    for title, counted in zip(("forward", "backward"), liger_traffic(C, n, T), strict=True):
        print_pass("Liger " + title, counted)


def print_pass(title, counted):
    kernels = dict.fromkeys(kernel for kernel, _ in counted)
    rows = [(k, [counted.get((k, g), (0, 0)) for g in ("streams", "maps", "phi")]) for k in kernels]
    rows.append(("total", [total(counted, g) for g in ("streams", "maps", "phi")]))
    alone = {key: v for key, v in counted.items() if key[0] != "PyTorch operations"}
    if len(alone) < len(counted):
        rows.append(("total of the kernels alone", [total(alone, g) for g in ("streams", "maps", "phi")]))
    for name, cells in rows:
        print(f"{title + ' ' + name:44}" + "".join(f"{a:7.2f}{d:9.2f}" for a, d in cells))


# ----------------------------------------------------------------------------------------------------------------------
# Ahead-of-time compilation.

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # a program's limit
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def launches(C, n, T=4096, dtype=torch.bfloat16, maker="nvidia", form="middle", single_pass=False):
    """What a boundary launches: (kernel, arguments by name, options, grid), without launching."""
    import triton

    import sinkhorn_kernel as sk

    found, run, made_by = [], triton.JITFunction.run, sk.MAKER

    def record(kernel, *args, grid, warmup, **kwargs):
        named = dict(zip(kernel.arg_names, args, strict=False))
        named.update((k, v) for k, v in kwargs.items() if k in kernel.arg_names)
        found.append((kernel, named, {k: v for k, v in kwargs.items() if k not in named}, grid))

    triton.JITFunction.run, sk.MAKER = record, maker
    try:
        run_boundary(example(C, n, T, dtype, "meta", form), single_pass)
    finally:
        triton.JITFunction.run, sk.MAKER = run, made_by
    return found


def compile_ahead(kernel, named, options, target):
    """Compile as the launcher would for these arguments: divisibility by 16 known, token counts unknown."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = named[name]
        if value is None or kernel.params[i].is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if not kernel.params[i].do_not_specialize and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def tile_bits(ttgir, dtype):
    """The narrowest access of one thread to a tile of 16-bit streams, in bits, from the layouts the compiler chose;
    None where there are none, and for fp32 streams, which the layouts do not tell from mappings."""
    if dtype.itemsize != 2:
        return None
    element = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    widths = dict(re.findall(r"^#(\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", ttgir, re.M))
    used = re.findall(rf"(?:tt\.load|tt\.store|async_copy_global_to_local) .*?!tt\.ptr<{element}>, #(\w+)>", ttgir)
    return min((16 * int(widths[layout].split(",")[-1]) for layout in used), default=None)


def nvidia_resources(compiled):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    tensor_cores = r"mma\.sync|wgmma\.mma|tcgen05\.mma"
    return int(registers), int(stack) + int(local), compiled.asm["ptx"], tensor_cores, r"\b(atom|red)\."


def amd_resources(compiled):
    asm = compiled.asm["amdgcn"]
    registers, scratch = (int(re.search(rf"; {k}: (\d+)", asm)[1]) for k in ("TotalNumVgprs", "ScratchSize"))
    return registers, scratch, asm, "v_mfma", "atomic"


def compile_report(
    C=2560, n=4, targets=tuple(TARGETS), dtype=torch.bfloat16, form="middle", single_pass=False, only=None
):
    """One dict a kernel (of `only`, if given) and target: registers, spilled bytes a thread, shared memory, tensor-core
    instructions, atomics, bits of a tile access, and, for 4096 tokens, programs and (on an H100) how many of them run
    at once."""
    rows = []
    for target in targets:
        maker = "amd" if target.startswith("gfx") else "nvidia"
        for kernel, named, options, grid in launches(C, n, 4096, dtype, maker, form, single_pass):
            if only and kernel.__name__ not in only:
                continue
            compiled = compile_ahead(kernel, named, options, target)
            registers, spilled, asm, mma, atomic = (amd_resources if maker == "amd" else nvidia_resources)(compiled)
            threads, programs = 32 * options["num_warps"], int(np.prod(grid))
            resident = min(65536 // (threads * -(-registers // 8) * 8), 2048 // threads)
            resident = min(resident, SHARED_MEMORY["sm_90"] // (compiled.metadata.shared + 1024))
            row = {"kernel": kernel.__name__, "target": target, "registers": registers, "spilled": spilled}
            row |= {"shared": compiled.metadata.shared, "tensor": len(re.findall(mma, asm)), "programs": programs}
            row |= {"atomics": len(re.findall(atomic, asm)), "tile_bits": tile_bits(compiled.asm["ttgir"], dtype)}
            rows.append(row | {"in_flight": min(programs, 132 * resident) if target == "sm_90" else None})
    return rows


def print_compile(C=2560, n=4):
    print(f"compiled, not run: C = {C}, n = {n}, bf16 x; 4096 tokens on an H100 for the last two columns")
    columns = ("registers", "spilled", "shared", "tensor", "atomics", "tile_bits", "programs", "in_flight")
    print(f"{'kernel':26}{'target':8}" + "".join(f"{c:>10}" for c in columns))
    for row in compile_report(C, n):
        cells = "".join(f"{'' if row[c] is None else row[c]:>10}" for c in columns)
        print(f"{row['kernel']:26}{row['target']:8}{cells}")


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU.

UNITS = {"streams_kernel": 9, "read_kernel": 5, "read_backward_kernel": 5, "phi_backward_kernel": 4}
UNITS |= {"streams_backward_kernel": 15}


def need_gpu():
    if not torch.cuda.is_available():
        sys.exit("error: timing kernels needs a GPU and PyTorch sees none here; `traffic` and `kernels` need none")


def kernel_times(tensors, rounds=20):
    """{kernel of a boundary: ms a launch}, by torch's profiler."""
    run_boundary(tensors)  # compile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            run_boundary(tensors)
    return {e.key: e.device_time_total / e.count / 1e3 for e in profile.key_averages() if e.key in UNITS}


def print_gpu(C=2560, n=4, T=16384):
    """Times on a GPU: a copy; each kernel with the bandwidth of the streams it asks for; forward + backward by impl."""
    need_gpu()
    from triton.testing import do_bench

    import mhc_gpu
    import mhc_ref

    print(f"{torch.cuda.get_device_name()}: n = {n}, C = {C}, {T} tokens, bf16")
    tensors = example(C, n, T, device="cuda")
    x, unit = tensors[0], 2 * C * T
    target = torch.empty_like(x)
    copy_ms = do_bench(lambda: target.copy_(x))
    print(f"copy of x: {copy_ms:.3f} ms, {2 * n * unit / copy_ms / 1e6:.0f} GB/s")
    for kernel, ms in kernel_times(tensors).items():
        print(f"{kernel:26}{ms:8.3f} ms {UNITS[kernel] * unit / ms / 1e6:8.0f} GB/s of streams")
    leaves = [t.requires_grad_() for t in tensors]
    H_pre = one_hot(x)
    steps = {"triton": lambda *args: mhc_gpu.mhc_step(*args, None, None)}
    steps["triton, single-pass"] = lambda *args: mhc_gpu.mhc_step(*args, H_pre, None)
    steps |= {"twin": mhc_ref.mhc_step_ref, "twin compiled": torch.compile(mhc_ref.mhc_step_ref)}
    if has_liger():
        steps["Liger"] = liger_step
    for name, step in steps.items():
        outs = step(*leaves, 20, 1e-20)
        ones = [torch.ones_like(o) for o in outs]
        forward = do_bench(lambda step=step: step(*leaves, 20, 1e-20))
        both = do_bench(lambda step=step, ones=ones: torch.autograd.grad(step(*leaves, 20, 1e-20), leaves, ones))
        print(f"{name:20} forward {forward:8.3f} ms, forward + backward {both:8.3f} ms")


TUNED = ("streams", "read", "read_backward", "phi_backward", "streams_backward")  # the mappings are 1/400 of the bytes


def candidates(row):
    """Rows of sinkhorn_kernel.BLOCKS to try beside one: its tile halved, kept and doubled, 4 or 8 warps, 1-3 stages."""
    (BT, BC, *_), halves = row, (0.5, 1, 2)
    tiles = itertools.product([max(16, int(BT * f)) for f in halves], [max(16, int(BC * f)) for f in halves])
    return dict.fromkeys((*tile, *options) for tile in tiles for options in itertools.product((4, 8), (1, 2, 3)))


@contextlib.contextmanager
def rows_instead(chosen):
    """Rows for these kernels, {kernel: row}, in the place of the block table's. -> the table's own function."""
    import sinkhorn_kernel as sk

    given = sk.blocks

    def blocks(kernel, *args):
        if kernel not in chosen:
            return given(kernel, *args)
        BT, BC, warps, stages = chosen[kernel]
        return BT, BC, {"num_warps": warps, "num_stages": stages}

    sk.blocks = blocks
    try:
        yield given
    finally:
        sk.blocks = given


def rows_to_try(kernel, n, C):
    """The table's own row, and then the candidates beside it."""
    import sinkhorn_kernel as sk

    BT, BC, options = sk.blocks(kernel, n, C)
    now = (BT, BC, options["num_warps"], options["num_stages"])
    return list(dict.fromkeys([now, *candidates(now)]))


def retune(tensors, bench, spills=None, report=lambda kernel, times, dropped: None):
    """Try every candidate for every kernel of a boundary, one kernel after the other, the best so far in the others'
    place. -> {kernel: {row: ms of forward and backward}}, the table's row first. bench(function) -> ms.

    spills(kernel, row) -> bytes a thread, None where it cannot run: such rows, and those that spill, are not timed, but
    for the table's. report(kernel, times, how many were dropped) is called as soon as a kernel is done."""
    from triton.runtime.errors import OutOfResources

    (n, C), chosen, times = tensors[0].shape[-2:], {}, {}
    with rows_instead(chosen):
        for kernel in TUNED:
            now, *others = rows_to_try(kernel, n, C)
            kept = [row for row in others if spills is None or spills(kernel, row) == 0]
            times[kernel] = {}
            for row in (now, *kept):
                chosen[kernel] = row
                try:
                    times[kernel][row] = bench(lambda: run_boundary(tensors))
                except OutOfResources as e:
                    print(f"  {kernel} {row}: {e}")
            chosen[kernel] = min(times[kernel], key=times[kernel].get)
            report(kernel, times[kernel], len(others) - len(kept))
    return times


def compile_row(kernel, row, C, n, T):
    """Compile a kernel with a row of blocks for the GPU that is here, into Triton's cache. -> bytes a thread that
    spill; None if it wants more shared memory, or registers, than there is, or cannot be compiled, which is printed."""
    from triton.runtime.errors import OutOfResources

    import sinkhorn_kernel as sk

    with rows_instead({kernel: row}):
        found = [launch for launch in launches(C, n, T, maker=sk.MAKER) if launch[0].__name__ == f"{kernel}_kernel"]
    try:
        return 4 * max(spilled_words(*launch) for launch in found)
    except OutOfResources:
        return None
    except Exception as e:  # of the assembler, of the driver: one row less, and the others go on
        print(f"  {kernel} {row}: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
        return None


def spilled_words(kernel, named, options, grid):
    compiled = kernel.warmup(*(named[name] for name in kernel.arg_names), grid=grid, **options)
    compiled._init_handles()  # loads it: until then nobody knows
    return compiled.n_spills


def compile_ahead_of_tuning(pool, C, n, T):
    """Hand the candidates of all kernels to the pool's processes, in the order of the tuning. -> spills for `retune`,
    which waits for the one it asks for."""
    tasks = [(kernel, row) for kernel in TUNED for row in rows_to_try(kernel, n, C)[1:]]
    pending = {task: pool.submit(compile_row, *task, C, n, T) for task in tasks}

    def spills(kernel, row):
        try:
            return pending[kernel, row].result()
        except BrokenProcessPool as e:  # a compiler that crashes takes the pool with it
            print(f"  {kernel} {row}: {e}")

    return spills


def print_retune(C=2560, n=4, T=16384):
    """The fastest rows of the block table for this GPU, to be put into sinkhorn_kernel.py by hand."""
    need_gpu()
    from triton.testing import do_bench

    print(f"{torch.cuda.get_device_name()}: n = {n}, C = {C}, {T} tokens, bf16; ms of a boundary, forward and backward")
    pool = ProcessPoolExecutor(min(8, os.cpu_count()), mp_context=get_context("spawn"))  # a GPU does not survive a fork
    try:
        retune(example(C, n, T, device="cuda"), do_bench, compile_ahead_of_tuning(pool, C, n, T), print_tuned)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def print_tuned(kernel, times, dropped):
    now, best = next(iter(times)), min(times, key=times.get)
    print(f'"{kernel}": {best},  # {times[best]:.3f}; {now}, as it is: {times[now]:.3f}; {len(times)} tried, '
          f"{dropped} dropped")  # fmt: skip


def main(what="compile", *numbers):
    """Become a process that does `traffic` (in the interpreter), or `compile`, `gpu` or `retune` (without it)."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if what == "traffic" else {}
    command = [sys.executable, __file__, what, *map(str, numbers)]
    sys.stdout.flush()
    os.execve(sys.executable, command, {**env, "KERNEL_REPORT_CHILD": "1"})


if __name__ == "__main__":
    what, *numbers = sys.argv[1:] or ["help"]
    prints = {"traffic": print_traffic, "compile": print_compile, "gpu": print_gpu, "retune": print_retune}
    if what not in prints:
        sys.exit(__doc__)
    wanted = "C n" if what == "compile" else "C n tokens"
    if not all(n.isdecimal() and 0 < int(n) < 2**24 for n in numbers) or len(numbers) > len(wanted.split()):
        program.end(f"error: {' '.join(numbers)}: wanted whole numbers above 0: {wanted}", 2)
    if "KERNEL_REPORT_CHILD" not in os.environ:
        main(what, *numbers)
    program.run(lambda: prints[what](*map(int, numbers)))
