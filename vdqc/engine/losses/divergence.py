"""Relations as distributions: the KL divergence between two, chunk by chunk of rows.

A relation row i is softmax_j(x_i · y_j / temperature). The divergence is KL(teacher || student),
natural logarithm, summed over j.

Error: chunked equals dense up to the order of summation; half precision is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vdqc.engine.losses.reduction import Reduction, divisor, widened

#: Floats of one relation that exist at a time.
CHUNK = 1 << 22


def kl(teacher: Tensor, student: Tensor, reduction: Reduction) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over the last axis of two tensors of logits."""
    return _kl_sum(teacher, student) / divisor(student.shape, reduction)


def relation_kl(
    fp: tuple[Tensor, Tensor],
    q: tuple[Tensor, Tensor],
    temperature: float,
    reduction: Reduction,
    chunk: int = CHUNK,
) -> Tensor:
    """KL between the relations of x [B, P, C] to y [B, R, C], teacher ``fp``, student ``q``.

    No more than ``chunk`` floats of a relation exist at a time (one row at least).
    """
    batch, count = q[0].shape[:2]
    others = q[1].shape[1]
    rows = max(1, chunk // max(1, batch * others))
    loss = q[0].new_zeros(())
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        loss = loss + checkpoint(
            _chunk_kl,
            *(fp[0][:, part], fp[1], q[0][:, part], q[1], temperature),
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return loss / divisor((batch, count, others), reduction)


def _chunk_kl(fp_x: Tensor, fp_y: Tensor, x: Tensor, y: Tensor, temperature: float) -> Tensor:
    with torch.no_grad():
        teacher = fp_x @ fp_y.transpose(-1, -2) / temperature
    return _kl_sum(teacher, x @ y.transpose(-1, -2) / temperature)


def _kl_sum(teacher: Tensor, student: Tensor) -> Tensor:
    target = widened(teacher.detach()).log_softmax(-1)
    return F.kl_div(widened(student).log_softmax(-1), target, reduction="sum", log_target=True)


def unit(value: Tensor) -> Tensor:
    """Rows of length one along the last axis; a zero row stays zero."""
    return F.normalize(widened(value), dim=-1, eps=1e-12)
