"""What a call leaves allocated: Inductor's CUDA graphs refuse all but the results."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdqc.base import hadamard, video_mask
from vdqc.kernels.fused_quantize import FUSED_QUANTIZE, RESIDUAL_QUANTIZE
from vdqc.kernels.rotation import ROTATION
from vdqc.kernels.video_mask import VIDEO_MASK


class Watch(TorchDispatchMode):
    """Notes what is allocated in this thread, as the pool of a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, weakref.ref[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages([args, kwargs])}
        for storage in storages(results):
            if storage._cdata not in given:  # it is no view
                self.made.append((str(func), weakref.ref(storage)))
        return results


def storages(values: Any) -> list[torch.UntypedStorage]:
    leaves = tree_leaves(values)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def outlives(call: Callable[[], object]) -> set[str]:
    """Torch ops whose results outlive the call and its results."""
    with Watch() as watch:
        found = call()
    assert watch.made
    del found
    gc.collect()
    return {name for name, storage in watch.made if storage() is not None}


ROTATED = {
    "rotation": (ROTATION, 128, []),
    "product": (ROTATION, 384, []),
    "wide": (ROTATION, 256, []),
    "quantise": (FUSED_QUANTIZE, 128, []),
    "quantise-product": (FUSED_QUANTIZE, 384, []),
    "stream": (RESIDUAL_QUANTIZE, 64, [True]),
}


@pytest.mark.parametrize("name", ROTATED)
def test_a_rotation_leaves_nothing_in_its_thread(name: str, device: str) -> None:
    """Not at its first call either: matrices are kept, but allocated elsewhere."""
    kernel, block, residual = ROTATED[name]
    width = 768
    x, signs = torch.randn(2, 2, width, device=device), torch.ones(width, device=device)
    args = [x, signs, block, False]
    if kernel is not ROTATION:
        more = [torch.randn_like(x), None] if residual else []
        steps = ["none", None, None, 1e-6, None, None, "none", None]
        args = [x, *more, *steps, signs, block, None, 8, False]
    assert kernel.cuda is not None
    hadamard.matrix_on.cache_clear()
    for order in hadamard.factors(block) or ():
        hadamard.hadamard(order)  # on the CPU, where no graph has a pool
    assert not outlives(lambda: kernel.cuda(*args))


def test_masks_are_kept_after_a_first_call_so_graphs_leave_the_op_out(device: str) -> None:
    q = torch.randn(1, 2, 6 * 64, 16, device=device)
    layout, policy = [6, 64, 0, 0, 8], "svg{density=0.7,block=32}"
    assert VIDEO_MASK.cuda is not None
    video_mask._static.cache_clear()
    kept = [
        outlives(lambda: VIDEO_MASK.cuda(q, q, q, None, None, layout, policy, 0.25))
        for _ in range(2)
    ]
    assert kept[0]
    assert not kept[1]
    assert torch.Tag.cudagraph_unsafe in VIDEO_MASK.op.tags
    assert torch.Tag.cudagraph_unsafe not in ROTATION.op.tags
