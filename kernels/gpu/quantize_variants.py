"""The activation quantisers that are compiled offline: widths of the models, and what differs.

Error: none.
Source: widths of Wan 2.1, HunyuanVideo and CogVideoX; ``reference/kernels.md``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vdqc.base import hadamard
from vdqc.kernels.gpu.operands import Form
from vdqc.kernels.gpu.quantize import _static
from vdqc.kernels.gpu.quantize_line import _line, line_tile
from vdqc.kernels.gpu.quantize_row import _row, row_tile
from vdqc.kernels.gpu.quantize_steps import _steps, step_tile
from vdqc.kernels.gpu.variants import Variant

#: adaLN before a linear; the same behind a gated residual; the inside of an MLP.
_ADALN = {"norm": "layer", "scale": "*fp32", "shift": "*fp32"}
_RESIDUAL = {**_ADALN, "y": "*bf16", "gate": "*fp32", "streamed": "*bf16"}
_GELU = {"activation": "gelu_tanh", "smooth": "*fp32"}
#: Behind a rotation: a scale of its channels, and a clipped range.
_BEHIND = {**_ADALN, "post": "*fp32", "clip": "*fp32"}
_INT8, _INT4 = Form(127), Form(0, 4, asymmetric=True, packed=True)


def _variant(
    name: str, fn: Any, types: Mapping[str, str], values: Mapping[str, Any], tile: dict[str, int]
) -> Variant:
    """Arguments that neither has are None."""
    options = {key: value for key, value in tile.items() if key not in fn.arg_names}
    known: dict[str, Any] = dict.fromkeys(fn.arg_names) | dict(values) | tile
    known = {key: value for key, value in known.items() if key not in options}
    constexprs = {key: value for key, value in known.items() if key not in types}
    aligned = tuple(key for key in types if key in ("width", "part") or key.endswith("_stride"))
    return Variant(
        name, fn, types, constexprs, {**options, "enable_fp_fusion": False}, aligned=aligned
    )


def _types(form: Form, steps: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """(types, values) of what both kernels take."""
    types = {
        "x": "*bf16",
        "codes": "*u8" if form.packed else "*i8",
        "scales": "*fp32",
        "sums": "*i32",
        "rows": "i32",
        "width": "i32",
        "part": "i32",
        "eps": "fp32",
        "root": "fp32",
    }
    types |= {key: kind for key, kind in steps.items() if kind.startswith("*")}
    values: dict[str, Any] = {
        "NORM": steps.get("norm", "none"),
        "ACTIVATION": steps.get("activation", "none"),
        "QMAX": form.qmax,
        "BITS": form.bits,
        "PACKED": form.packed,
        "TERMS": 1,
    }
    if form.asymmetric:
        types["zeros"] = "*i32"
    for operand in ("gate", "scale", "shift"):
        if operand in types:
            types |= {f"{operand}_every": "i32", f"{operand}_stride": "i32"}
        else:
            values |= {f"{operand}_every": 1, f"{operand}_stride": 0}
    return types, values


def _by_line(name: str, width: int, form: Form, steps: Mapping[str, str]) -> Variant:
    types, values = _types(form, steps)
    del types["root"], values["TERMS"]
    tile = line_tile(width, form.packed)
    return _variant(f"quantize_line/{width}-{name}", _line, types, values, tile)


def _by_row(name: str, width: int, form: Form, steps: Mapping[str, str], block: int) -> Variant:
    types, values = _types(form, steps)
    values |= {"sign_rows": 1, "SIGNS_LAST": False}
    pair = hadamard.factors(block)
    assert pair is not None
    types |= {"signs": "*fp32", "right": "*bf16"}
    if pair[0] > 1:
        types["left"] = "*bf16"
    tile = row_tile(width, block, form.packed)
    return _variant(f"quantize_row/{width}-{name}", _row, types, values, tile)


def _by_steps(
    name: str, width: int, form: Form, steps: Mapping[str, str], block: int = 0, rank: int = 0
) -> Variant:
    types, values = _types(form, steps)
    values |= {"rank": 0, "R": 16}
    if block:
        types |= {"signs": "*fp32", "right": "*bf16"}
    if rank:
        types |= {"down": "*bf16", "low": "*bf16", "rank": "i32"}
        del values["rank"]
        values["R"] = max(16, rank)
    tile = step_tile(width, block, rank, form.packed)
    return _variant(f"quantize_steps/{width}-{name}", _steps, types, values, tile)


VARIANTS = [
    *(_by_line("adaln", width, _INT8, _ADALN) for width in (1536, 3072, 5120)),
    *(_by_line("residual", width, _INT8, _RESIDUAL) for width in (3072, 5120)),
    *(_by_line("gelu", width, _INT8, _GELU) for width in (12288, 13824)),
    *(_by_line("packed", width, _INT4, _ADALN) for width in (3072, 5120)),
    _by_line("packed", 12288, _INT4, _GELU),
    *(_by_row("h128", width, _INT8, _ADALN, 128) for width in (1536, 3072, 5120)),
    _by_row("h128", 12288, _INT8, _GELU, 128),
    _by_row("h128-scaled", 5120, _INT8, _BEHIND, 128),
    _by_row("kronecker-scaled", 5120, replace(_INT8, qmax=7), _BEHIND, 5120),
    _by_row("packed-h128", 3072, _INT4, _ADALN, 128),
    *(_by_row("kronecker", width, _INT8, _ADALN, width) for width in (3072, 5120)),
    # Triton 3.6 spills 16 values on sm89
    replace(
        _by_row("kronecker", 13824, _INT8, _GELU, 13824), archs=("sm80", "sm90", "sm100", "sm120")
    ),
    _by_steps("rank32", 3072, _INT8, _ADALN, 0, 32),
    _by_steps("rank32", 12288, _INT8, _GELU, 0, 32),
    _by_steps("rank32-h128", 3072, _INT8, _RESIDUAL, 128, 32),
    _by_steps("rank32-h128-scaled", 3072, _INT8, {**_RESIDUAL, **_BEHIND}, 128, 32),
    _by_steps("packed-rank32-h128", 12288, _INT4, _GELU, 128, 32),
    _by_steps("long", 27648, _INT8, _GELU),
    _variant(
        "quantize_static/rows",
        _static,
        {
            "x": "*bf16",
            "codes": "*i8",
            "scale": "*fp32",
            "zero": "*i32",
            "width": "i32",
            "chunks": "i32",
            "qmin": "i32",
            "qmax": "i32",
        },
        {"per_row": 1, "BLOCK": 4096},
        {"num_warps": 4, "num_stages": 2},
    ),
]
