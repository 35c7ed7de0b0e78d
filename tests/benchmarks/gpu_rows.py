"""A row of GPU results and the header above it."""

from benchmarks.gpu import results

HEADER = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}
ROW = {
    **dict.fromkeys(results.KEYS), "op": "w8a8", "case": "a/up", "variant": "auto", "p50_ms": 1.0,
    "p20_ms": 1.0, "p80_ms": 1.0, "rate": 1.0, "unit": "TOPS", "peer": "cublas bf16",
    "peer_p50_ms": 1.7, "ratio": 1.7,
}  # fmt: skip
