"""Speed, size and error of one forward of a Wan-architecture DiT on a CPU, beside its peers.

Every variant lives in a process of its own; the processes stay up and take turns, so that drift of
the machine falls on all alike. With one thread the time is CPU time of the process, else wall time.
No speed is printed before the outputs agree with float32 and the kernels' tests pass.

Rows: fp32 eager with oneDNN linears; bf16 eager; bf16 torch.compile; bf16 with our attention and
prepacked linears, eager and compiled (the strong line); torchao int8 dynamic, fp32, compiled (needs
torchao: ``--torchao-python`` names an interpreter that has it); ours W8A8 and W4A8-g64, and with
attention over a share of the blocks: ``w8a8-d25`` computes 25 % of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(__file__).resolve().parent / "run.py"
RESULTS = Path(__file__).resolve().parent / "results"
MARK = "@@"
#: Largest relative error against float32 that a variant may show and still be timed.
ALLOWED = {"fp32": 1e-4, "bf16": 0.03, "torchao": 0.03, "w8a8": 0.05, "w4a8": 0.35}
ALLOWED_SPARSE = 0.5
VARIANTS = (
    "fp32-onednn",
    "bf16-eager",
    "bf16-compile",
    "bf16-strong-eager",
    "bf16-strong",
    "torchao-int8",
    "w8a8",
    "w4a8-g64",
)


@dataclass
class Row:
    """What was measured of one variant; times in seconds, memory in bytes."""

    variant: str
    median: float
    spread: float
    times: list[float]
    weight_bytes: int
    peak_rss: int
    error: float
    build_seconds: float


def run(options: argparse.Namespace) -> int:
    """Run the benchmark, or one worker of it."""
    if options.worker:
        return work(options)
    if not options.skip_tests and not tests_pass():
        print("refusing to print a speed: the kernels' tests fail", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        workers, skipped = start(options, Path(folder))
        try:
            rows = measure(options, workers, Path(folder))
        finally:
            for worker in workers.values():
                worker.stop()
    if rows is None:
        return 1
    report(options, rows, skipped)
    return 0


def add_options(parser: Any) -> None:
    """What only the CPU benchmark knows."""
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=4096, help="four times a square")
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", default="quant")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--torchao-python", default=sys.executable)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", default="", help=argparse.SUPPRESS)


def tests_pass() -> bool:
    """True if the tests of kernels and lowering pass."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "tests/lowering"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


# the parent: start workers, let them take turns ---------------------------------------------------


