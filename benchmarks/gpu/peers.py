"""What we are measured against; each is built on the same data and may fail softly.

In the image: cuBLAS bf16, ``torch._int_mm`` with an eager epilogue, ``torch._scaled_mm`` (fp8, one
scale per row, fast accumulation), cuDNN and FlashAttention-2 through SDPA, FlexAttention with the
same mask, what torch.compile makes of our references. As wheels: gemlite, humming-kernels,
sageattention, torchao; the linears of these take bf16 and quantise it themselves, so they stand
beside ours with its quantiser (variant ``with quantiser``).

A builder returns the call that is timed, or raises: the reason is kept with the results.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.env import SkipError
from benchmarks.gpu.names import AUTO
from vdqc.base.block_mask import BlockMask

Call = Callable[[], Any]


@final
@dataclass(frozen=True)
class Peer:
    """One peer of a case.

    Attributes:
        build: makes the call; raises if it cannot.
        against: our variant that does the same work.
        bold: may hang or crash the process (compilers, wheels); left out when a case is retried.
        costly: takes long to compile or to tune; only beside the most telling cases.
    """

    build: Callable[[], Call]
    against: str = AUTO
    bold: bool = False
    costly: bool = False


# matrix multiplies --------------------------------------------------------------------------------


def cublas_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    """``x bf16[M, K], weight bf16[N, K]``."""
    return lambda: functional.linear(x, weight, bias)


def int_mm_eager(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Call:
    """cuBLAS int8 sums, then scale and bias as torch runs them."""

    def call() -> Tensor:
        total = torch._int_mm(codes, weight.T)
        value = total.float() * scale * weight_scale
        return (value if bias is None else value + bias).bfloat16()

    return call


def scaled_mm(x: Tensor, weight: Tensor) -> Call:
    """fp8 e4m3, one scale per row of x and per column of the result; x is quantised beforehand.

    Accumulates as ours does (``kernels/gpu/gemm.py``): slower sums would flatter us.
    """
    rows, columns = _fp8(x), _fp8(weight)
    scale = columns[1].T.contiguous()

    def call() -> Any:
        return torch._scaled_mm(
            rows[0],
            columns[0].T,
            scale_a=rows[1],
            scale_b=scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return call


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def gemlite(x: Tensor, weight: Tensor, bits: int) -> Call:
    """A8W8 per channel, or A8W4 in groups of 128."""
    helper = _wheel("gemlite.helper")
    linear = _linear(weight)
    if bits == 8:
        made = helper.A8W8_int8_dynamic(device="cuda:0", dtype=torch.bfloat16)
        layer = made.from_linear(linear)
        return lambda: layer(x)
    if bits != 4:
        raise SkipError(f"gemlite has no A8W{bits}")
    made = helper.A8W4_HQQ_INT_dynamic(device="cuda:0", dtype=torch.bfloat16)
    groups = weight.shape[1] // 128
    codes = torch.randint(0, 16, weight.shape, device="cuda", dtype=torch.uint8)
    scales = torch.full((weight.shape[0] * groups, 1), 0.01, device="cuda", dtype=torch.bfloat16)
    layer = made.from_weights(codes, scales, torch.full_like(scales, 8), 4, 128, None)
    return lambda: layer(x)


def humming(x: Tensor, weight: Tensor, bits: int) -> Call:
    """W2 ... W8 A8, one scale per channel."""
    made = _wheel("humming.layer").HummingLayer(
        shape_n=weight.shape[0],
        shape_k=weight.shape[1],
        weight_config={"dtype": f"int{bits}"},
        input_config={"dtype": "int8"},
        torch_dtype=torch.bfloat16,
    )
    layer = made.cuda()
    layer.load_from_unquantized(weight)
    layer.transform()
    return lambda: layer(x)


def torchao(x: Tensor, weight: Tensor) -> Call:
    """Dynamic int8, compiled."""
    quantization = _wheel("torchao.quantization")
    model = nn.Sequential(_linear(weight))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model)
    return lambda: compiled(x)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def _wheel(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a wheel for another torch fails in its own ways
        raise SkipError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


# attention ----------------------------------------------------------------------------------------


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Call:
    """Dense attention, cuDNN."""
    return _sdpa("CUDNN_ATTENTION", query, key, value)


def flash2(query: Tensor, key: Tensor, value: Tensor) -> Call:
    """Dense attention, FlashAttention-2 in torch."""
    return _sdpa("FLASH_ATTENTION", query, key, value)


def _sdpa(backend: str, query: Tensor, key: Tensor, value: Tensor) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend) if query.is_cuda else SDPBackend.MATH

    def call() -> Tensor:
        with sdpa_kernel(chosen):
            return functional.scaled_dot_product_attention(query, key, value)

    return call


def flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Call:
    """FlexAttention over the same blocks, all of them full; sizes are whole blocks."""
    from torch.nn.attention import flex_attention as flexible

    if mask.queries % mask.block_q or mask.keys % mask.block_k:
        raise SkipError("ragged blocks would need a mask function")
    kept = mask.kept()
    counts = kept.sum(-1, dtype=torch.int32)
    order = torch.sort(kept.logical_not().to(torch.uint8), dim=-1, stable=True).indices
    none = torch.zeros_like(counts)
    blocks = flexible.BlockMask.from_kv_blocks(
        none,
        order.to(torch.int32),
        counts,
        order.to(torch.int32),
        BLOCK_SIZE=(mask.block_q, mask.block_k),
        seq_lengths=(mask.queries, mask.keys),
    )
    run = (
        torch.compile(flexible.flex_attention, dynamic=False)
        if query.is_cuda
        else flexible.flex_attention
    )
    return lambda: run(query, key, value, block_mask=blocks)


def sageattention(query: Tensor, key: Tensor, value: Tensor) -> Call:
    """Dense attention, int8 scores, SageAttention 1."""
    attend = _wheel("sageattention").sageattn
    return lambda: attend(query, key, value, tensor_layout="HND", smooth_k=True)


# anything -----------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Call]:
    """What torch.compile makes of a reference."""

    def build() -> Call:
        fast = torch.compile(function, dynamic=False)
        return lambda: fast(*args)

    return build


def eager(function: Callable[..., Any], *args: Any) -> Callable[[], Call]:
    """A reference as torch runs it."""
    return lambda: lambda: function(*args)
