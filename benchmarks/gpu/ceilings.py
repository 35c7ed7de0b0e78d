"""The most that this machine gives, measured in the same run: what fractions are taken of.

============== ==================================================================================
copy_gbs       device-to-device copy of 4 GB, bytes read and written
bf16_tflops    cuBLAS, random data (zeros run faster)
int8_tops      ``torch._int_mm``
fp8_tflops     ``torch._scaled_mm``, per-row scales, fast accumulation
dense64,       cuDNN attention without a mask at heads of 64 and 128
dense128
============== ==================================================================================

The tensor cores multiply int8 as fast as fp8, and cuBLAS's int8 may be a kernel of an older GPU:
the ceiling of integer GEMMs is the greater of the two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu import peers
from benchmarks.gpu.env import Env, SkipError
from benchmarks.gpu.timing import median_ms

M, N, K = 32768, 8192, 8192


def measure(env: Env) -> dict[str, float]:
    """All ceilings; one that cannot be measured is missing. Ones in a dry run."""
    found: dict[str, float] = {}
    for name, one in _CEILINGS.items():
        if env.dry:
            found[name] = 1.0
            continue
        try:
            found[name] = one(env)
        except (SkipError, RuntimeError, NotImplementedError) as error:
            print(f"ceiling {name}: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.empty_cache()
    return found


def of(env: Env, kind: str) -> float | None:
    """The ceiling of work of ``kind``: ``copy`` in GB/s, else in T(FL)OP/s; None if unknown."""
    names = {
        "copy": ("copy_gbs",),
        "int8": ("int8_tops", "fp8_tflops"),
        "fp8": ("fp8_tflops",),
        "bf16": ("bf16_tflops",),
        "dense64": ("dense64",),
        "dense128": ("dense128",),
    }[kind]
    known = [env.ceilings[name] for name in names if name in env.ceilings]
    return max(known) if known else None


def _copy(env: Env) -> float:
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device=env.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) * 1e-6


def _rate(call: Callable[[], object], operations: float) -> float:
    return operations / median_ms(call) * 1e-9


def _bf16(env: Env) -> float:
    return _rate(peers.cublas_bf16(env.normal(M, K), env.normal(N, K)), 2.0 * M * N * K)


def _int8(env: Env) -> float:
    codes, weight = env.codes(M, K), env.codes(N, K)
    return _rate(lambda: torch._int_mm(codes, weight.T), 2.0 * M * N * K)


def _fp8(env: Env) -> float:
    call = peers.scaled_mm(env.normal(M, K), env.normal(N, K))
    return _rate(call, 2.0 * M * N * K)


def _dense(heads: int, width: int) -> Callable[[Env], float]:
    def measured(env: Env) -> float:
        q, k, v = (env.normal(1, heads, 32768, width) for _ in range(3))
        return _rate(peers.cudnn(q, k, v), 4.0 * heads * 32768**2 * width)

    return measured


_CEILINGS: dict[str, Callable[[Env], float]] = {
    "copy_gbs": _copy,
    "bf16_tflops": _bf16,
    "int8_tops": _int8,
    "fp8_tflops": _fp8,
    "dense128": _dense(8, 128),
    "dense64": _dense(16, 64),
}
