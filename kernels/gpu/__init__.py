"""Triton sources and how they are launched; imported only when a tensor is on a GPU.

Importing this package checks that there is a Triton that can compile it.
"""

from vdqc.kernels.gpu.runtime import check_triton

check_triton()
