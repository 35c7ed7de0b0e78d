"""The recipe that carries out a choice: schemes by site, transforms by ``select``, as globs.

Sites that differ only in numbers (``blocks.3.attn1.to_q``) and are chosen alike become one glob
(``blocks.*.attn1.to_q``), where it matches nothing that was chosen otherwise; the rest are named.
``*=none`` comes first, so that a site that nothing was chosen for stays in float.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence

from vdqc.base.diagnostics import ConfigError
from vdqc.engine.named import NamedRecipe
from vdqc.search.cost import FLOAT, Way

#: What separates two fields of a pass, or has a meaning in a glob.
_RESERVED = re.compile(r"[\[\]{},|?*\s]")
#: Passes that change nothing: a recipe needs at least one.
_NOTHING = ("canonicalize", "annotate")
_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


def recipe_of(
    ways: Sequence[tuple[Sequence[str], Way]],
    others: Collection[str],
    *,
    convolutions: Collection[str] = (),
    name: str = "search",
    about: str = "",
    after: Sequence[str] = (),
) -> NamedRecipe:
    """The recipe for ``ways`` of groups, given by the names of their sites.

    ``others`` are the remaining linear sites, which no glob may reach by accident; ``convolutions``
    are the sites that ``im2col`` makes linears of, where they are quantised; ``after`` are passes
    that follow ``quant``. Raises ConfigError for a name that no pass list can hold.
    """
    for site in (site for group, _ in ways for site in group):
        if _RESERVED.search(site):
            raise ConfigError(
                f"site '{site}' cannot be named in a recipe", "its name holds a sign of a glob"
            )
    chosen = [(group, way) for group, way in ways if way != FLOAT]
    by_scheme: dict[str, list[str]] = {}
    for group, way in chosen:
        by_scheme.setdefault(way.scheme, []).extend(group)
    every = {site for group, _ in ways for site in group} | set(others)
    rules = ["*=none"]
    for scheme, sites in by_scheme.items():
        rules += [f"{glob}={scheme}" for glob in globs(sites, every - set(sites))]
    passes = []
    quantised = {site for group, _ in chosen for site in group}
    if respelled := [site for site in sorted(convolutions) if site in quantised]:
        kept = set(convolutions) - quantised
        passes.append(_selecting("im2col", globs(respelled, kept) if kept else []))
    for word, of in (("rotate", lambda way: way.rotated), ("smooth", lambda way: way.smoothed)):
        wanted = [group[0] for group, way in chosen if of(way)]
        banned = {site for group, way in chosen if not of(way) for site in group}
        if wanted:
            patterns = globs(wanted, banned | set(others)) if banned else []
            passes.append(_selecting(word, patterns))
    passes += ["quant"] if chosen else []
    return NamedRecipe(name, (*passes, *after) or _NOTHING, tuple(rules), about)


def _selecting(word: str, patterns: Sequence[str]) -> str:
    return f"{word}{{select={'|'.join(patterns)}}}" if patterns else word


def globs(names: Iterable[str], banned: Collection[str]) -> list[str]:
    """Globs and names that match all of ``names`` and none of ``banned``."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_NUMBER.sub(r"\1*", name), []).append(name)
    made = []
    for glob, members in families.items():
        reaches = any(fnmatch.fnmatchcase(other, glob) for other in banned)
        made += members if reaches or len(members) == 1 else [glob]
    return made
