"""The residual mappings of mHC: `sinkhorn`, `mhc_coeffs`, `mhc_pre`, `mhc_post_res`, and `mhc_step` that joins them.

For now every function is its plain PyTorch twin (mhc_ref.py); the fused kernels come in here, behind `impl`.
"""

from mhc_ref import (
    mhc_coeffs_ref,
    mhc_post_res_ref,
    mhc_pre_ref,
    mhc_step_ref,
    sinkhorn_ref,
)

sinkhorn, mhc_coeffs, mhc_pre, mhc_post_res = sinkhorn_ref, mhc_coeffs_ref, mhc_pre_ref, mhc_post_res_ref


def mhc_step(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters=20, eps=1e-20, impl="auto"):
    """The boundary between two sublayers; see mhc_ref.mhc_step_ref. impl: 'auto' and 'ref' are the twin."""
    if impl not in ("auto", "ref"):
        raise ValueError(f"impl={impl!r}: wanted 'auto' or 'ref'")
    return mhc_step_ref(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters, eps)
