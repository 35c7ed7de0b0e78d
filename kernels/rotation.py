"""Random-sign Hadamard rotation of activations: ``y = x diag(signs) H`` along the last axis.

``x float[..., K], signs f32[K] -> float[..., K]``; H is block diagonal of order ``block``, or one
Kronecker product (``vdqc.base.hadamard``). On a CPU it is one or two small matmuls in the dtype of
x: entries of +1 and -1 are exact in every float format and block^-0.5 is multiplied in afterwards,
in float32. On a GPU a row (or a block, of a Kronecker product) is rotated in registers; orders that
no kernel takes run as the reference.

Error: bfloat16: one rounding of each partial result (relative 2^-9); float32 and float16 on a GPU:
values as two bfloat16 summands (2^-17), rounded once; else as ``vdqc::rotate``.
Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdqc.base import hadamard
from vdqc.kernels.base import define


def rotation(x: Tensor, signs: Tensor, block: int, inverse: bool) -> Tensor:
    """The truth: ``vdqc.base.hadamard.rotate``."""
    return hadamard.rotate(x, signs, block, inverse)


def _fake(x: Tensor, signs: Tensor, block: int, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def rotated(x: Tensor, signs: Tensor, left: Tensor | None, right: Tensor, inverse: bool) -> Tensor:
    """The rotation by ``left ⊗ right`` (matrices of +1 and -1 in the dtype of x, or None for 1)."""
    width, order = x.shape[-1], right.shape[0]
    value = x if inverse else x * signs.to(x.dtype)
    value = value.reshape(-1, order) @ (right.T if inverse else right)
    block = order
    if left is not None:
        outer = left.shape[0]
        block = order * outer
        value = (left if inverse else left.T) @ value.reshape(-1, outer, order)
    value = value.reshape(*x.shape[:-1], width).to(torch.promote_types(x.dtype, torch.float32))
    value = value * block**-0.5
    return (value * signs if inverse else value).to(x.dtype)


def _cuda(x: Tensor, signs: Tensor, block: int, inverse: bool) -> Tensor:
    from vdqc.kernels.gpu.quantize import rotate

    found = rotate(x, signs, block, inverse)
    return rotation(x, signs, block, inverse) if found is None else found


ROTATION = define("rotation", reference=rotation, fake=_fake, cuda=_cuda)
