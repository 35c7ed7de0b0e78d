"""What the user points at, to a model with samples: a ``model.py``, or a folder of weights.

``model.py`` protocol: ``model() -> nn.Module`` and ``samples() -> Iterable[Sample]``; optionally
``generate(model, seed) -> Tensor``, a whole sampling run, ``labels(seed)`` and
``accuracy(video, seed) -> float`` for what it shows.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, final

from torch import Tensor, nn

from vdqc.base.diagnostics import ConfigError, InputError, VdqcError
from vdqc.ir.folder import load_folder
from vdqc.ir.frontend import check_sample, forward_parameters
from vdqc.ir.origin import source_module
from vdqc.ir.sample import Sample
from vdqc.ir.weights import StoredTensor

#: A model of the Hub, ``organisation/name``.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.py)")


@final
@dataclass(frozen=True)
class Source:
    """A model, samples of its calls, and what else its author gave.

    Attributes:
        model: in eval mode; its parameters are on the meta device where ``stored`` has them.
        samples: at least one.
        name: stem of the file or folder.
        generate: a whole sampling run, ``(model, seed) -> video``.
        labels: what ``generate`` was asked for, ``(seed) -> labels``.
        accuracy: share of a generated batch that shows what it should, ``(video, seed) -> float``.
        folder: where it came from.
        stored: weights that stay on disk, by name.
    """

    model: nn.Module
    samples: Sequence[Sample]
    name: str = ""
    generate: Callable[[Any, int], Tensor] | None = None
    labels: Callable[[int], Any] | None = None
    accuracy: Callable[[Tensor, int], float] | None = None
    folder: Path | None = None
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)


def load_source(path: Path, *, component: str | None = None, mapped: bool | None = None) -> Source:
    """The source at ``path``: a python file, or a diffusers or transformers folder.

    ``component`` names one model of a pipeline folder (default transformer, else unet). ``mapped``
    leaves a folder's weights on disk; by default where they exceed half of the free memory.
    Raises ConfigError for a path that cannot be one, InputError for content that does not fit.
    """
    path = Path(path)
    if path.is_dir():
        model, samples, stored = load_folder(path, component, mapped)
        return Source(model, samples, path.absolute().name, folder=path, stored=stored)
    if not path.is_file():
        raise ConfigError(
            f"expected a model.py or a model folder at {path}, found nothing",
            f"nothing is fetched: hf download {path} --local-dir {path.name} (a gated model needs "
            "'hf auth login' and its licence accepted)"
            if _HUB_NAME.fullmatch(str(path))
            else "check the path",
        )
    if path.suffix != ".py":
        raise ConfigError(
            f"expected a python file or a folder, got {path.name}",
            "write a model.py with model() and samples(), or give the folder with config.json",
        )
    return _load_file(path)


def _load_file(path: Path) -> Source:
    with _importable(path.parent):
        module = _imported(path)
        make_model, make_samples = (_function(module, path, name) for name in ("model", "samples"))
        with _blame(path, "model()"):
            model = make_model()
        if not isinstance(model, nn.Module):
            raise InputError(f"expected model() to return an nn.Module, got {type(model).__name__}")
        with _blame(path, "samples()"):
            samples = list(make_samples())
    check_samples(model, samples)
    return Source(
        model.eval(),
        samples,
        path.absolute().parent.name if path.stem == "model" else path.stem,
        getattr(module, "generate", None),
        getattr(module, "labels", None),
        getattr(module, "accuracy", None),
        path.parent,
    )


def _imported(path: Path) -> ModuleType:
    """The file as a module of its own name, registered so that its dataclasses work."""
    name = source_module(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _blame(path, "the file"):
            spec.loader.exec_module(module)
    except VdqcError:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder's own modules can be imported, and no longer afterwards."""
    entry = str(folder.absolute())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


@contextmanager
def _blame(path: Path, what: str) -> Iterator[None]:
    """Turn an exception of the user's code into an InputError with the line that raised it."""
    try:
        yield
    except VdqcError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        if isinstance(error, SyntaxError):
            where = f"{path.name}:{error.lineno}  {(error.text or '').strip()}"
        else:
            where = f"{path.name}:{own[-1].lineno}  {own[-1].line}" if own else path.name
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{what} of {path.name} failed: {type(error).__name__}: {reason}",
            where,
            "run the file with python to see the whole traceback",
        ) from error


def _function(module: ModuleType, path: Path, name: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if not callable(function):
        returns = {"model": "nn.Module", "samples": "Iterable[vdqc.Sample]"}[name]
        raise InputError(
            f"expected {path.name} to define {name}(), it does not",
            f"add a function: def {name}() -> {returns}",
        )
    found: Callable[[], Any] = function
    return found


def check_samples(model: nn.Module, samples: Sequence[Any]) -> None:
    """Raise InputError unless there are samples, and ``forward`` takes the arguments of each."""
    if not samples:
        raise InputError("expected at least one sample of the model's calls, got none")
    parameters = forward_parameters(model)
    for index, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise InputError(
                f"expected every sample to be a vdqc.Sample, sample {index} is a "
                f"{type(sample).__name__}",
                'wrap the arguments of forward: Sample({"hidden_states": x, ...}, timestep=t)',
            )
        check_sample(sample, parameters)