class Worker:
    """One variant in its own process, spoken to by lines of JSON."""

    def __init__(self, variant: str, options: argparse.Namespace, folder: Path) -> None:
        python = options.torchao_python if variant == "torchao-int8" else sys.executable
        command = [
            python,
            str(COMMAND),
            "--worker",
            variant,
            "--output",
            str(folder / f"{variant}.pt"),
        ]
        for name in ("layers", "tokens", "text", "threads", "passes"):
            command += [f"--{name}", str(getattr(options, name))]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._read()

    def run(self) -> float:
        """Seconds of one forward."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return float(self._read()["seconds"])

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line[len(MARK) :]))
        return {"skip": f"the worker ended with code {self.process.wait()}"}


def start(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Worker], dict[str, str]]:
    """Workers that are ready, and why the others are not."""
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    for variant in ["fp32-onednn", *options.variants.split(",")]:
        if variant in workers:
            continue
        worker = Worker(variant, options, folder)
        if "skip" in worker.facts:
            worker.stop()
            skipped[variant] = worker.facts["skip"]
            print(f"{variant}: skipped: {worker.facts['skip']}", flush=True)
        else:
            workers[variant] = worker
            print(f"{variant}: ready after {worker.facts['build_seconds']:.0f} s", flush=True)
    return workers, skipped


def measure(
    options: argparse.Namespace, workers: dict[str, Worker], folder: Path
) -> list[Row] | None:
    """One row per worker; None if an output is wrong."""
    import torch

    outputs = {variant: torch.load(folder / f"{variant}.pt") for variant in workers}
    expected = outputs["fp32-onednn"].double()
    errors = {
        variant: float((value.double() - expected).norm() / expected.norm())
        for variant, value in outputs.items()
    }
    for variant, error in errors.items():
        allowed = next(limit for name, limit in ALLOWED.items() if variant.startswith(name))
        if split_density(variant)[1] < 1:  # a mask changes the function: only nonsense is refused
            allowed = ALLOWED_SPARSE
        if not error <= allowed:
            print(f"refusing to print a speed: {variant} is off by {error:.3f} (allowed {allowed})")
            return None
    times: dict[str, list[float]] = {variant: [] for variant in workers}
    for index in range(options.rounds):
        for variant, worker in workers.items():
            times[variant].append(worker.run())
        print(f"round {index + 1} of {options.rounds} done", flush=True)
    return [
        Row(
            variant,
            statistics.median(times[variant]),
            (max(times[variant]) - min(times[variant])) / statistics.median(times[variant]),
            times[variant],
            worker.facts["weight_bytes"],
            worker.facts["peak_rss"],
            errors[variant],
            worker.facts["build_seconds"],
        )
        for variant, worker in workers.items()
    ]


def report(options: argparse.Namespace, rows: list[Row], skipped: dict[str, str]) -> None:
    """Print the table and write the JSON."""
    by_name = {row.variant: row for row in rows}
    references = [
        name for name in ("bf16-compile", "bf16-strong", "torchao-int8") if name in by_name
    ]
    bf16 = by_name.get("bf16-eager")
    heads = ["variant", "s", "spread", *(f"x {name}" for name in references)]
    print("  ".join(f"{head:>18}" for head in [*heads, "weights MB", "x bf16", "rel. error"]))
    for row in rows:
        cells = [row.variant, f"{row.median:.3f}", f"{row.spread:.0%}"]
        cells += [f"{by_name[name].median / row.median:.2f}" for name in references]
        cells += [f"{row.weight_bytes / 1e6:.1f}"]
        cells += [f"{row.weight_bytes / bf16.weight_bytes:.3f}" if bf16 else "-"]
        cells += [f"{row.error:.4f}"]
        print("  ".join(f"{cell:>18}" for cell in cells))
    for variant, reason in skipped.items():
        print(f"{variant:>18}  skipped: {reason}")
    out = options.out or RESULTS / options.device / f"wan_{options.layers}x{options.tokens}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "layers": options.layers,
        "tokens": options.tokens,
        "text": options.text,
        "threads": options.threads,
        "passes": options.passes,
        "clock": "cpu" if options.threads == 1 else "wall",
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "skipped": skipped,
    }
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written: {out}")


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    import torch

    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return {
        "cpu": facts.get("model name") or platform.processor(),
        "family": facts.get("cpu family", ""),  # AMD: 25, 17 is Zen 4; 26 is Zen 5
        "model": facts.get("model", ""),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# a worker: build one variant, run it when told ----------------------------------------------------


def work(options: argparse.Namespace) -> int:
    """Build ``options.worker``, save its output, then time one forward per line of input."""
    keep_heap()
    import torch

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    begin = time.perf_counter()
    try:
        forward, weight_bytes = build(options.worker, options)
        output = forward()
        forward()
    except ImportError as error:
        say({"skip": str(error)})
        return 0
    torch.save(output.float(), options.output)
    facts = {
        "build_seconds": time.perf_counter() - begin,
        "weight_bytes": weight_bytes,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    say(facts)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for _ in sys.stdin:
        begin = clock()
        forward()
        say({"seconds": clock() - begin})
    return 0


def say(message: dict[str, Any]) -> None:
    """One line to the parent."""
    print(MARK + json.dumps(message), flush=True)


def keep_heap() -> None:
    """Do not give freed memory back: page faults would cost every variant up to a tenth."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


