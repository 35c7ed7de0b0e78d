import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch

from vdqc.base.diagnostics import ConfigError, InputError, LoweringError
from vdqc.base.target import TARGETS, detect
from vdqc.kernels.gpu import attention, memory, packed_gemm, runtime, weight_only
from vdqc.kernels.gpu.runtime import ARCHS, Config, arch_of_capability, operand
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
    for module in (memory, runtime):
        monkeypatch.setattr(module, "of_gpu", lambda index: (99 << 10, 163 << 10)[index])
    monkeypatch.setattr(runtime, "_refined", lambda device: {})
    assert [memory.has_less(index, "sm80") for index in (0, 1)] == [True, False]
    assert runtime.shared_memory(torch.device("cuda", 0)) == 99 << 10
    assert runtime.shared_memory(torch.device("meta")) == TARGETS["sm80"].shared_memory
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


def test_configurations_by_size_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"op": "gemm", "at_most": {"m": 64}, "config": {"block_m": 16}},
        {"op": "gemm", "triton": "1.0", "config": {"block_m": 1}},
        {"op": "gemm", "config": {"block_m": 256, "warps": 8}},
    ]
    (tmp_path / "sm90.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(runtime, "_CONFIGS", tmp_path)
    runtime._rows.cache_clear()
    assert runtime.best_config("gemm", "sm90", {"m": 64}).block_m == 16
    assert runtime.best_config("gemm", "sm90", {"m": 65}) == Config(block_m=256, warps=8)
    assert runtime.best_config("other", "sm90", {"m": 65}) == Config()
    assert runtime.best_config("gemm", "sm80", {"m": 65}) == Config()
    runtime._rows.cache_clear()


@pytest.mark.parametrize("arch", ARCHS)
def test_committed_configurations_can_be_read(arch: str) -> None:
    for row in runtime._rows(arch):
        assert isinstance(Config(**row["config"]), Config)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_format_has_tiles(arch: str) -> None:
    """What has no row gets tiles that no compiler has vouched for."""
    wanted = {"int8_gemm", "sparse_attention", "w5s"}
    wanted |= {weight_only._op(bits) for bits in range(2, 8)}
    wanted |= {
        packed_gemm._op(bits, code_bits, groups, False)
        for bits in range(2, 8)
        for code_bits in (4, 8)
        for groups in (1, 8)
    }
    assert wanted <= {row["op"] for row in runtime._rows(arch)}


def test_a_cache_of_another_gpu_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "refined.json"
    assert runtime.read_refined(file, "H200", "3.6.0") == {}
    content = {"gpu": "H200", "triton": "3.6.0", "configs": {"gemm(m=1)": {"block_m": 16}}}
    file.write_text(json.dumps(content))
    assert runtime.read_refined(file, "H200", "3.6.0") == {"gemm(m=1)": Config(block_m=16)}
    with pytest.warns(UserWarning, match="tuned on H200 with Triton 3.6.0"):
        assert runtime.read_refined(file, "A100", "3.6.0") == {}
    with pytest.warns(UserWarning, match="this is H200 with 3.9.0"):
        assert runtime.read_refined(file, "H200", "3.9.0") == {}
    for damaged in (
        "{",
        "[]",
        '{"gpu": "H200"}',
        '{"gpu": 1, "triton": 2, "configs": {"x": {"y": 1}}}',
    ):
        file.write_text(damaged)
        with pytest.warns(UserWarning, match="not a cache"):
            assert runtime.read_refined(file, "H200", "3.6.0") == {}


def test_refining_keeps_the_fastest_that_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VDQC_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(memory, "of_gpu", lambda index: TARGETS["sm90"].shared_memory)

    def milliseconds(config: Config) -> float:
        if config.block_m == 256:
            raise RuntimeError("PassManager::run failed")
        return 1 / config.block_m

    candidates = [Config(block_m=size) for size in (64, 128, 256)]
    with pytest.warns(UserWarning, match="PassManager"):
        assert runtime.refine("gemm", {"m": 3}, candidates, milliseconds).block_m == 128
    assert runtime.best_config("gemm", "sm90", {"m": 3}, device=0).block_m == 128
    assert runtime.best_config("gemm", "sm90", {"m": 4}, device=0) != Config(block_m=128, warps=99)
    runtime._refined.cache_clear()


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_VERDICTS", {})


def test_a_variant_that_agrees_serves(verdicts: None) -> None:
    calls: list[str] = []

    def run(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.ones(2)

    for _ in range(3):
        runtime.guarded("ws", lambda: run("ws"), lambda: run("plain"))
    assert calls == ["plain", "ws", "ws", "ws"]


def test_a_variant_that_differs_is_dropped(verdicts: None) -> None:
    with pytest.warns(UserWarning, match="ws differs"):
        assert runtime.guarded("ws", lambda: torch.ones(2), lambda: torch.zeros(2)).sum() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runtime.guarded("ws", lambda: torch.ones(2), lambda: torch.zeros(2)).sum() == 0


def test_a_variant_that_does_not_compile_is_dropped(verdicts: None) -> None:
    def fails() -> torch.Tensor:
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match="does not compile"):
        assert runtime.guarded("ws", fails, lambda: torch.zeros(2)).sum() == 0
    assert runtime.guarded("ws", fails, lambda: torch.zeros(2)).sum() == 0


def test_only_the_plain_variant_serves_where_that_is_asked(
    verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs() -> torch.Tensor:
        raise AssertionError("called")

    monkeypatch.setenv("VDQC_PLAIN", "1")
    monkeypatch.setitem(runtime._VERDICTS, "proven", True)
    for key in ("ws", "proven"):
        assert runtime.guarded(key, hangs, lambda: torch.zeros(2)).sum() == 0
    monkeypatch.setenv("VDQC_PLAIN", "0")
    assert runtime.guarded("ws", lambda: torch.zeros(2), lambda: torch.zeros(2)).sum() == 0
    assert runtime._VERDICTS["ws"]


def test_running_out_of_memory_is_no_compile_error(verdicts: None) -> None:
    def fails() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        runtime.compile_or_fallback("ws", fails, lambda: torch.zeros(2))


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("Triton Error [CUDA]: out of memory", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("Triton Error [CUDA]: invalid argument", False),
        ("CUDA error: an illegal memory access was encountered", True),
        ("PassManager::run failed", False),
    ],
)
def test_what_another_kernel_would_meet_too_is_raised(
    verdicts: None, text: str, fatal: bool
) -> None:
    def fails() -> torch.Tensor:
        raise RuntimeError(text)

    caught = pytest.raises(RuntimeError) if fatal else pytest.warns(UserWarning, match="serves")
    with caught:
        runtime.guarded("ws", fails, lambda: torch.zeros(2))


def test_agreement_is_by_norm_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_PIECE", 64)
    expected = torch.randn(1000)
    expected[3], expected[4], expected[5] = float("nan"), float("inf"), 0.0
    found = expected * (1 + 1e-6)
    found[5] = 1e-6  # a sum that cancels, off by a rounding
    assert runtime.agrees(found, expected)
    assert runtime.agrees(expected[:0], expected[:0])
    assert not runtime.agrees(found.nan_to_num(), expected)
    found[-1] += 0.01  # one value of the last piece
    assert not runtime.agrees(found, expected)
    assert not runtime.agrees(torch.tensor([1, 2]), torch.tensor([1, 3]))
