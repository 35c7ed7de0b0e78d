import importlib

import pytest

from vdqc.kernels.base import Kernel
from vdqc.kernels.table import KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_every_entry_is_a_kernel_of_that_name(name: str) -> None:
    module, _, attribute = KERNELS[name].partition(":")
    kernel = getattr(importlib.import_module(module), attribute)
    assert isinstance(kernel, Kernel)
    assert kernel.name == name
    assert kernel.op.namespace == "vdqc_kernels"
    assert not kernel.op._schema.is_mutable
