"""The module that stands in for a compiled model, made from an artifact alone.

It is called as the original was, returns what the original returned, and shows the attributes that
diffusers and transformers pipelines read; the original's source is neither needed nor imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.target import Target
from vdqc.hub import layout
from vdqc.hub.facade import facade
from vdqc.ir import artifact, transforms
from vdqc.ir.graph import Graph
from vdqc.lora import Adapters
from vdqc.lowering.prepare import compile_blocks, prepare
from vdqc.lowering.residual import has_residuals, split
from vdqc.packaged import PackagedProgram
from vdqc.placement import destination, following, name_device
from vdqc.residual_cache import ResidualCache
from vdqc.stand_in import TracedBinding, config_object, output_builder


def stand_in(graph: Graph, target: Target) -> CompiledModel:
    """The stand-in for a graph in memory."""
    made: Any = facade(CompiledModel, graph.origin.model_class)(graph, target)
    model: CompiledModel = made
    return model


class CompiledModel(nn.Module):
    """A compiled program behind the interface of the model it came from.

    Attributes:
        program: the program as a ``GraphModule``; its weights are the model's.
        signature: how it is called.
        origin: the class, configuration and dtype that it came from.
        target: the machine it was compiled for.
        config: the configuration, as the model's library presents it.
    """

    program: fx.GraphModule
    _prepared: nn.Module
    _reuse: nn.Module | None
    _eager: tuple[fx.GraphModule, fx.GraphModule]
    _cache: ResidualCache | None
    _package: PackagedProgram | None
    _folder: Path | None
    _adapters: Adapters | None
    _options: dict[str, Any]

    def __init__(self, graph: Graph, target: Target) -> None:
        nn.Module.__init__(self)  # not the original's, which would build it
        self.program = graph.module
        self.signature = graph.signature
        self.origin = graph.origin
        self.target = target
        self._internal_dict = config_object(graph.origin)
        self._binding = TracedBinding(graph.signature)
        self._build = output_builder(graph.signature)
        self._gradient_checkpointing_func = None  # diffusers asks every model for it
        self.__dict__["_package"] = self.__dict__["_folder"] = None
        self.__dict__["_reuse"] = self.__dict__["_cache"] = self.__dict__["_adapters"] = None
        self._prepare()
        self.register_state_dict_post_hook(_original_names)
        self.register_load_state_dict_pre_hook(_program_names)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's ``forward`` returns for this call; raises InputError if it differs
        from the calls that were captured in more than the sizes that may vary."""
        return_dict = self._return_dict(args, kwargs)
        if self._cache is not None:
            outputs = self._with_residuals(args, kwargs)
        elif torch.compiler.is_compiling():
            outputs = self._prepared(*self._binding.bind(args, kwargs))
        else:
            self._refuse_offloaded()
            inputs = self.signature.bind(args, kwargs)
            outputs = self._runner()(*inputs)
        return self._build(outputs, return_dict)

    def compile(self, **options: Any) -> None:
        """``torch.compile`` the program piece by piece; equal blocks are compiled once.

        Calls keep their full checks, which stay outside. ``options`` as for ``torch.compile``.
        """
        for program in (self._prepared, self._reuse):
            if program is not None:
                compile_blocks(program, **{"fullgraph": True, **options})
        self._compiled, self._options = True, options

    def compile_repeated_blocks(self, **options: Any) -> None:
        """As ``compile``; diffusers' name for it."""
        self.compile(**options)

    @property
    def prepared(self) -> nn.Module:
        """The form of the program that compilers see: kernels spelled out, blocks outlined."""
        return self._prepared

    @property
    def config(self) -> Any:
        """The original's configuration."""
        return self._internal_dict

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the program computes in."""
        dtype: torch.dtype = getattr(torch, self.origin.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        for tensor in [*self.parameters(), *self.buffers()]:
            return tensor.device
        return torch.device("cpu")

    def num_parameters(self, only_trainable: bool = False, **_: Any) -> int:
        """Number of stored values, packed ones counted as they are stored."""
        tensors = [*self.parameters(), *self.buffers()]
        return sum(t.numel() for t in tensors if t.requires_grad or not only_trainable)

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Names the branch of guidance that the calls inside belong to.

        Only residuals ask for it: step caches hook into the original's submodules.
        """
        if self._cache is None:
            yield
            return
        before, self._cache.name = self._cache.name, name
        try:
            yield
        finally:
            self._cache.name = before

    def reset_cache(self) -> None:
        """Forget the residuals of ``reparameterize``: the next call begins a video."""
        if self._cache is not None:
            self._cache.reset()

    @property
    def residual_cache(self) -> ResidualCache | None:
        """What chooses between dense and sparse steps; None without ``reparameterize``."""
        return self._cache

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "2GB",
        push_to_hub: bool = False,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write the artifact into ``save_directory`` as diffusers lays out a model.

        ``from_pretrained`` of the original's class and ``vdqc.load`` both read it. Weights are the
        model's as they are now. ``push_to_hub`` and ``kwargs`` as for ``push_to_hub``, with
        ``repo_id`` by default the folder's name.
        """
        if is_main_process:
            layout.save(self, self._source(), Path(save_directory), max_shard_size)
            if push_to_hub:
                options = {"repo_id": Path(save_directory).name, **kwargs}
                layout.upload(Path(save_directory), **layout.upload_options(options))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what ``save_pretrained`` writes to a repository of the Hub; its address.

        ``options``: ``commit_message``, ``private``, ``token``, ``create_pr``, ``subfolder``.
        """
        return layout.push(self, self._source(), repo_id, layout.upload_options(options))

    def _source(self) -> artifact.Artifact:
        if self._folder is None:
            raise InputError(
                "expected a model that was loaded from an artifact, got one made in memory",
                "vdqc.compile writes the artifact: load it, or copy its folder",
            )
        return artifact.read(self._folder, verify=False)

    def load_lora(
        self,
        source: str | Path | Mapping[str, Tensor],
        weight: float = 1.0,
        name: str = "default",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a LoRA adapter (a safetensors file, its folder, or tensors) to the program.

        Keys as diffusers, peft or kohya name them. It becomes a branch beside each layer, in the
        basis that the passes gave that layer; nothing is quantised again. A program that was
        compiled with ``compile`` compiles once more, not when the weight changes. Keys that name
        no linear layer are left out with a warning that lists them. ``metadata`` are entries of
        ``adapter_config.json`` (``lora_alpha`` ...), by default those that lie beside the factors.
        Raises InputError, ConfigError or ArtifactError, and then leaves the model as it was.
        """
        if self._package is not None:
            raise InputError(
                "an AOTInductor package takes no adapter: its program cannot be edited",
                "load the artifact without aot=True",
            )
        steps = transforms.read(self._source().path)
        adapters = self._adapters or Adapters(
            self.program, self.signature, self.origin, self.target
        )
        adapters.add(source, steps, weight, name, metadata)
        self.__dict__["_adapters"] = adapters
        self._rebuilt()

    def set_lora_weight(self, name: str, weight: float) -> None:
        """Scale what the adapter ``name`` adds, 0 for nothing; compiles nothing again."""
        self._loaded_adapters().set_weight(name, weight)
        self.reset_cache()

    def unload_lora(self, name: str | None = None) -> None:
        """Take the adapter ``name`` out again, or all of them."""
        adapters = self._loaded_adapters()
        for each in list(adapters.weights) if name is None else [name]:
            adapters.remove(each)
        self._rebuilt()

    @property
    def lora_weights(self) -> dict[str, float]:
        """Weights of the adapters that are loaded, by name."""
        return {} if self._adapters is None else dict(self._adapters.weights)

    def _loaded_adapters(self) -> Adapters:
        if self._adapters is None:
            raise ConfigError("no adapter is loaded", "load one with load_lora(file)")
        return self._adapters

    def _rebuilt(self) -> None:
        """Prepare the program anew after an edit or a move; compile it if it was compiled."""
        name_device(self.program, self.device)
        compiled = self._compiled
        self._prepare()
        if compiled:
            self.compile(**self._options)

    def extra_repr(self) -> str:
        """Class, dtype and target."""
        return f"{self.origin.model_class}, dtype={self.origin.dtype}, target={self.target}"

    def __repr__(self) -> str:
        return f"CompiledModel({self.extra_repr()})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """A copy with weights of its own; what compilers see is prepared anew, on these."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        kept = {name: v for name, v in self.__dict__.items() if name not in _DERIVED}
        copied.__dict__.update(copy.deepcopy(kept, memo), _reuse=None, _cache=None)
        copied._prepare()
        if self._compiled:
            copied.compile(**self._options)
        return copied

    def __copy__(self) -> CompiledModel:
        copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "a compiled model cannot be pickled: its kernels belong to the process that loaded it",
            "give the other process the folder, to vdqc.load; state_dict() can be pickled",
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        """Move the weights; what would also convert them is refused."""
        probe = destination(fn, self.dtype, self.target)
        if probe.dtype != self.dtype:
            raise InputError(
                f"the program computes in {self.dtype}, it cannot be converted to {probe.dtype}",
                f"compile the model again, loaded in {probe.dtype}",
            )
        if self._package is not None and probe.device != self.device:
            raise InputError(
                f"the package is for {self.device}, it cannot move to {probe.device}",
                "load without aot=True",
            )
        moved = probe.device != self.device
        with following(self._prepared, self.program):
            super()._apply(fn, recurse)
        edited = self._cache is not None or self._adapters is not None
        if name_device(self.program, probe.device) or (edited and moved):
            self._rebuilt()
        return self

    def _prepare(self) -> None:
        """Make the form that compilers see; it shares the program's weights and is not a child."""
        self._compiled = False
        if not has_residuals(self.program):
            self.__dict__["_prepared"] = prepare(self.program, self.target)
            return
        programs = split(self.program, self.device)
        self.__dict__["_eager"] = (programs.refresh, programs.reuse)
        self.__dict__["_prepared"] = prepare(programs.refresh, self.target)
        self.__dict__["_reuse"] = prepare(programs.reuse, self.target)
        cache = ResidualCache(programs.policy, programs.count, self.signature)
        self.__dict__["_cache"] = cache

    @torch.compiler.disable(reason="residuals are state: call compile() of the model instead")
    def _with_residuals(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        assert self._cache is not None
        refresh, reuse = (self._prepared, self._reuse) if self._compiled else self._eager
        assert reuse is not None
        return self._cache.run(self.signature.bind(args, kwargs), refresh, reuse)

    def _refuse_offloaded(self) -> None:
        """Sequential offload empties every submodule until that is called, which none is."""
        if self.device.type == "meta":
            raise InputError(
                "the weights are on the meta device: sequential offload moves them submodule by "
                "submodule, and a program runs as one",
                "use enable_model_cpu_offload on the pipeline, which moves the model as a whole",
            )

    def _runner(self) -> nn.Module:
        if self._package is not None:
            return self._package
        return self._prepared if self._compiled else self.program

    def _return_dict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        parameters = self.signature.parameters
        if "return_dict" not in parameters:
            return bool(kwargs.pop("return_dict", True))
        position = parameters.index("return_dict")
        default = self.signature.defaults.get("return_dict")
        given = args[position] if len(args) > position else kwargs.get("return_dict", default)
        return True if given is None else bool(given)


_PROGRAM = "program."
#: Attributes that ``_prepare`` makes from the others.
_DERIVED = ("_prepared", "_reuse", "_eager", "_cache")


def _original_names(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    for key in [key for key in state if key.startswith(prefix + _PROGRAM)]:
        state[prefix + key.removeprefix(prefix + _PROGRAM)] = state.pop(key)


def _program_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + _PROGRAM + key.removeprefix(prefix)] = state.pop(key)
