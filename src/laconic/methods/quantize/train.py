"""Quantisation-aware training: the network learns with the grids that it will run on.

Every chosen weight, and the tensor in front of its operator, is rounded to few codes in the forward
pass; gradients go straight through the rounding, and the steps of the grids train with the weights
(LSQ, Esser et al., arXiv 1902.08153), or the ends of the activations' grids do (PACT, Choi et al.,
arXiv 1805.06085). The targets are the outputs of the float original (`distill.logits`), mixed with
labels by `alpha`. Bits may fall during the run (`lowering`), weights that jump between two codes
can be damped or frozen (Nagel et al., arXiv 2203.08453). `ternary` has the codes -1, 0 and 1 with
one trained step (TWN, Li et al., arXiv 1605.04711, with LSQ's step); with "two-sided" the positive
and the negative value train by themselves (TTQ, Zhu et al., arXiv 1612.01064), and a weight ends as
a codebook of three values.

Batch norm stays while the network trains, so that it follows the changing weights, and is folded
into the steps at the end, which keeps every code. The result is a Program as `quantize.static`
makes it: integer kernels at 8 bits, fewer bits in files and as 8-bit codes in runtimes.

Helps: below 5 bits for weights, below 8 for activations, where no rounding after training is good
enough; networks that `quantize.static` harms. Does not: at 8 bits, where `quantize.static` costs
nothing; without a few thousand steps at 2 and 3 bits; with few samples.
Cost: that of the training, about half as much again for each step for rounding weights and
activations, and one pass over `samples` for the first ranges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import fx

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import (
    learned_steps,
    norm_signs,
    placement,
    ranges,
    ternary_layers,
)
from laconic.solvers.quantization.grid_training import GridTraining, GridWork, opened
from laconic.solvers.quantization.learned_grids import Course, LearnedGrids
from laconic.solvers.quantization.learned_steps import Clipping, Ends, Initial
from laconic.solvers.quantization.oscillation import Damping
from laconic.solvers.quantization.placement import Place
from laconic.solvers.quantization.ranges import Grid
from laconic.solvers.quantization.ternary_layers import TernaryWeight
from laconic.solvers.quantization.weight_sites import choose_sites, weight_sites
from laconic.statistics.histogram import Histogram


class QuantizeTrain(GridTraining, Method):
    """Options of `quantize.train`; see `GridTraining`, `Learning` and `Plan` for the training's.

    Sites are weights; all float parameters are trained. Weights and activations that stand on a
    grid already keep its bits, and their steps train too.

    Attributes:
        bits: of the weights.
        activations: bits of what goes into the operators; None leaves it float. With 8, residual
            additions and pools between them are rounded too, so that runtimes stay in integers.
        first_last: bits of the first and of the last weight and its input; None: like the rest.
        ternary: weights of 2 bits have the codes -1, 0 and 1 only; "two-sided": three values, of
            which the positive and the negative one train by themselves (no grid, so no `lowering`).
        threshold: of "two-sided": from which part of its largest magnitude on a weight is not 0.
        per_channel: a step for each output channel, not one for the tensor.
        initial: where the steps begin: the least squared error ("mse"), or `2 mean |x| /
            sqrt(largest code)` ("lsq").
        clipping: what moves the steps of activations: the rounding of all values ("lsq"), or only
            what is clipped at the upper end ("pact", of activations that are not negative).
        lowering: bits before the last ones, [8, 4] for example; `bits` and `activations` follow.
        lowered: part of the steps after which the bits are the last ones.
        damping: of weights that jump between two codes: "none", "damp" or "freeze".
        damping_strength: of "damp", in the last step.
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"steps": 4, "samples": 8}

    bits: int = Field(default=4, ge=2, le=8)
    activations: int | None = Field(default=None, ge=2, le=8)
    first_last: int | None = Field(default=8, ge=2, le=8)
    ternary: bool | Literal["two-sided"] = False
    threshold: float = Field(default=0.05, ge=0, lt=1)
    per_channel: bool = True
    initial: Initial = "mse"
    clipping: Clipping = "lsq"
    lowering: tuple[int, ...] = ()
    lowered: float = Field(default=0.4, gt=0, lt=1)
    damping: Damping = "none"
    damping_strength: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        falling = [*self.lowering, min(self.bits, self.activations or self.bits)]
        if any(not 2 <= b <= 8 for b in falling) or falling != sorted(set(falling), reverse=True):
            raise ValueError(
                f"lowering {list(self.lowering)} has to fall from at most 8 to above {falling[-1]}"
            )
        if self.ternary and self.bits != 2:
            raise ValueError(f"ternary weights have bits: 2, not {self.bits}")
        if self.lowering and self.ternary == "two-sided":
            raise ValueError("two-sided ternary weights have no wider grids: leave lowering out")
        if self.lowering and self.compile:
            raise ValueError("lowering changes the graph while it trains: leave compile out")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Put grids on a copy and train it with them; the input stays as it was.

        Raises:
            RecipeError: sites that match nothing.
            DataError: no data, or data that do not fit or are not finite; names the node.
            TrainingError: the loss diverged before there was anything worth keeping.
        """
        work = _Work(opened(program, context), context)
        self._select(work, sites)
        if not work.sites and not work.steps:
            work.notes.append("nothing to quantise: no float weight of a known operator is left")
            return Outcome(program=program.clone(), notes=work.notes)
        self._insert(work, self._calibrate(work))
        steps = [*work.steps, *(held.step for held in work.ternary)]
        attendant = LearnedGrids(steps, self._course(work))

        def settle() -> None:
            learned_steps.settle(work.program, work.steps)
            ternary_layers.as_floats(work.program, work.ternary)

        def figures() -> dict[str, Any]:
            stored = sum(step.weight is not None for step in work.steps)
            return {
                "weights": stored + len(work.ternary),
                "activations": len(work.steps) - stored,
                "jumping": attendant.oscillation.share(),
            }

        ran = self.trained(
            program, work, attendant, settle, figures,
            lambda: ternary_layers.settle(work.program, work.ternary),
        )  # fmt: skip
        return Outcome(**vars(ran))

    # choosing ---------------------------------------------------------------------------------

    def _select(self, work: "_Work", sites: Sites) -> None:
        every, notes = weight_sites(work.program)
        held = [node for node in work.program.graph.nodes if learned_steps.learnable(node)]
        on_grid = [name for node in held if (name := _stored(node))]
        names = choose_sites(work.program, sites, [*(site.name for site in every), *on_grid])
        work.notes += notes
        work.sites = [site for site in every if site.name in names]
        layers = [site.name for site in every if not site.weight_only]
        work.ends = {layers[0], layers[-1]} if layers and not on_grid else set()
        if any(name in names for name in on_grid):
            kept = [node for node in held if _stored(node) is None or _stored(node) in names]
            work.steps = [learned_steps.adopted(work.program, node) for node in kept]

    def _bits(self, work: "_Work", names: Sequence[str], bits: int) -> list[int]:
        """Bits of each stage of what belongs to the weights `names`."""
        if self.first_last is not None and any(name in work.ends for name in names):
            return [self.first_last] * (len(self.lowering) + 1)
        return [max(before, bits) for before in (*self.lowering, bits)]

    def _places(self, work: "_Work") -> list[Place]:
        if self.activations is None:
            return []
        others = placement.operator_sites(work.program, work.sites) if self.activations == 8 else []
        return placement.places(work.program, work.sites, others)

    # grids ------------------------------------------------------------------------------------

    def _calibrate(self, work: "_Work") -> dict[int, Histogram]:
        """Histograms of what is to be rounded, by group of places."""
        work.places = self._places(work)
        wanted = {place.name: (place.name, "output", Histogram()) for place in work.places}
        self.collect(work, wanted)
        found: dict[int, Histogram] = {}
        for place in work.places:
            found.setdefault(place.group, Histogram()).merge(wanted[place.name][2])
        return found

    def _insert(self, work: "_Work", histograms: Mapping[int, Histogram]) -> None:
        stages = {
            site.name: self._ends(self._bits(work, [site.name], self.bits)) for site in work.sites
        }
        one_sided = [
            site for site in work.sites if any(-low != up for low, up in stages[site.name])
        ]
        if self.fold:
            work.positive = norm_signs.make_positive(work.program, one_sided)
        for place in work.places:
            histogram = histograms[place.group]
            if reason := ranges.unfit(histogram):
                work.notes.append(f"{place.name}: stays float, {reason}")
                continue
            grids = self._grids(work, place, histogram)
            work.steps.append(
                learned_steps.insert_activation(work.program, place, grids, self.clipping)
            )
        for site in work.sites:
            axis = site.axis if self.per_channel else None
            if self.ternary == "two-sided" and stages[site.name] == [(-1, 1)]:
                held = ternary_layers.insert_weight(work.program, site, axis, self.threshold)
                work.ternary.append(held)
                continue
            work.steps.append(
                learned_steps.insert_weight(
                    work.program, site, axis, stages[site.name], self.initial
                )
            )
        work.program.recompile()
        work.program.propagate()

    def _ends(self, bits: Sequence[int]) -> list[Ends]:
        return [learned_steps.weight_ends(b, ternary=bool(self.ternary) and b == 2) for b in bits]

    def _grids(self, work: "_Work", place: Place, histogram: Histogram) -> list[Grid]:
        assert self.activations is not None
        bits = self._bits(work, sorted(place.sites), self.activations)
        return [learned_steps.activation_grid(histogram, b, self.initial) for b in bits]

    def _course(self, work: "_Work") -> Course:
        stages = len(self.lowering)
        return Course(
            starts=tuple(self.lowered * i / max(stages, 1) for i in range(stages + 1)),
            initial=self.initial,
            damping=self.damping,
            strength=self.damping_strength,
            positive=tuple(work.positive),
        )


@dataclass
class _Work(GridWork):
    """What is known while the method runs."""

    places: list[Place] = field(default_factory=list[Place])
    ternary: list[TernaryWeight] = field(default_factory=list[TernaryWeight])
    ends: set[str] = field(default_factory=set[str])
    positive: list[str] = field(default_factory=list[str])


def _stored(node: fx.Node) -> str | None:
    """The weight that a quantisation node rounds; None where it is computed."""
    source: Any = node.args[0]
    return str(source.target) if source.op == "get_attr" else None
