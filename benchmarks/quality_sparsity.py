"""The rows of the quality table that tell what sparsity costs, alone and with quantisation.

Each variant adds one part of QuantSparse to the one before. ``BLOCK_TOKENS`` make a block: the
digits model has 512 tokens, 16 blocks of 32, where a GPU's 128 would leave 4; the large one has
4096. ``msad`` learns
scales, rotations and clips on dense attention, as the paper does; ``joint`` learns them with the
masks in place, in the student and in the teacher's loss alone. Variants that learn the same share
what they learned through a checkpoint.

Source: Feng et al., QuantSparse, arXiv 2509.23681, section 3 and table 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdqc.ir.artifact import Artifact

SPARSE = "sparsify{{policy=svg,density={density},block={block}}}"
FIRST, SECOND = "reparameterize{{order=1}}", "reparameterize{{order=2,rank=16}}"
LINEAR = "reparameterize{{order=2,rank=16,extrapolation=linear}}"
NAIVE = "rotate,quant"
LEARNED = (
    "select{{method=random,count=20}},smooth{{alpha=0.5,learn=true}},rotate{{learn=true}},"
    "quant{{clip=learned}},"
)
BLOCK = LEARNED + "distill{{loss=block,epochs={epochs},checkpoint={folder}}}"
MSAD = LEARNED + "distill{{loss=block+auto*msad,epochs={epochs},checkpoint={folder}}}"
JOINT = LEARNED + SPARSE + ",distill{{loss=block,epochs={epochs},checkpoint={folder}}}"

#: By model. A training step of the large one takes 3.9 s of a core (15 epochs: two hours a recipe).
BLOCK_TOKENS = {"digits": 32, "large": 128}
EPOCHS = {"digits": 15, "large": 6}

#: Passes by name; those without a mask are measured once, at density 1.
VARIANTS = {
    "sparse": SPARSE,
    "sparse+first": f"{SPARSE},{FIRST}",
    "sparse+second": f"{SPARSE},{SECOND}",
    "sparse+linear": f"{SPARSE},{LINEAR}",
    "naive": NAIVE,
    "naive+sparse": f"{NAIVE},{SPARSE}",
    "naive+sparse+first": f"{NAIVE},{SPARSE},{FIRST}",
    "naive+sparse+second": f"{NAIVE},{SPARSE},{SECOND}",
    "learned": BLOCK,
    "learned+sparse": f"{BLOCK},{SPARSE}",
    "learned+sparse+second": f"{BLOCK},{SPARSE},{SECOND}",
    "msad": MSAD,
    "msad+sparse": f"{MSAD},{SPARSE}",
    "msad+sparse+first": f"{MSAD},{SPARSE},{FIRST}",
    "msad+sparse+second": f"{MSAD},{SPARSE},{SECOND}",
    "joint+sparse": JOINT,
    "joint+sparse+second": f"{JOINT},{SECOND}",
}


def is_sparse(name: str) -> bool:
    """True for a variant that has a density."""
    return "{density}" in VARIANTS.get(name, "")


def passes(name: str, model: str, density: float, checkpoints: Path, scheme: str, seed: int) -> str:
    """The pass list of a variant; what it learns is kept in ``checkpoints``."""
    learned = name.partition("+")[0]
    folder = checkpoints / f"{learned}-{scheme}-{seed}"
    if learned == "joint":
        folder = checkpoints / f"{learned}-{scheme}-{seed}-{density:g}"
    block, epochs = BLOCK_TOKENS[model], EPOCHS[model]
    return VARIANTS[name].format(density=density, block=block, epochs=epochs, folder=folder)


def facts(artifact: Artifact) -> dict[str, Any]:
    """Density as it was reached, over the whole run, and bytes kept between steps per branch."""
    found: dict[str, Any] = {}
    for record in artifact.manifest["passes"]:
        for part in (record["facts"], record["facts"].get("cache", {})):
            if "effective_density" in part:
                found["mask_density"] = round(part["mask_density"], 4)
                found["effective_density"] = round(part["effective_density"], 4)
            if "bytes_per_branch" in part:
                found["cache_bytes"] = part["bytes_per_branch"]
    return found
