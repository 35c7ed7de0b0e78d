"""What the operands of block-sparse attention must be; their table is in ``sparse_attention``.

Error: InputError for operands that do not belong together; values are not looked at, so nothing
waits for the device.
Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdqc.base.block_mask import blocks
from vdqc.base.diagnostics import InputError


def check_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    block_q: int,
    block_k: int,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    key_length: Tensor | None,
) -> None:
    """Refuse operands that do not belong together; looks at shapes and dtypes only."""
    batch, heads, queries, width = query.shape
    rows = blocks(queries, block_q)
    out = [batch, heads, queries, value.shape[-1]]
    want = [
        ("key", key, [batch, heads, key.shape[2], width], {query.dtype}),
        ("value", value, [batch, heads, key.shape[2], value.shape[3]], None),
        ("counts", counts, list(starts.shape), {torch.int32}),
        ("ids", ids, [ids.numel()], {torch.int32}),
    ]
    if residual is not None:
        want.append(("residual", residual, out, None))
        if (residual.dtype == torch.int8) != (residual_scale is not None):
            raise InputError("an int8 residual needs a residual_scale, a float one must have none")
    if residual_scale is not None:
        want.append(("residual_scale", residual_scale, [*out[:3], 1], {torch.float32}))
    if key_length is not None:
        want.append(("key_length", key_length, [batch], {torch.int32}))
    for name, tensor, shape, dtypes in want:
        if list(tensor.shape) != shape:
            raise InputError(f"{name}: expected {shape}, got {list(tensor.shape)}")
        if dtypes is not None and tensor.dtype not in dtypes:
            raise InputError(f"{name}: expected {next(iter(dtypes))}, got {tensor.dtype}")
    fits = (
        len(starts.shape) == 3 and starts.shape[0] in (1, batch) and starts.shape[1] in (1, heads)
    )
    if not fits or starts.shape[2] != rows or starts.dtype != torch.int32:
        raise InputError(
            f"starts: expected int32 [{batch} or 1, {heads} or 1, {rows}] for {queries} queries in "
            f"blocks of {block_q}, got {starts.dtype} {list(starts.shape)}"
        )


def check_scales(q_codes: Tensor, q_scale: Tensor, k_codes: Tensor, k_scale: Tensor) -> None:
    """Refuse scales that are not one float32 a token of their codes."""
    for name, codes, scale in (("q_scale", q_codes, q_scale), ("k_scale", k_codes, k_scale)):
        shape = [*codes.shape[:-1], 1]
        if list(scale.shape) != shape or scale.dtype != torch.float32:
            raise InputError(
                f"{name}: expected float32 {shape}, got {scale.dtype} {list(scale.shape)}"
            )
