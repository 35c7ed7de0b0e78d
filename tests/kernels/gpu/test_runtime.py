import itertools

import pytest
import torch

from vdqc.base.diagnostics import ConfigError, InputError, LoweringError
from vdqc.base.target import TARGETS, detect
from vdqc.kernels.gpu import attention, launch_config, memory, runtime
from vdqc.kernels.gpu.runtime import arch_of_capability, operand
from vdqc.placement import check_machine


def test_operands_say_what_was_expected(device: str) -> None:
    x = torch.zeros(4, 8, device=device)
    with pytest.raises(InputError, match="codes: expected int8, got float32"):
        operand("codes", x, torch.int8)
    with pytest.raises(InputError, match=r"x: expected shape \[any, 9\], got \[4, 8\]"):
        operand("x", x, torch.float32, (None, 9))
    with pytest.raises(InputError, match="x: expected it on meta"):
        operand("x", x, torch.float32, device=torch.device("meta"))
    assert operand("x", x, (torch.int8, torch.float32), (4, None)) is x


def test_strided_and_misaligned_operands_are_copied(device: str) -> None:
    x = torch.randint(-9, 9, (8, 4), dtype=torch.int8, device=device)
    for odd in (x.T, x.flatten()[3:19]):
        found = operand("x", odd, torch.int8)
        assert found.is_contiguous()
        assert found.data_ptr() % 16 == 0
        assert torch.equal(found, odd)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm89"), ((10, 3), "sm100"), ((12, 1), "sm120")],
)
def test_a_gpu_runs_the_newest_kernels_of_its_major_version(
    capability: tuple[int, int], arch: str
) -> None:
    assert arch_of_capability(*capability) == arch


@pytest.mark.parametrize("capability", [*itertools.product((7, 8, 9, 10, 11, 12), range(10))])
def test_the_target_of_this_machine_is_that_of_its_kernels(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--target auto, also on GPUs between two targets: A10 (8.6), B300 (10.3), GB10 (12.1)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    try:
        arch = arch_of_capability(*capability)
    except LoweringError:
        with pytest.raises(ConfigError, match=r"this GPU is sm\d+, for which vdqc has no target"):
            detect()
        return
    assert detect().name == arch
    check_machine("auto.vdqc", detect(), reference=False)


def test_memory_is_the_gpus_own_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A10 runs the kernels of sm80 in less shared memory; so they take smaller tiles."""
    monkeypatch.setattr(memory, "of_gpu", lambda index: (99 << 10, 163 << 10)[index])
    monkeypatch.setattr(launch_config, "_refined", lambda device: {})
    assert [memory.has_less(index, "sm80") for index in (0, 1)] == [True, False]
    assert memory.shared_memory(torch.device("cuda", 0)) == 99 << 10
    assert memory.shared_memory(torch.device("meta")) == TARGETS["sm80"].shared_memory
    tiles = [attention.configuration("sm80", 128, 16, index) for index in (0, 1)]
    assert [tile.stages for tile in tiles] == [2, 3]
    assert attention.configuration("sm80", 128, 16) == tiles[1]


def test_an_older_gpu_is_refused() -> None:
    with pytest.raises(LoweringError, match="got sm75"):
        arch_of_capability(7, 5)


@pytest.mark.parametrize("found", [None, "3.4.1", "2.1.0"])
def test_a_missing_or_old_triton_is_named(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "triton_version", lambda: found)
    with pytest.raises(
        LoweringError, match=f"expected Triton 3.5 or newer .* got {found or 'none'}"
    ):
        runtime.check_triton()
