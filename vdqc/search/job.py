"""One model under search: what was measured and priced of it, and the choices made from that.

Error: InputError where a limit cannot be reached; it names the least that can.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from vdqc.base.diagnostics import Diagnostics, InputError
from vdqc.base.scheme import QuantScheme
from vdqc.base.target import Target
from vdqc.compile_checks import weight_bytes
from vdqc.compiler import complete
from vdqc.engine.named import NamedRecipe
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import Recipe, parse_passes, parse_rule
from vdqc.footprint import stored_bytes
from vdqc.ir.analysis.roles import CONVOLUTIONS_MATTER, convolution_share, find_roles
from vdqc.ir.graph import Graph
from vdqc.ir.peers import quantised_groups
from vdqc.ir.sample import Sample
from vdqc.ir.site import Site, SiteKind
from vdqc.lowering.lower import lower
from vdqc.lowering.machine import measured
from vdqc.passes.table import PASSES
from vdqc.search.budget import Budget, shown
from vdqc.search.cost import FLOAT, Account, Bill, Transforms, Way, convolution_us
from vdqc.search.results import Applied, Point
from vdqc.search.sensitivity import Measured, legal, mean_error, measure, outputs, spread
from vdqc.search.solve import UNLIMITED, Axis, Option, solve, total
from vdqc.search.writing import recipe_of
from vdqc.text import decibel

#: Samples that the whole model is run on.
PROBES = 4
#: Points of the front.
POINTS = 10
#: Choices that are carried out, at most, to reach a floor with the fewest bytes.
_TRIES = 4
#: How often a choice is made anew because what folds away depends on neighbours.
_ROUNDS = 6

_LEAST_ERROR: tuple[Axis, ...] = ("error", "bytes", "us")
_LEAST_BYTES: tuple[Axis, ...] = ("bytes", "us", "error")
_LEAST_TIME: tuple[Axis, ...] = ("us", "error", "bytes")

Progress = Callable[[Any, str], Any]


@final
class Job:
    """What was measured and priced of one model, and the choices made from it."""

    def __init__(
        self,
        name: str,
        captured: Graph,
        samples: Sequence[Sample],
        schemes: Sequence[QuantScheme],
        target: Target,
        diagnostics: Diagnostics,
        seed: int,
        progress: Progress,
    ) -> None:
        self.name, self.captured, self.samples = name, captured, samples
        self.target, self.seed, self.progress = target, seed, progress
        self.bytes_float = weight_bytes(captured)
        self.probes = spread(samples, PROBES)
        self.expected = outputs(captured, self.probes)
        self.schemes = schemes
        self._ctx = Context(samples, target, diagnostics, [parse_rule("w8a8")], seed, progress)
        self.graph = captured.clone()
        self.convolutions = self._read()
        self.groups = quantised_groups(self.graph)
        if not self.groups:
            raise InputError("expected linears to quantise, found none", code="nothing-to-search")
        self.account = Account(self.graph, target, Transforms({}, {}, {}), self.convolutions)

    def _read(self) -> dict[str, float]:
        """Annotate the graph; the convolutions that were made linears, if they matter, and what
        they cost in float.
        """
        self._run("canonicalize")
        found: dict[str, float] = {}
        if convolution_share(self.graph, find_roles(self.graph)) > CONVOLUTIONS_MATTER:
            before = self.graph.clone()
            self._run("im2col")
            found = convolution_us(before, self.graph, self.target)
        self._run("annotate")
        return found

    def _run(self, text: str) -> None:
        PassManager(parse_passes(text, PASSES), probe=False).run(self.graph, self._ctx)

    def measure(self) -> None:
        """Measure and price every way of every group: before anything is chosen."""
        quantising = [scheme for scheme in self.schemes if not scheme.is_none]
        self.measured: Measured = measure(self.graph, self._ctx, self.probes, quantising)
        transforms = self.measured.transforms
        self.account = Account(self.graph, self.target, transforms, self.convolutions)
        self.base: Bill = self.account.whole([])  # what options are added to
        self.ways = []
        for group in self.groups:
            plain, local = self._plain(group), self.measured.local[group[0].name]
            kept = [way for way in local if Way(way.scheme) in plain]
            self.ways.append([*kept, FLOAT] if FLOAT in plain else kept)
        self.options = [
            [self._option(group, way) for way in ways]
            for group, ways in zip(self.groups, self.ways, strict=True)
        ]

    def _plain(self, group: Sequence[Site]) -> list[Way]:
        """The ways of ``group`` without transforms that a kernel of the target runs."""
        texts = legal([scheme for scheme in self.schemes if not scheme.is_none], group[0])
        found = {text: [self.account.quantised(site, text)[0] for site in group] for text in texts}
        ways = [Way(text) for text in texts if not any(choice.fallback for choice in found[text])]
        if any(scheme.is_none for scheme in self.schemes):
            return [*ways, FLOAT]
        if not ways:
            raise InputError(
                f"no kernel of {self.target} runs any of the schemes: {found[texts[0]][0].why}",
                "name others with --schemes, or add none",
                site=group[0].name,
            )
        return ways

    def _option(self, group: Sequence[Site], way: Way) -> Option:
        name = group[0].name
        error = 0.0 if way == FLOAT else self.measured.gain[name] * self.measured.local[name][way]
        bill = self._bill(group, way)
        return Option(error, bill.bytes, bill.us)

    def _bill(self, group: Sequence[Site], way: Way) -> Bill:
        return self.account.alone(self.groups, group, way)

    # -- choosing -----------------------------------------------------------------------------

    def choose(self, budget: Budget, apply: bool) -> tuple[Point, Applied | None]:
        """The best point within ``budget``, carried out if ``apply``."""
        limits, order = self.limits(budget), self.order(budget)
        self.check_budget(budget)
        self._check_floor(budget)
        point = self.best(limits, order)
        if point is None:
            raise InputError(*self._out_of_reach(budget, limits), code="budget")
        if not apply:
            return point, None
        applied = self.apply(point)
        if budget.floor_db is None or order is _LEAST_ERROR:
            return point, applied
        return self._reach(budget, point, applied)

    def _reach(self, budget: Budget, point: Point, applied: Applied) -> tuple[Point, Applied]:
        """The smallest choice whose measured error keeps to the floor, from a first one.

        Measured over predicted error moves the limit of the next choice; once one choice was kept
        and one missed, the next limit is between theirs.
        """
        floor = limit = budget.floor_error
        kept, missed = 0.0, math.inf
        tried = {point.ways: (point, applied)}
        while len(tried) < _TRIES and point.error > 0 and applied.error > 0:
            if applied.error <= floor:
                kept = max(kept, limit)
            else:
                missed = min(missed, limit)
            bracketed = kept > 0 and missed < math.inf
            limit = math.sqrt(kept * missed) if bracketed else floor * point.error / applied.error
            if limit <= kept:
                break
            again = self.best(Option(limit, math.inf, math.inf), _LEAST_BYTES)
            if again is None or again.ways in tried:
                break
            point, applied = again, self.apply(again)
            tried[point.ways] = point, applied
        good = [pair for pair in tried.values() if pair[1].error <= floor]
        if not good:
            return min(tried.values(), key=lambda pair: pair[1].error)
        return min(good, key=lambda pair: pair[0].bytes)

    def limits(self, budget: Budget) -> Option:
        """``budget`` in bytes, microseconds and relative squared error of the whole model."""
        return Option(
            budget.floor_error,
            math.inf if budget.size is None else budget.size.of(self.bytes_float),
            math.inf if budget.time is None else budget.time.of(self.account.float_us),
        )

    def order(self, budget: Budget) -> tuple[Axis, ...]:
        """A budget is spent on quality; a floor alone is reached with the fewest bytes."""
        return _LEAST_BYTES if budget.size is None and budget.time is None else _LEAST_ERROR

    def best(self, limits: Option, order: Sequence[Axis] = _LEAST_ERROR) -> Point | None:
        """The best choice whose exact bill keeps to ``limits``; None if there is none.

        What ``fold`` takes away depends on neighbours, so a choice is priced as a whole and the
        solver's limits are moved by what that differs from its sums, until they agree.
        """
        room = Option(limits.error, limits.bytes - self.base.bytes, limits.us - self.base.us)
        for _ in range(_ROUNDS):
            choice = solve(self.options, room, order)
            if choice is None:
                return None
            sums = total(self.options, choice)
            point = self.point(choice)
            over = point.bytes - limits.bytes, point.us - limits.us * (1 + 1e-9)
            if max(over) <= 0:
                return point
            # the sum that was over is the least bound that still lets others in
            room = replace(
                room,
                bytes=sums.bytes - max(over[0], 1) if over[0] > 0 else room.bytes,
                us=sums.us - over[1] if over[1] > 0 else room.us,
            )
        return None

    def point(self, choice: Sequence[int]) -> Point:
        """The choice of these options, with its exact bill."""
        ways = tuple(own[i] for own, i in zip(self.ways, choice, strict=True))
        bill = self.account.whole(list(zip(self.groups, ways, strict=True)))
        return Point(ways, total(self.options, choice).error, bill.bytes, bill.us)

    def front(self, budget: Budget, chosen: Point) -> tuple[Point, ...]:
        """Least error for sizes from the least to the float model's, or for times if only those
        are limited; what else the budget says holds for all of them.
        """
        by_time = budget.size is None and budget.time is not None
        axis: Axis = "us" if by_time else "bytes"
        rest = replace(self.limits(budget), error=math.inf, **{axis: math.inf})
        least = self.best(rest, _LEAST_TIME if by_time else _LEAST_BYTES)
        most = self.best(rest)
        if least is None or most is None:
            return (chosen,)
        low, high = getattr(least, axis), getattr(most, axis)
        found = {point.ways: point for point in (least, most, chosen)}
        steps = range(1, POINTS - 1) if high > low > 0 else ()
        for step in self.progress(steps, "front"):
            amount = low * (high / low) ** (step / (POINTS - 1))
            point = self.best(replace(rest, **{axis: amount}))
            if point is not None:
                found[point.ways] = point
        return tuple(sorted(found.values(), key=lambda p: (getattr(p, axis), p.error)))

    # -- refusing -----------------------------------------------------------------------------

    def check_budget(self, budget: Budget) -> None:
        """Raise InputError naming the least that size or time alone can be brought to.

        Measures nothing: a transform never makes a group smaller or faster.
        """
        limits = self.limits(budget)
        for key, axis, whole in (
            ("size", "bytes", self.bytes_float),
            ("time", "us", self.account.float_us),
        ):
            limit = getattr(limits, axis)
            if math.isinf(limit):
                continue
            ways = []
            for group in self.groups:
                bills = {way: self._bill(group, way) for way in self._plain(group)}
                ways.append(min(bills, key=lambda way: getattr(bills[way], axis)))
            bill = self.account.whole(list(zip(self.groups, ways, strict=True)))
            least = getattr(bill, axis)
            if least > limit:
                mix = Point(tuple(ways), 0.0, bill.bytes, bill.us).mix
                raise InputError(
                    f"{key} {shown(key, limit, whole)} cannot be reached: the least is "
                    f"{shown(key, least, whole)}",
                    f"with the schemes {mix}; name narrower ones with --schemes",
                    code="budget",
                )

    def _check_floor(self, budget: Budget) -> None:
        best = self.best(UNLIMITED)
        assert best is not None
        if best.error > budget.floor_error:
            raise InputError(
                f"an SQNR of {budget.floor_db:g} dB cannot be reached: the best is predicted at "
                f"{best.sqnr_db:.1f} dB",
                "name wider schemes with --schemes, or none",
                code="floor",
            )

    def _out_of_reach(self, budget: Budget, limits: Option) -> tuple[str, str]:
        """Why limits that can each be reached cannot be reached together, and what could be."""
        best = self.best(replace(limits, error=math.inf))
        if best is not None:
            return (
                f"an SQNR of {budget.floor_db:g} dB cannot be reached within the budget: the best "
                f"is predicted at {best.sqnr_db:.1f} dB",
                "lower the floor, or spend more",
            )
        fastest = self.best(replace(limits, error=math.inf, us=math.inf), _LEAST_TIME)
        assert fastest is not None
        return (
            "size and time can each be reached, but not together: at that size the least time is "
            + shown("time", fastest.us, self.account.float_us),
            "raise one of them, or name other schemes with --schemes",
        )

    # -- carrying out -------------------------------------------------------------------------

    def recipe(self, point: Point, about: str = "", after: Sequence[str] = ()) -> NamedRecipe:
        """The recipe of ``point``."""
        names = [[site.name for site in group] for group in self.groups]
        inside = {site for group in names for site in group}
        others = [s.name for s in self.graph.sites(kind=SiteKind.LINEAR) if s.name not in inside]
        ways = list(zip(names, point.ways, strict=True))
        return recipe_of(
            ways,
            others,
            convolutions=self.convolutions,
            name=f"{self.name}-search",
            about=about,
            after=after,
        )

    def apply(
        self, point: Point, after: Sequence[str] = (), diagnostics: Diagnostics | None = None
    ) -> Applied:
        """Carry ``point`` out on a copy of the graph, as ``compile`` will."""
        said = Diagnostics() if diagnostics is None else diagnostics
        recipe = self.recipe(point, after=after)
        plan = complete(Recipe.parse(recipe.pass_list, PASSES, recipe.scheme))
        graph = self.captured.clone()
        ctx = Context(self.samples, self.target, said, plan.rules, self.seed, self.progress)
        with tempfile.TemporaryDirectory(prefix="vdqc-search-") as place:
            if graph.stored:  # larger than memory, perhaps: then so is what the passes make of it
                graph.spill = Path(place)
            PassManager(plan.passes, probe=False).run(graph, ctx)
            error = mean_error(outputs(graph, self.probes), self.expected)
            attention = {site.name for site in graph.sites(kind=SiteKind.ATTENTION)}
            choices = lower(graph, self.target, Diagnostics(), progress=self.progress)
            machine = measured(self.target)
            us = sum(c.priced(machine).predicted_us for c in choices if c.site in attention)
            return Applied(error, stored_bytes(graph), us)

    def missed(self, budget: Budget, applied: Applied) -> list[str]:
        """What ``applied`` does not reach."""
        limits, found = self.limits(budget), []
        if applied.error > limits.error:
            found.append(
                f"measured SQNR {applied.sqnr_db:.1f} dB is below the floor of "
                f"{budget.floor_db:g} dB"
            )
        if applied.bytes > limits.bytes:
            found.append(
                f"measured size {shown('size', applied.bytes, self.bytes_float)} is over the budget"
            )
        return found

    def about(self, budget: Budget, point: Point, applied: Applied | None) -> str:
        """One sentence for the recipe: the budget, what was predicted and what was measured."""
        text = (
            f"Searched for {self.name} on {self.target} with {budget.text}: predicted "
            f"{shown('size', point.bytes, self.bytes_float)}, "
            f"{shown('time', point.us, self.account.float_us)}, SQNR {decibel(point.sqnr_db)}"
        )
        return f"{text}; measured {decibel(applied.sqnr_db)}." if applied else f"{text}."
