"""A tiny Wan: whether a model computes what is expected of it, and a pipeline around one."""

from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]


def same(model: Any, expected: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(**WAN.inputs(seed=5)).sample, expected)


def wan_pipeline(**experts: Any) -> WanPipeline:
    """A Wan pipeline without text encoder and decoder; two experts divide the steps."""
    scheduler = UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True)
    ratio = 0.8 if "transformer_2" in experts else None
    pipe = WanPipeline(None, None, None, scheduler, **experts, boundary_ratio=ratio)
    pipe.set_progress_bar_config(disable=True)
    return pipe
