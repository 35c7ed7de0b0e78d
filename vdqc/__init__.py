"""vdqc compiles diffusion transformers into low-bit, sparse programs."""

from vdqc.ir.sample import Sample
from vdqc.version import __version__

__all__ = ["Sample", "__version__"]