Forward = Callable[[], Any]


def build(variant: str, options: argparse.Namespace) -> tuple[Forward, int]:
    """(one forward, bytes of weights in memory)."""
    import torch

    from benchmarks import cases

    dtype = torch.float32 if variant in ("fp32-onednn", "torchao-int8") else torch.bfloat16
    call = cases.wan_call(options.tokens, options.text, dtype)
    model = cases.wan(options.layers, dtype)
    if variant.startswith(("w8", "w4")):
        return compressed(model, call, variant, options)
    if variant == "bf16-strong":
        return strong(model, call)
    weight_bytes = tensor_bytes(model)
    if variant == "torchao-int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model.blocks, Int8DynamicActivationInt8WeightConfig())
        weight_bytes = tensor_bytes(model)
    if variant in ("fp32-onednn", "bf16-strong-eager"):
        prepack_linears(model)
    if variant == "bf16-strong-eager":
        use_our_attention()
    if variant in ("bf16-compile", "torchao-int8"):
        model.compile()
    return lambda: model(**call, return_dict=False)[0], weight_bytes


def split_density(variant: str) -> tuple[str, float]:
    """``w8a8-d25`` is (w8a8, 0.25); without a density 1."""
    scheme, found, percent = variant.rpartition("-d")
    return (scheme, int(percent) / 100) if found and percent.isdigit() else (variant, 1.0)


def compressed(
    model: Any, call: dict[str, Any], scheme: str, options: argparse.Namespace
) -> tuple[Forward, int]:
    """The lowered program, prepared and compiled block by block."""
    import torch

    from benchmarks import cases
    from vdqc.base.diagnostics import Diagnostics
    from vdqc.base.target import TARGETS
    from vdqc.compiler import complete
    from vdqc.engine.pass_manager import Context, PassManager
    from vdqc.engine.recipe import Recipe
    from vdqc.ir.frontend import capture
    from vdqc.ir.sample import Sample
    from vdqc.lowering.lower import lower
    from vdqc.lowering.prepare import compile_blocks, prepare
    from vdqc.passes.table import PASSES

    scheme, density = split_density(scheme)
    passes = options.passes + (f",sparsify{{density={density}}}" if density < 1 else "")
    text = "condition_embedder.text_embedder.linear_"
    schemes = [scheme, *(f"{text}{index}={scheme}" for index in (1, 2))]
    recipe = complete(Recipe.parse(passes, PASSES, schemes))
    # masks are planned for the call that is timed
    samples = [Sample(call, timestep=500.0)] if density < 1 else []
    samples += cases.wan_samples(torch.bfloat16)
    graph = capture(model, samples)
    context = Context(samples, TARGETS["cpu"], rules=recipe.rules)
    PassManager(recipe.passes, probe=False).run(graph, context)
    lower(graph, context.target, Diagnostics())
    inputs = graph.signature.bind((), call)
    program = prepare(graph.module, context.target)
    weight_bytes = tensor_bytes(program)
    for name, parameter in list(model.named_parameters()):
        parameter.data = torch.empty(0) if is_replaced(graph, name) else parameter.data
    compile_blocks(program)
    return lambda: program(*inputs)[0], weight_bytes


def is_replaced(graph: Any, name: str) -> bool:
    """True if the program no longer reads this weight of the model."""
    return name not in graph.param_names()


