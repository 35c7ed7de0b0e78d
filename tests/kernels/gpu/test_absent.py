"""Launches on a GPU that is not there, in a process whose kernels are decorated for a compiler."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vdqc.base.diagnostics import LoweringError
from vdqc.base.target import TARGETS
from vdqc.kernels.gpu.absent import absent
from vdqc.kernels.gpu.runtime import ABSENT

LAUNCHES = Path(__file__).with_name("launches.py")


def launched(cache: Path, *words: object) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, str(LAUNCHES), *map(str, words)],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_every_kind_of_call_reaches_a_launch_on_every_generation(tmp_path: Path) -> None:
    found = launched(tmp_path, "all")
    kinds = {name.partition(" ")[0] for name in found}
    assert len(found) == 5 * len(kinds) > 100
    assert [name for name, functions in found.items() if not functions] == []
    # what runs on Hopper is compared with the plain kernel at its first use: both are compiled
    assert found["int8 sm90"] == ["byte_gemm", "tma_gemm"]
    assert found["int8 sm80"] == ["byte_gemm"]


def test_weights_in_many_planes_fit_the_smallest_shared_memory(tmp_path: Path) -> None:
    found = launched(tmp_path, "fit", "sm89")
    assert len(found) == 5
    assert max(found.values()) <= TARGETS["sm89"].shared_memory


def test_lanes_that_share_a_factor_are_neighbours_in_k_on_sm100(tmp_path: Path) -> None:
    """Four in one register: an odd plane is laid out by rows there, so it is unpacked before."""
    found = launched(tmp_path, "lanes")
    assert found["layouts"]
    for layout in found["layouts"]:
        neighbours = (
            r"register = \[\[0, 1\], \[0, 2\]|sizePerThread = \[1, (4|8|16)\].*order = \[1, 0\]"
        )
        assert re.search(neighbours, layout), layout
    assert found["narrow"] == ["byte_gemm"]


def test_the_widest_rotations_run_where_memory_is_short(tmp_path: Path) -> None:
    """16384 = 128 x 128 in float32 needs 128 KiB, and sm89 has 99: torch rotates those."""
    found = launched(tmp_path, "wide")
    assert found == {
        "fused_quantize torch.bfloat16": ["_row"],
        "fused_quantize torch.float32": ["_line"],
        "rotation torch.float32": [],
    }


def test_a_stored_kernel_is_the_offline_compilers_and_serves_the_launch(tmp_path: Path) -> None:
    folder = tmp_path / "cubins"
    made = launched(tmp_path / "one", "store", folder)
    assert made == {"kernels": 1, "offline": True, "machine": False}
    served = launched(tmp_path / "other", "serve", folder)
    # on sm90 nothing is compiled and every file is the folder's; on sm80 the launch compiles
    assert served == {"offered": 1, "hits": [[True, True], [False, False]]}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
def test_kernels_of_the_interpreter_are_refused() -> None:
    with pytest.raises(LoweringError, match="unset TRITON_INTERPRET"), absent("sm90"):
        pass
    assert ABSENT.get() is None
