"""Run by test_absent.py in a process of its own: kernels there are decorated for a compiler.

python launches.py all                every kind of launch, on every generation, bound only
python launches.py fit SM            weights in many planes, compiled for SM: bytes of shared memory
python launches.py store FOLDER       one kernel compiled for sm90, kept in FOLDER
python launches.py wide               kernels of the widest rotations where memory is short
python launches.py lanes              layouts of packed weights times a factor on sm100
python launches.py serve FOLDER       the same launch, from FOLDER; prints what Triton did
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from vdqc.kernels.fused_quantize import FUSED_QUANTIZE, FUSED_QUANTIZE_ASYM, RESIDUAL_QUANTIZE
from vdqc.kernels.gpu.absent import absent
from vdqc.kernels.gpu.offline import compiled
from vdqc.kernels.gpu.runtime import ARCHS
from vdqc.kernels.gpu.stored import keep, offer
from vdqc.kernels.gpu.variants import collect
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS, QUANTIZE_ROWS_ASYM, QUANTIZE_STATIC
from vdqc.kernels.rope_quantize import ROPE, ROPE_QUANTIZE
from vdqc.kernels.rotation import ROTATION
from vdqc.kernels.sparse_attention import SPARSE_ATTENTION, SPARSE_ATTENTION_INT8
from vdqc.kernels.weight_only_linear import WEIGHT_ONLY_LINEAR

I8, I32, F32, BF16, U8 = torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.uint8


def new(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls() -> list[tuple[str, Callable[..., Any] | None, list[Any], dict[str, Any]]]:
    x, y, gate = new(2, 80, 256), new(2, 80, 256), new(2, 1, 256, dtype=F32)
    signs, down = new(256, dtype=F32), new(256, 32)
    plain = ["none", None, None, 1e-6, None, None, "none", None]
    adaln = ["layer", None, None, 1e-6, gate, gate, "none", signs]
    forms = {"line": [None, 0, None], "row": [signs, 128, None], "both": [signs, 128, down]}
    kinds = [
        (f"{name}-{bits}", kernel.cuda, [x, *more, *adaln, *form, bits, bits == 4], {})
        for name, form in forms.items()
        for kernel, more, bits in (
            (FUSED_QUANTIZE, [], 8),
            (FUSED_QUANTIZE_ASYM, [], 4),
            (RESIDUAL_QUANTIZE, [y, gate], 8),
        )
    ]
    behind = [8, False, signs, new(1, dtype=F32)]
    kinds += [("scaled", FUSED_QUANTIZE.cuda, [x, *adaln, *forms["row"], *behind], {})]
    kinds += [("long", FUSED_QUANTIZE.cuda, [new(4, 27648), *plain, None, 0, None, 8, False], {})]
    kinds += [("rotation", ROTATION.cuda, [x, signs, 128, False], {})]
    kinds += [("rows", QUANTIZE_ROWS.cuda, [x, 127, False], {})]
    kinds += [("rows-asym", QUANTIZE_ROWS_ASYM.cuda, [x, 8, False], {})]
    kinds += [("rows-clip", QUANTIZE_ROWS.cuda, [x, 7, False, new(1, dtype=F32)], {})]
    kinds += [("static", QUANTIZE_STATIC.cuda, [x, new(1, dtype=F32), None, -127, 127], {})]
    heads = [new(1, 256, 4, 64), "rms", new(64), None, 1e-6, *[new(256, 32, dtype=F32)] * 2, 0]
    kinds += [("rope", ROPE.cuda, [*heads, True, 128], {})]
    kinds += [("rope-codes", ROPE_QUANTIZE.cuda, [*heads, False, True, 128], {})]
    codes, scale, of = new(160, 256, dtype=I8), new(160, 1, dtype=F32), new(512, dtype=F32)
    end = {"gate": new(160, 512), "residual": new(160, 512)}
    weight, packed = new(512, 256, dtype=I8), new(512, 128, dtype=U8)
    rest = [of, None, None, of, BF16]
    for name, named in {"": {}, "-gated": end, "-gelu": {"activation": "gelu_tanh"}}.items():
        kinds += [(f"int8{name}", INT8_LINEAR.cuda, [codes, scale, None, weight, *rest], named)]
        more = [codes, scale, None, packed, 4, None, *rest]
        kinds += [(f"packed{name}", PACKED_LINEAR.cuda, more, named)]
    more = [new(4, 256), packed, 4, new(512, 4, dtype=F32), None, of]
    kinds += [("weight-only", WEIGHT_ONLY_LINEAR.cuda, more, {})]
    mask = [new(1, 1, 4, dtype=I32), new(1, 1, 4, dtype=I32), new(16, dtype=I32), 0.1, 128, 128]
    q, code, step = new(1, 2, 512, 64), new(1, 2, 512, 64, dtype=I8), new(1, 2, 512, 1, dtype=F32)
    kinds += [("sparse", SPARSE_ATTENTION.cuda, [q, q, q, *mask], {})]
    kinds += [("sparse-i8", SPARSE_ATTENTION_INT8.cuda, [code, step, code, step, q, *mask], {})]
    return kinds


def bound_only() -> dict[str, list[str]]:
    """Names of the Triton functions that every call would compile, by generation."""
    seen: list[str] = []

    def hook(**known: Any) -> bool:
        seen.append(known["repr"].partition("[")[0])
        return True

    triton.knobs.runtime.jit_cache_hook = hook
    found = {}
    for arch in ARCHS:
        for name, call, args, named in calls():
            assert call is not None
            with absent(arch):
                call(*args, **named)
            found[f"{name} {arch}"] = sorted(set(seen))
            seen.clear()
    return found


def fit(arch: str) -> dict[str, int]:
    """Formats whose every plane of x is staged; Triton raises where one asks for more than SM has.

    Bytes of shared memory, by format.
    """
    of, found = new(512, dtype=F32), {}
    assert PACKED_LINEAR.cuda is not None
    assert WEIGHT_ONLY_LINEAR.cuda is not None

    def listener(*, metadata: dict[str, Any], **known: Any) -> None:
        found[name] = metadata["shared"]

    triton.knobs.compilation.listener = listener
    for bits in (3, 5):
        name = f"w{bits}a8g"
        packed, multiples = new(512, 128 * bits, dtype=U8), new(512, 8, dtype=I8)
        codes, scale = new(300, 1024, dtype=I8), new(300, 1, dtype=F32)
        with absent(arch):
            PACKED_LINEAR.cuda(
                codes, scale, None, packed, bits, multiples, of, None, None, of, BF16
            )
    for rows, dtype in ((64, BF16), (64, F32), (8, F32)):
        name = f"w7a16-{rows}-{str(dtype)[6:]}"
        packed, scales = new(512, 128 * 7, dtype=U8), new(512, 8, dtype=F32)
        with absent(arch):
            WEIGHT_ONLY_LINEAR.cuda(new(rows, 1024, dtype=dtype), packed, 7, scales, None, of)
    return found


def lanes() -> dict[str, Any]:
    """Planes of 48 compiled, and what planes of 40 would compile."""

    def call(width: int) -> None:
        of, factor = new(256, dtype=F32), new(256, 1, dtype=I8)
        codes, scale = new(40, width, dtype=I8), new(40, 1, dtype=F32)
        packed = new(256, width * 5 // 8, dtype=U8)
        more = [packed, 5, factor, of, None, None, None, BF16]
        assert PACKED_LINEAR.cuda is not None
        PACKED_LINEAR.cuda(codes, scale, None, *more, binary=True)

    with absent("sm100") as found:
        call(8 * 48)
    (files,) = found.values()
    text = next(path for name, path in files.items() if name.endswith("ttgir")).read_text()
    names = set(re.findall(r"elementwise_inline_asm.*-> tensor<\w+xi8, (#\w+)>", text))
    layouts = [re.findall(rf"^{name} = (.*)$", text, re.M)[0] for name in names]
    seen: list[str] = []

    def hook(**known: Any) -> bool:
        seen.append(known["repr"].partition("[")[0])
        return True

    triton.knobs.runtime.jit_cache_hook = hook
    with absent("sm100"):
        call(8 * 40)
    return {"layouts": layouts, "narrow": seen}


def wide() -> dict[str, Any]:
    """Compiled, so that what does not fit is an error; by dtype and op."""
    signs, behind = new(16384, dtype=F32), [16384, None, 8, False]
    steps = ["none", None, None, 1e-6, None, None, "none", None]
    rotate, quantise = [signs, 16384, False], [*steps, signs, *behind]
    result = {}
    for kernel, dtype, more in (
        (FUSED_QUANTIZE, BF16, quantise),
        (FUSED_QUANTIZE, F32, quantise),
        (ROTATION, F32, rotate),
    ):
        assert kernel.cuda is not None
        with absent("sm89") as found:
            kernel.cuda(new(3, 16384, dtype=dtype), *more)
        names = {name.partition(".")[0] for files in found.values() for name in files}
        result[f"{kernel.name} {dtype}"] = sorted(name for name in names if name[:2] != "__")
    return result


def one_launch() -> None:
    """That of the variant ``quantize_static/rows``."""
    assert QUANTIZE_STATIC.cuda is not None
    QUANTIZE_STATIC.cuda(new(64, 8192), new(64, 1, dtype=F32), new(64, 1, dtype=I32), -127, 127)


def store(folder: Path) -> dict[str, Any]:
    with absent("sm90") as found:
        one_launch()
    keep(folder, "sm90", found)
    variant = next(item for item in collect() if item.name == "quantize_static/rows")
    offline = compiled(variant, "sm90")
    stored = next(folder.glob("*/*.cubin"))
    return {
        "kernels": len(found),
        "offline": offline.asm["cubin"] == stored.read_bytes(),
        "machine": b"/" in next(folder.glob("*/*.json")).read_bytes(),
    }


def serve(folder: Path) -> dict[str, Any]:
    hits: list[tuple[bool, bool]] = []

    def listener(**known: Any) -> None:
        places = [Path(path).is_relative_to(folder) for path in known["metadata_group"].values()]
        hits.append((known["cache_hit"], all(places)))

    offered = offer(folder, "sm90")
    triton.knobs.compilation.listener = listener
    with absent("sm90"):
        one_launch()
    with absent("sm80"):
        one_launch()
    return {"offered": offered, "hits": hits}


if __name__ == "__main__":
    verb = sys.argv[1]
    verbs: dict[str, Callable[..., Any]]
    verbs = {"all": bound_only, "lanes": lanes, "fit": fit, "wide": wide}
    verbs |= {"store": lambda at: store(Path(at)), "serve": lambda at: serve(Path(at))}
    found = verbs[verb](*sys.argv[2:])
    print(json.dumps(found))
