"""Attention as libraries write it out becomes the one op: diffusers' first, transformers' eager."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vdqc.engine.pass_manager import Context, PassManager
from vdqc.ir.frontend import capture
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind
from vdqc.passes.canonicalize import Canonicalize


def first_processor() -> tuple[nn.Module, list[Sample]]:
    """A DiT with the attention that diffusers had before torch had one."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8
    )
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    calls = [
        {
            "hidden_states": torch.randn(batch, 4, 8, 8),
            "timestep": torch.full((batch,), 5),
            "class_labels": torch.zeros(batch, dtype=torch.long),
        }
        for batch in (2, 3)
    ]
    return model, [Sample(call) for call in calls]


def eager_bert() -> tuple[nn.Module, list[Sample]]:
    """transformers' eager attention, with a mask that is added."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    calls = [
        {
            "input_ids": torch.randint(0, 99, (batch, length)),
            "attention_mask": torch.arange(length).expand(batch, -1) < length - 2,
        }
        for batch, length in ((2, 12), (3, 20))
    ]
    model = BertModel(config, add_pooling_layer=False)
    return model, [Sample({k: v.long() for k, v in call.items()}) for call in calls]


@pytest.mark.parametrize("build", [first_processor, eager_bert])
def test_attention_of_libraries(build: Callable[[], tuple[nn.Module, list[Sample]]]) -> None:
    torch.manual_seed(0)
    model, samples = build()
    graph = capture(model.eval(), samples)
    before = graph.clone()
    PassManager([Canonicalize()]).run(graph, Context(samples))
    assert len(graph.sites(kind=SiteKind.ATTENTION)) == 2
    (value, *_), (wanted, *_) = (g.run(**samples[1].inputs) for g in (graph, before))
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