def strong(model: Any, call: dict[str, Any]) -> tuple[Forward, int]:
    """The float program with our attention and prepacked linears, compiled block by block."""
    import torch

    from benchmarks import cases
    from vdqc.base.diagnostics import Diagnostics
    from vdqc.base.target import TARGETS
    from vdqc.compiler import complete
    from vdqc.engine.pass_manager import Context, PassManager
    from vdqc.engine.recipe import Recipe
    from vdqc.ir.frontend import capture
    from vdqc.lowering.lower import lower
    from vdqc.lowering.prepare import compile_blocks, prepare
    from vdqc.passes.table import PASSES

    samples = cases.wan_samples(torch.bfloat16)
    graph = capture(model, samples)
    recipe = complete(Recipe.parse("annotate", PASSES, ["none"]))
    PassManager(recipe.passes, probe=False).run(graph, Context(samples, rules=recipe.rules))
    lower(graph, TARGETS["cpu"], Diagnostics())
    weight_bytes = tensor_bytes(graph.module)
    linear = prepacked_op()
    for node in graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            matrix: Any = node.args[1]
            weight = graph.evaluate(matrix)
            packed = linear.pack(weight)
            handle = graph.set_param(f"{matrix.target}_handle", torch.tensor(packed))
            node.args = (node.args[0], handle, *node.args[2:])
            node.target = linear.op(weight.shape[0])
    graph.module.recompile()
    inputs = graph.signature.bind((), call)
    program = compile_blocks(prepare(graph.module, TARGETS["cpu"]))
    return lambda: program(*inputs)[0], weight_bytes


class prepacked_op:
    """A linear whose weight oneDNN has reordered: untraceable, so named by a handle."""

    def __init__(self) -> None:
        import torch
        from torch import Tensor

        self.weights: list[Any] = []

        def prepacked_linear(x: Tensor, handle: Tensor, bias: Tensor | None, n: int) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weights[int(handle)], bias, "none", [], ""
            )

        prepacked_linear.__annotations__ = {
            "x": Tensor,
            "handle": Tensor,
            "bias": Tensor | None,
            "n": int,
            "return": Tensor,
        }
        custom = torch.library.custom_op("vdqc_bench::linear", prepacked_linear, mutates_args=())
        custom.register_fake(lambda x, handle, bias, n: x.new_empty([*x.shape[:-1], n]))

    def pack(self, weight: Any) -> int:
        import torch

        self.weights.append(torch.ops.mkldnn._reorder_linear_weight(weight, None))
        return len(self.weights) - 1

    def op(self, n: int) -> Callable[..., Any]:
        return globals().setdefault(f"linear_{n}", _bound(n))


def _bound(n: int) -> Callable[..., Any]:
    import torch

    def linear(x: Any, handle: Any, bias: Any = None) -> Any:
        return torch.ops.vdqc_bench.linear(x, handle, bias, n)

    linear.__name__ = linear.__qualname__ = f"linear_{n}"
    return linear


def prepack_linears(model: Any) -> None:
    """Every linear runs in oneDNN on a weight that was reordered once."""
    import torch

    def forward(linear: Any) -> Callable[..., Any]:
        bias = linear.bias
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        linear.weight = torch.nn.Parameter(linear.weight.detach()[:0], requires_grad=False)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    linears: list[Any] = [x for x in model.modules() if isinstance(x, torch.nn.Linear)]
    for linear in linears:
        linear.forward = forward(linear)


def use_our_attention() -> None:
    """Replace torch's attention by ours for the whole process."""
    from types import SimpleNamespace

    import torch

    from vdqc.kernels import attention
    from vdqc.kernels.attention import ATTENTION

    kernel: Any = attention
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    kernel.functional = SimpleNamespace(scaled_dot_product_attention=original)

    def ours(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
        return ATTENTION.op(query, key, value, attn_mask, query.shape[-1] ** -0.5)

    functional.scaled_dot_product_attention = ours


def tensor_bytes(module: Any) -> int:
    """Bytes of the distinct weights that ``module`` holds."""
    tensors = [*module.parameters(), *module.buffers()]
    total = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        inner = getattr(tensor, "tensor_data_names", None)  # a torchao subclass
        if inner is None and hasattr(tensor, "__tensor_flatten__"):
            inner = tensor.__tensor_flatten__()[0]
        total += sum(getattr(tensor, name).nbytes for name in inner) if inner else tensor.nbytes
    return total
