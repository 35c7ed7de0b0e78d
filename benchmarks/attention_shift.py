"""How far quantisation, sparsity and both move attention maps: is the sum of the two exceeded?

    python benchmarks/attention_shift.py                          # digits, W4A8, density 0.25
    python benchmarks/attention_shift.py --scheme w4a6 --variants naive,sparse,naive+sparse

Maps are softmax(q kᵀ scale) of every self-attention, over tokens in the order of the video, of the
float graph and of the graph that the passes leave, on calls along the float model's trajectory that
nothing was learned from. ``shift`` is the squared difference relative to the squared float map,
the mean over sites and calls. (Outputs do not compare: rotations of values move their basis.) Rows
go to ``results/attention_shift.json``.

Source: Feng et al., QuantSparse, arXiv 2509.23681, section 3.1 and proposition 3.1.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quality_models import SOURCES, record_calls
from quality_sparsity import passes
from torch import Tensor, fx

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.target import Target
from vdqc.compiler import capture_source, parse_recipe
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.pool import open_pool
from vdqc.engine.trajectory import record
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind, note
from vdqc.ir.sparse_ops import SPARSE_ATTENTION

RESULTS = Path(__file__).resolve().parent / "results" / "attention_shift.json"
VARIANTS = "naive,sparse,naive+sparse,msad,msad+sparse"
#: Calls of one trajectory that are compared.
CALLS = 4


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = SOURCES[options.model]()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record_calls(source, folder / "pool")
        calls = fresh_calls(source, folder / "fresh")
        graph, _ = capture_source(source, Diagnostics())
        expected = None
        for variant in options.variants.split(","):
            changed, before = compressed(graph.clone(), variant, options, source.samples, folder)
            expected = expected or [maps(before, sample) for sample in calls]
            shifts = [shift(maps(changed, s), e) for s, e in zip(calls, expected, strict=True)]
            row = {
                "model": options.model,
                "variant": variant,
                "scheme": options.scheme if not variant.startswith("sparse") else "none",
                "density": options.density if "sparse" in variant else 1.0,
                "seed": options.seed,
                "shift": round(statistics.mean(shifts), 5),
            }
            print(row, flush=True)
            rows.append(row)
    write(rows)
    return 0


def fresh_calls(source: Any, folder: Path) -> list[Sample]:
    """Calls of a trajectory that no recipe learns from, spread over the timesteps."""
    sampler = copy.copy(source.generate.__globals__)
    model_call, labels = sampler["sample"], sampler["labels"]
    pool = record(source.model, lambda m, seed: model_call(m, labels(seed)[:1], seed), [7], folder)
    every = max(1, len(pool) // CALLS)
    return [pool[index] for index in range(0, len(pool), every)][:CALLS]


def compressed(
    graph: Graph,
    variant: str,
    options: argparse.Namespace,
    samples: Sequence[Sample],
    folder: Path,
) -> tuple[Graph, Graph]:
    """The graph behind the passes of ``variant``, and the annotated one in float."""
    text = passes(variant, options.density, folder, options.scheme, options.seed)
    plan = parse_recipe(text, options.scheme)
    ctx = Context(list(samples), Target.parse("cpu"), Diagnostics(), plan.rules, options.seed)
    ctx.use(open_pool(folder / "pool"))
    first, rest = plan.passes[:2], plan.passes[2:]
    PassManager(first, probe=False).run(graph, ctx)
    before = graph.clone()
    PassManager(rest, probe=False, start=graph.stage).run(graph, ctx)
    return graph, before


@torch.no_grad()
def maps(graph: Graph, sample: Sample) -> dict[str, Tensor]:
    """Attention map float[B, H, T, T] of each self-attention over frames.

    The map is what the attention makes of the identity as values: masks and their order included.
    """
    sites = {
        site.node: site.name
        for site in graph.sites(kind=SiteKind.ATTENTION)
        if not note(site.node).get("cross")
    }
    values: dict[fx.Node, Any] = {}
    wanted = {operand for node in sites for operand in node.all_input_nodes}

    def look(node: fx.Node, value: Any) -> None:
        if node in wanted:
            values[node] = value

    graph.run_inputs(graph.signature.bind((), sample.inputs), look)
    found = {}
    for node, name in sites.items():
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _value(graph, values, n))
        query, key = args[:2]
        eye = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1).contiguous()
        found[name] = node.target(query, key, eye, *args[3:], **kwargs)
    return found


def _value(graph: Graph, values: dict[fx.Node, Any], node: fx.Node) -> Any:
    return graph.evaluate(node) if node.op == "get_attr" else values[node]


def shift(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Squared difference over squared size, mean over sites."""
    return statistics.mean(
        float((found[name] - maps).square().sum() / maps.square().sum())
        for name, maps in expected.items()
    )


def write(rows: list[dict[str, Any]]) -> None:
    """Keep what was measured before of other jobs."""
    keys = ("model", "variant", "scheme", "density", "seed")
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    new = {tuple(row[k] for k in keys) for row in rows}
    kept = [row for row in old if tuple(row[k] for k in keys) not in new]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in [*kept, *rows])
    text = f'{{\n "header": {{"torch": "{torch.__version__}"}},\n "rows": [\n{lines}\n ]\n}}\n'
    RESULTS.write_text(text)


if __name__ == "__main__":
    assert SPARSE_ATTENTION  # registers the op that the graphs call
    sys.exit(main())
