"""compile(): a model, samples of its calls, a recipe and a target, to an artifact on disk.

This is the whole pipeline, read from top to bottom; every step lives in its own module.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo import OptimizedModule

from vdqc import report
from vdqc.aot import PACKAGE, check_packages, package
from vdqc.base.diagnostics import ConfigError, Diagnostics, InputError
from vdqc.base.options import check_seed
from vdqc.base.target import Target
from vdqc.bypassed import refuse_bypassed_hooks
from vdqc.calls import users_code
from vdqc.compile_checks import (
    Progress,
    check_capture,
    check_weights,
    float_output,
    lower_checked,
    surroundings_kept,
    weight_bytes,
)
from vdqc.engine.distributed import is_first_worker, own_place, workers
from vdqc.engine.named import NamedRecipe, named
from vdqc.engine.pass_manager import (
    Context,
    PassManager,
    PassRecord,
    check_order,
    tell_of_untrained,
)
from vdqc.engine.pool import INDEX, Pool, open_pool
from vdqc.engine.recipe import Recipe, load_pass
from vdqc.engine.trajectory import record
from vdqc.hub import layout
from vdqc.ir import artifact, transforms
from vdqc.ir.artifact import Artifact
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.resume import SAID, resumable, run_facts
from vdqc.ir.sample import Sample
from vdqc.ir.source import Source, check_samples, load_source
from vdqc.ir.weights import return_freed_memory
from vdqc.lowering.between import between_sites
from vdqc.lowering.precompile import CUBINS, check_precompiles
from vdqc.lowering.precompile import precompile as compile_kernels
from vdqc.lowering.rules import sized_like
from vdqc.passes.table import PASSES
from vdqc.sites import site_rows, with_kernels

#: Where the first sample's tensors are kept; in a folder of its own, apart from the weights.
PROBE = "probe/inputs.safetensors"
#: What is done where neither passes nor a recipe are named.
DEFAULT_PASSES = "rotate,smooth,quant"


def compile(
    model: nn.Module | str | Path,
    samples: Iterable[Sample] | None = None,
    passes: str | Sequence[str] | None = None,
    scheme: str | Sequence[str] | None = None,
    target: str = "auto",
    out: str | Path | None = None,
    *,
    recipe: str | None = None,
    pool: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
    verify: bool = True,
    component: str | None = None,
    mapped: bool | None = None,
    fresh: bool = False,
    aot: bool = False,
    precompile: bool = False,
    diagnostics: Diagnostics | None = None,
    progress: Progress = lambda items, description: items,
) -> Artifact:
    """Compile ``model`` (a module, a model.py or a diffusers folder) into the folder ``out``.

    ``passes`` (by default ``rotate,smooth,quant``) or ``recipe``, the name or file of one, say what
    is done; passes come as one text or as several. ``scheme`` is ``w8a8`` or texts ``glob=scheme``,
    later ones win; ``out`` defaults to ``<name>.vdqc``. Passes learn from the samples, or from the
    calls that ``record_pool`` left in the folder ``pool``; the graph is captured from the samples
    either way. ``mapped`` leaves a folder's weights on disk and streams them (by default where they
    exceed half of the free memory); ``aot`` adds an AOTInductor package, ``precompile`` the GPU
    kernels as machine code.
    Words and order are checked before the model is loaded, an existing ``out`` is refused unless
    ``force``, and nothing is left behind if anything fails, but for a streamed model: what is
    finished then stays in ``<out>.partial``, where the same call goes on unless ``fresh``. Under
    ``torchrun`` the first worker writes ``out``, the others train with it, or share the weights of
    a streamed model. Raises VdqcError.
    """
    diagnostics = diagnostics or Diagnostics()
    check_seed(seed, "seed")
    plan = parse_recipe(passes, scheme, recipe)
    tell_of_untrained(plan.passes, diagnostics)
    machine = usable_target(target, diagnostics)
    if precompile:
        check_precompiles(machine)
    if aot:
        check_packages(machine)
    place = own_place(out_folder(model, out))
    calls = None if pool is None else open_pool(Path(pool))
    with ExitStack() as kept, artifact.staging(place, force) as folder:
        kept.enter_context(surroundings_kept(model))
        source = as_source(model, samples, component, mapped)
        refuse_bypassed_hooks(source.model, diagnostics)
        expected = float_output(source) if verify else None
        graph, captured = capture_source(source, diagnostics)
        transforms.start(graph)
        if graph.stored:  # larger than memory, perhaps: then so is what the passes make of it
            verify = probe_stored(verify, aot, diagnostics)
            asked: dict[str, Any] = {
                "recipe": str(plan),
                "rules": [str(rule) for rule in plan.rules],
            }
            asked |= {"target": str(machine), "seed": seed, "component": component}
            files = [] if calls is None else [calls.folder / INDEX]
            asked |= run_facts(graph.stored, source.samples, files)
            group = kept.enter_context(workers("gloo"))
            beside = out_folder(model, out)
            graph.finished = kept.enter_context(
                resumable(beside, asked, diagnostics, fresh=fresh, group=group)
            )
            graph.spill = graph.finished.values
            return_freed_memory()
        check_weights(graph, progress)
        ctx = Context(source.samples, machine, diagnostics, plan.rules, seed, progress)
        if calls is not None:
            ctx.use(calls)
        texts = IRTexts({"00_captured": str(graph)})
        bytes_float = weight_bytes(graph)
        manager = PassManager(plan.passes, probe=verify, instruments=[texts])
        records = [captured, *manager.run(graph, ctx)]
        check_capture(graph, manager, expected)
        rows = site_rows(graph, records)
        with sized_like(graph, source.samples[0].inputs):
            between = between_sites(graph)
            choices, lowered = lower_checked(graph, ctx, manager)
        texts.after_pass(lowered, graph)
        if graph.finished is not None and not is_first_worker():
            artifact.write_share(graph, progress=progress)  # the first one does the rest
            place = out_folder(model, out)
        else:
            facts = {
                "name": source.name,
                "seed": seed,
                "bytes_float": bytes_float,
                "sites": with_kernels(rows, choices),
                "between": between,
            }
            if precompile:
                calls_made = [sample.inputs for sample in source.samples]
                if calls is not None:
                    calls_made += [calls[index].inputs for index in calls.one_of_each_size()]
                compile_kernels(graph, machine, folder / CUBINS, diagnostics, calls_made)
            artifact.write(
                graph,
                folder,
                recipe=plan,
                records=[*records, lowered],
                choices=choices,
                diagnostics=[entry for entry in diagnostics if entry.code not in SAID],
                ir_texts=texts.texts,
                facts=facts,
                target=machine,
                progress=progress,
            )
            transforms.write(graph.transforms, folder)
            save_probe(graph, source.samples[0], folder)
            if aot:
                inputs = graph.signature.bind((), source.samples[0].inputs)
                package(graph, machine, inputs, folder / PACKAGE)
            report.write(folder)
            layout.describe(folder, graph.origin, machine)
            artifact.seal(folder, progress)
    return artifact.read(place)


def record_pool(
    model: str | Path,
    folder: str | Path,
    seeds: Sequence[int],
    *,
    component: str | None = None,
    progress: Progress = lambda items, description: items,
) -> Pool:
    """The calls that the sampler of a model.py makes from ``seeds``, kept in ``folder``.

    Goes on where an earlier recording was interrupted. Raises InputError for a source without
    ``generate(model, seed)``.
    """
    source = as_source(model, None, component)
    if source.generate is None:
        raise InputError(
            f"expected generate(model, seed) in {model}, which runs the sampler; found none",
            "write it, or give the passes samples that you collected",
        )
    with users_code("generate()", "check that it runs with the float model"):
        return record(source.model, source.generate, seeds, Path(folder), progress=progress)


def parse_recipe(
    passes: str | Sequence[str] | None,
    scheme: str | Sequence[str] | None,
    recipe: str | None = None,
) -> Recipe:
    """The complete recipe for a pass list or a named recipe; raises ConfigError or OrderError.

    A scheme that is given wins over the named recipe's own; globs alone add to it.
    """
    if passes is not None and recipe is not None:
        raise ConfigError(
            "expected a pass list or a recipe, got both",
            f"'vdqc recipes {recipe}' prints its passes, to be edited",
        )
    found = NamedRecipe("", (DEFAULT_PASSES,)) if recipe is None else named(recipe)
    given = [scheme] if isinstance(scheme, str) else list(scheme or [])
    whole = any("=" not in text or text.startswith("*=") for text in given)
    schemes = given if whole else [*found.scheme, *given]
    return complete(Recipe.parse(found.pass_list if passes is None else passes, PASSES, schemes))


def complete(recipe: Recipe) -> Recipe:
    """``recipe`` with what always runs: canonicalize, annotate, and fold where it belongs.

    annotate comes behind passes that respell a captured graph. fold goes last, and before the
    first lossy pass if exact ones precede it: behind a quantiser hardly anything can be absorbed
    without changing codes. A pass that the user named stays where it is. Raises OrderError for an
    impossible order.
    """
    present = {item.name for item in recipe.passes}
    passes = list(recipe.passes)
    if "annotate" not in present:
        early = itertools.takewhile(lambda item: max(item.at) is Stage.CAPTURED, passes)
        passes.insert(len(list(early)), load_pass("annotate", PASSES)())
    if "canonicalize" not in present:
        passes.insert(0, load_pass("canonicalize", PASSES)())
    final = check_order(passes)
    fold = load_pass("fold", PASSES)
    if "fold" not in present and final in fold.at:
        lossy = next((i for i, item in enumerate(passes) if not item.exact), len(passes))
        if lossy < len(passes) and passes[lossy - 1].name != "annotate":
            passes.insert(lossy, fold())
        passes.append(fold())
    check_order(passes)
    return replace(recipe, passes=tuple(passes))


def usable_target(text: str, diagnostics: Diagnostics) -> Target:
    """The target that ``text`` names; a remark where this machine cannot run its kernels."""
    target = Target.parse(text)
    if target.device == "cuda" and not torch.cuda.is_available():
        diagnostics.remark(
            "",
            "no-gpu",
            f"compiling for {target} on a machine without a GPU: what runs here runs through the "
            "kernels' references",
        )
    return target


def out_folder(model: nn.Module | str | Path, out: str | Path | None) -> Path:
    """Where the artifact goes: ``out``, else ``<stem>.vdqc`` in the current folder."""
    if out is not None:
        return Path(out)
    name = type(model).__name__ if isinstance(model, nn.Module) else Path(model).absolute().stem
    return Path(f"{name}.vdqc")


def as_source(
    model: nn.Module | str | Path,
    samples: Iterable[Sample] | None,
    component: str | None = None,
    mapped: bool | None = None,
) -> Source:
    """Model and samples, from a file, a folder, or as they were given."""
    if not isinstance(model, nn.Module):
        if samples is not None:
            raise InputError(f"expected no samples beside {model}, which brings its own")
        return load_source(Path(model), component=component, mapped=mapped)
    if component is not None:
        raise InputError(f"expected no component beside a module, got '{component}'")
    if samples is None:
        raise InputError("expected samples of the model's calls", "pass samples=[Sample({...})]")
    calls = [samples] if isinstance(samples, Sample) else list(samples)
    model = unwrapped(model)
    check_samples(model, calls)
    return Source(model.eval(), calls, name=type(model).__name__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` and the data-parallel wrappers make, which take any
    arguments.
    """
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def capture_source(source: Source, diagnostics: Diagnostics) -> tuple[Graph, PassRecord]:
    """The graph of a source, and what capture did; weights that were left on disk stay there."""
    start = time.perf_counter()
    graph = capture(source.model, source.samples, diagnostics, source.stored)
    seconds = time.perf_counter() - start
    return graph, PassRecord("capture", True, Stage.CAPTURED, seconds, len(graph.nodes))


