import json
from pathlib import Path

import pytest
import torch

from vdqc.base.target import TARGETS
from vdqc.kernels.gpu import launch_config, memory, packed_gemm, weight_only
from vdqc.kernels.gpu.launch_config import Config
from vdqc.kernels.gpu.runtime import ARCHS


def test_configurations_by_size_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"op": "gemm", "at_most": {"m": 64}, "config": {"block_m": 16}},
        {"op": "gemm", "triton": "1.0", "config": {"block_m": 1}},
        {"op": "gemm", "config": {"block_m": 256, "warps": 8}},
    ]
    (tmp_path / "sm90.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(launch_config, "_CONFIGS", tmp_path)
    launch_config._rows.cache_clear()
    assert launch_config.best_config("gemm", "sm90", {"m": 64}).block_m == 16
    assert launch_config.best_config("gemm", "sm90", {"m": 65}) == Config(block_m=256, warps=8)
    assert launch_config.best_config("other", "sm90", {"m": 65}) == Config()
    assert launch_config.best_config("gemm", "sm80", {"m": 65}) == Config()
    launch_config._rows.cache_clear()


@pytest.mark.parametrize("arch", ARCHS)
def test_committed_configurations_can_be_read(arch: str) -> None:
    for row in launch_config._rows(arch):
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
    assert wanted <= {row["op"] for row in launch_config._rows(arch)}


def test_a_cache_of_another_gpu_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "refined.json"
    assert launch_config.read_refined(file, "H200", "3.6.0") == {}
    content = {"gpu": "H200", "triton": "3.6.0", "configs": {"gemm(m=1)": {"block_m": 16}}}
    file.write_text(json.dumps(content))
    assert launch_config.read_refined(file, "H200", "3.6.0") == {"gemm(m=1)": Config(block_m=16)}
    with pytest.warns(UserWarning, match="tuned on H200 with Triton 3.6.0"):
        assert launch_config.read_refined(file, "A100", "3.6.0") == {}
    with pytest.warns(UserWarning, match="this is H200 with 3.9.0"):
        assert launch_config.read_refined(file, "H200", "3.9.0") == {}
    for damaged in (
        "{",
        "[]",
        '{"gpu": "H200"}',
        '{"gpu": 1, "triton": 2, "configs": {"x": {"y": 1}}}',
    ):
        file.write_text(damaged)
        with pytest.warns(UserWarning, match="not a cache"):
            assert launch_config.read_refined(file, "H200", "3.6.0") == {}


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
        assert launch_config.refine("gemm", {"m": 3}, candidates, milliseconds).block_m == 128
    assert launch_config.best_config("gemm", "sm90", {"m": 3}, device=0).block_m == 128
    assert launch_config.best_config("gemm", "sm90", {"m": 4}, device=0) != Config(
        block_m=128, warps=99
    )
    launch_config._refined.cache_clear()
