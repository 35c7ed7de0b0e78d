"""Recipes with one part taken out or changed: the rows that tell which part does the work.

``qvdit-tqe`` is the recipe ``qvdit`` without its token-aware branch, ``composed-epochs=40`` the
recipe ``composed`` with that option. Without a selector, samples are drawn evenly, as many as every
recipe gets that has none.
"""

from __future__ import annotations

from vdqc.base.diagnostics import ConfigError
from vdqc.engine.named import named

#: Steps learned in place of rounding, at the rates of Q-VDiT's released code.
STEPS = (
    ("rounding=learned", "step=learned"),
    ("branch_rate=1e-3", "rate=1e-5,clip_rate=1e-6,branch_rate=1e-5"),
)
#: The same, the branches at the house's rate.
FASTER = (STEPS[0], ("branch_rate=1e-3", "clip_rate=1e-6"))
#: A branch inside the quantiser of the weight, as the released code has it.
INNER = ("split{", "split{branch=oolri,placement=inner},split{")
MORE = ("smooth{search", "select{method=uniform,count=96},smooth{search")
#: Weights that do not take up what earlier ones lost: GPTQ as its paper has it.
PLAIN = ("gptq{propagate=0.5}", "gptq")
#: How ``searched`` begins: a rotation between two scales.
TURNED = "smooth{search=20},rotate{block=full},smooth{search=20},"
#: The scale behind alone, as this recipe had it first.
BEHIND = (TURNED, "rotate{block=full},smooth{search=20},")
#: How ``searched`` ends, and AdaRound in its place.
FINISH = "quant{weight_range=mse},gptq{propagate=0.5}"
ROUNDED = "quant{weight_range=mse,rounding=learned},distill{loss=block"

#: By recipe and part: the texts of the pass list that are replaced, and what replaces them.
ABLATIONS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "qvdit": {
        "tqe": (("split{branch=tqe},", ""),),
        "tmd": (("block+100*tmd", "block"),),
        "branch_rate=1e-2": (("1e-3", "1e-2"),),
        "branch_rate=1e-4": (("1e-3", "1e-4"),),
        "smooth": (("smooth{alpha=0.11},", ""),),
        "steps": STEPS,
        "steps=fast": (STEPS[0], (",branch_rate=1e-3", "")),
        "steps+inner": (*FASTER, INNER),
        "steps+inner+model": (*FASTER, INNER, ("distill{", "distill{mode=model,")),
    },
    "s2q_vdit": {
        "hsds": (("select{method=salient,count=40},", ""),),
        "std": (("distill{loss=std}", "distill{loss=block}"),),
        "scale": (("smooth{alpha=0.5,learn=true},", ""),),
        "rotation": (("rotate{learn=true},", ""),),
        "gptq": ((",gptq", ""),),
    },
    "quantvggt": {
        "nfds": (("select{method=nfds,count=40},", ""),),
        "rotation": (("rotate{block=full},", ""),),
        "scale": (("smooth{alpha=0.5,learn=true},", ""),),
        "clip": (("quant{clip=learned}", "quant"),),
        "distill": ((",distill{loss=block}", ""),),
    },
    "mpq_dm": {
        "rows": (("allocate{method=rows},", ""),),
        "branch": (("split{branch=oolri,placement=inner},", ""),),
        "trd": (("block+100*trd", "block"),),
    },
    "mpq_dmv2": {
        "planes": (("allocate{method=planes},", ""),),
        "branch": (("split{branch=oolri,placement=inner},", ""),),
        "mtrd": (("block+0.1*mtrd", "block"),),
        # the weight that this recipe had first
        "mtrd=1": (("0.1*mtrd", "mtrd"),),
        "mtrd=1-planes": (("0.1*mtrd", "mtrd"), ("allocate{method=planes},", "")),
        "mtrd=1-branch": (("0.1*mtrd", "mtrd"), ("split{branch=oolri,placement=inner},", "")),
    },
    "searched": {
        "rotation": ((TURNED, "smooth{search=20},"),),
        "scales": ((TURNED, "rotate{block=full},"),),
        "front": (BEHIND,),
        "front+propagate": (BEHIND, PLAIN),
        "front+rounding": (BEHIND, (FINISH, f"{ROUNDED}}}")),
        "front+rounding=model": (BEHIND, (FINISH, f"{ROUNDED},mode=model}}")),
        "behind": ((TURNED, "smooth{search=20},rotate{block=full},"),),
        "propagate": (PLAIN,),
    },
    "composed": {
        "search": (("smooth{search=20,learn=true}", "smooth{alpha=0.5,learn=true}"),),
        "rotation": (("rotate{learn=true}", "rotate{block=full}"),),
        "range": (("quant{weight_range=mse,clip=learned}", "quant{clip=learned}"),),
        "count=96": (MORE,),
        "gptq": ((",gptq{propagate=0.5}", ""),),
        "propagate": (PLAIN,),
        "propagate+epochs=40": (PLAIN, ("loss=block", "loss=block,epochs=40")),
        "propagate+mode=model": (PLAIN, ("loss=block", "loss=block,mode=model")),
        "propagate+loss=std": (PLAIN, ("loss=block", "loss=std")),
        "propagate+distill": (PLAIN, (",distill{loss=block}", "")),
        "propagate+count=96": (PLAIN, MORE),
        "propagate+loss=std+count=96": (PLAIN, ("loss=block", "loss=std"), MORE),
    },
}


def names(recipe: str) -> list[str]:
    """All ablations of a recipe."""
    return [f"{recipe}-{part}" for part in ABLATIONS.get(recipe, {})]


def is_ablation(name: str) -> bool:
    """True for ``<recipe>-<part>``."""
    recipe, _, part = name.partition("-")
    return part in ABLATIONS.get(recipe, {})


def ablated(name: str) -> tuple[str, tuple[str, ...]]:
    """(pass list, scheme and rules of the recipe) of an ablation.

    Raises ConfigError where the recipe's file has changed under it.
    """
    recipe, _, part = name.partition("-")
    own = named(recipe)
    text = own.pass_list
    for old, new in ABLATIONS[recipe][part]:
        if text.count(old) != 1:
            raise ConfigError(f"{name}: expected '{old}' once in the recipe, got {text}")
        text = text.replace(old, new)
    return text, own.scheme