def probe_stored(verify: bool, aot: bool, diagnostics: Diagnostics) -> bool:
    """Whether a graph whose weights are on disk is probed: no, each probe would read them all.

    Raises InputError if ``aot`` is asked for, which compiles the weights into the package.
    """
    if aot:
        raise InputError(
            "expected weights in memory for --aot, got weights that stay on disk",
            "compile without --aot: the artifact runs under torch.compile as well",
        )
    if verify:
        diagnostics.warning(
            "",
            "not-probed",
            "the weights stay on disk, so no pass was checked by running the model",
            "vdqc check compares the artifact with the float model",
        )
    return False


def save_probe(graph: Graph, sample: Sample, folder: Path) -> None:
    """Keep the first sample's tensors beside the program, so that ``vdqc run`` needs no source."""
    values = graph.signature.bind((), sample.inputs)
    tensors = {
        # copies: a call may give one tensor under two names, which a file refuses
        entry.path: torch.as_tensor(value).detach().clone(memory_format=torch.contiguous_format)
        for entry, value in zip(graph.signature.inputs, values, strict=True)
    }
    place = folder / PROBE
    place.parent.mkdir()
    save_file(tensors, place)


@final
@dataclass
class IRTexts:
    """Instrument that keeps the printed IR after each pass."""

    texts: dict[str, str] = field(default_factory=dict)

    def before_pass(self, text: str, graph: Graph) -> None:
        """Nothing: the pass before this one already printed it."""

    def after_pass(self, record: PassRecord, graph: Graph) -> None:
        """Print the graph under the pass's number and name."""
        name = record.text.partition("{")[0]
        self.texts[f"{len(self.texts):02d}_{name}"] = str(graph)
