"""The variants that ``benchmarks/cpu.py`` times: a Wan-architecture DiT, built in one process each.

Rows: fp32 eager with oneDNN linears; bf16 eager; bf16 torch.compile; bf16 with our attention and
prepacked linears, eager and compiled (the strong line); torchao int8 dynamic, fp32, compiled (needs
torchao: ``--torchao-python`` names an interpreter that has it); ours W8A8 and W4A8-g64, and with
attention over a share of the blocks: ``w8a8-d25`` computes 25 % of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Forward = Callable[[], Any]


def build(variant: str, options: argparse.Namespace) -> tuple[Forward, int]:
    """(one forward, bytes of weights in memory)."""
    import torch

    from benchmarks import cases

    dtype = torch.float32 if variant in ("fp32-onednn", "torchao-int8") else torch.bfloat16
    call = cases.wan_call(options.tokens, options.text, dtype)
    model = cases.wan(options.layers, dtype)
    if variant.startswith(("w8", "w4")):
        return compressed(model, call, variant, options)
    if variant == "bf16-strong":
        return strong(model, call)
    weight_bytes = tensor_bytes(model)
    if variant == "torchao-int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model.blocks, Int8DynamicActivationInt8WeightConfig())
        weight_bytes = tensor_bytes(model)
    if variant in ("fp32-onednn", "bf16-strong-eager"):
        prepack_linears(model)
    if variant == "bf16-strong-eager":
        use_our_attention()
    if variant in ("bf16-compile", "torchao-int8"):
        model.compile()
    return lambda: model(**call, return_dict=False)[0], weight_bytes


def split_density(variant: str) -> tuple[str, float]:
    """``w8a8-d25`` is (w8a8, 0.25); without a density 1."""
    scheme, found, percent = variant.rpartition("-d")
    return (scheme, int(percent) / 100) if found and percent.isdigit() else (variant, 1.0)


def compressed(
    model: Any, call: dict[str, Any], scheme: str, options: argparse.Namespace
) -> tuple[Forward, int]:
    """The lowered program, prepared and compiled block by block."""
    import torch

    from benchmarks import cases
    from vdqc.base.diagnostics import Diagnostics
    from vdqc.base.target import TARGETS
    from vdqc.compiler import complete
    from vdqc.engine.pass_manager import Context, PassManager
    from vdqc.engine.recipe import Recipe
    from vdqc.ir.frontend import capture
    from vdqc.ir.sample import Sample
    from vdqc.lowering.lower import lower
    from vdqc.lowering.prepare import compile_blocks, prepare
    from vdqc.passes.table import PASSES

    scheme, density = split_density(scheme)
    passes = options.passes + (f",sparsify{{density={density}}}" if density < 1 else "")
    text = "condition_embedder.text_embedder.linear_"
    schemes = [scheme, *(f"{text}{index}={scheme}" for index in (1, 2))]
    recipe = complete(Recipe.parse(passes, PASSES, schemes))
    # masks are planned for the call that is timed
    samples = [Sample(call, timestep=500.0)] if density < 1 else []
    samples += cases.wan_samples(torch.bfloat16)
    graph = capture(model, samples)
    context = Context(samples, TARGETS["cpu"], rules=recipe.rules)
    PassManager(recipe.passes, probe=False).run(graph, context)
    lower(graph, context.target, Diagnostics())
    inputs = graph.signature.bind((), call)
    program = prepare(graph.module, context.target)
    weight_bytes = tensor_bytes(program)
    for name, parameter in list(model.named_parameters()):
        parameter.data = torch.empty(0) if is_replaced(graph, name) else parameter.data
    compile_blocks(program)
    return lambda: program(*inputs)[0], weight_bytes


def is_replaced(graph: Any, name: str) -> bool:
    """True if the program no longer reads this weight of the model."""
    return name not in graph.param_names()


def strong(model: Any, call: dict[str, Any]) -> tuple[Forward, int]:
    """The float program with our attention and prepacked linears, compiled block by block."""
    import torch

    from benchmarks import cases
    from vdqc.base.diagnostics import Diagnostics
    from vdqc.base.target import TARGETS
    from vdqc.compiler import complete
    from vdqc.engine.pass_manager import Context, PassManager
    from vdqc.engine.recipe import Recipe
    from vdqc.ir.frontend import capture
    from vdqc.lowering.lower import lower
    from vdqc.lowering.prepare import compile_blocks, prepare
    from vdqc.passes.table import PASSES

    samples = cases.wan_samples(torch.bfloat16)
    graph = capture(model, samples)
    recipe = complete(Recipe.parse("annotate", PASSES, ["none"]))
    PassManager(recipe.passes, probe=False).run(graph, Context(samples, rules=recipe.rules))
    lower(graph, TARGETS["cpu"], Diagnostics())
    weight_bytes = tensor_bytes(graph.module)
    linear = prepacked_op()
    for node in graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            matrix: Any = node.args[1]
            weight = graph.evaluate(matrix)
            packed = linear.pack(weight)
            handle = graph.set_param(f"{matrix.target}_handle", torch.tensor(packed))
            node.args = (node.args[0], handle, *node.args[2:])
            node.target = linear.op(weight.shape[0])
    graph.module.recompile()
    inputs = graph.signature.bind((), call)
    program = compile_blocks(prepare(graph.module, TARGETS["cpu"]))
    return lambda: program(*inputs)[0], weight_bytes


class prepacked_op:
    """A linear whose weight oneDNN has reordered: untraceable, so named by a handle."""

    def __init__(self) -> None:
        import torch
        from torch import Tensor

        self.weights: list[Any] = []

        def prepacked_linear(x: Tensor, handle: Tensor, bias: Tensor | None, n: int) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weights[int(handle)], bias, "none", [], ""
            )

        prepacked_linear.__annotations__ = {
            "x": Tensor,
            "handle": Tensor,
            "bias": Tensor | None,
            "n": int,
            "return": Tensor,
        }
        custom = torch.library.custom_op("vdqc_bench::linear", prepacked_linear, mutates_args=())
        custom.register_fake(lambda x, handle, bias, n: x.new_empty([*x.shape[:-1], n]))

    def pack(self, weight: Any) -> int:
        import torch

        self.weights.append(torch.ops.mkldnn._reorder_linear_weight(weight, None))
        return len(self.weights) - 1

    def op(self, n: int) -> Callable[..., Any]:
        return globals().setdefault(f"linear_{n}", _bound(n))


def _bound(n: int) -> Callable[..., Any]:
    import torch

    def linear(x: Any, handle: Any, bias: Any = None) -> Any:
        return torch.ops.vdqc_bench.linear(x, handle, bias, n)

    linear.__name__ = linear.__qualname__ = f"linear_{n}"
    return linear


def prepack_linears(model: Any) -> None:
    """Every linear runs in oneDNN on a weight that was reordered once."""
    import torch

    def forward(linear: Any) -> Callable[..., Any]:
        bias = linear.bias
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        linear.weight = torch.nn.Parameter(linear.weight.detach()[:0], requires_grad=False)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    linears: list[Any] = [x for x in model.modules() if isinstance(x, torch.nn.Linear)]
    for linear in linears:
        linear.forward = forward(linear)


def use_our_attention() -> None:
    """Replace torch's attention by ours for the whole process."""
    from types import SimpleNamespace

    import torch

    from vdqc.kernels import attention
    from vdqc.kernels.attention import ATTENTION

    kernel: Any = attention
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    kernel.functional = SimpleNamespace(scaled_dot_product_attention=original)

    def ours(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
        return ATTENTION.op(query, key, value, attn_mask, query.shape[-1] ** -0.5)

    functional.scaled_dot_product_attention = ours


def tensor_bytes(module: Any) -> int:
    """Bytes of the distinct weights that ``module`` holds."""
    tensors = [*module.parameters(), *module.buffers()]
    total = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        inner = getattr(tensor, "tensor_data_names", None)  # a torchao subclass
        if inner is None and hasattr(tensor, "__tensor_flatten__"):
            inner = tensor.__tensor_flatten__()[0]
        total += sum(getattr(tensor, name).nbytes for name in inner) if inner else tensor.nbytes
    return total
