"""The passes by name, in the order in which they usually run. File stem = key = ``name``."""

from vdqc.engine.recipe import PassTable

PASSES: PassTable = {
    "canonicalize": "vdqc.passes.canonicalize:Canonicalize",
    "im2col": "vdqc.passes.im2col:Im2col",
    "annotate": "vdqc.passes.annotate:Annotate",
    "select": "vdqc.passes.select:Select",
    "rotate": "vdqc.passes.rotate:Rotate",
    "smooth": "vdqc.passes.smooth:Smooth",
    "allocate": "vdqc.passes.allocate:Allocate",
    "split": "vdqc.passes.split:Split",
    "quant": "vdqc.passes.quant:Quant",
    "gptq": "vdqc.passes.gptq:Gptq",
    "calibrate": "vdqc.passes.calibrate:Calibrate",
    "distill": "vdqc.passes.distill:Distill",
    "sparsify": "vdqc.passes.sparsify:Sparsify",
    "reparameterize": "vdqc.passes.reparameterize:Reparameterize",
    "fold": "vdqc.passes.fold:Fold",
}
