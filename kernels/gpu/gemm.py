"""Integer GEMM on Triton (in the making)."""

from vdqc.kernels.gpu.variants import Variant

VARIANTS: list[Variant] = []
