"""Weights, and activations, of one bit: signs times scales, trained towards the float original.

A weight is its sign times one scale for each output channel (XNOR-Net, arXiv 1603.05279), taken of
centred weights of unit variance, with a gradient that goes straight through or sharpens during the
run (IR-Net, arXiv 1909.10788). An activation is the sign of `x - shift` times a scale, both trained
(ReActNet, arXiv 2003.03488; AdaBin, arXiv 2208.08084). Around binary activations the graph changes:
a ReLU becomes a PReLU, and every convolution gets a float shortcut where shapes allow (Bi-Real Net,
arXiv 1808.00278), so that what the signs lose still flows on; a network's own shortcuts stay
floats. Training has two steps: activations of one bit with float weights, then both (arXiv
1909.13863). The loss is that of `distill.logits`.

Helps: files (1 bit a weight), and kernels that count bits, where there are any; a runtime without
them gets the tensors that the bits stand for, and is not faster. Weights alone cost a ResNet a
point or two. Does not: with few steps (binary activations need tens of epochs), in transformers,
where accuracy matters more than bytes; `quantize.train` at 2 bits is much closer to the original.
Cost: that of the training, and for binary activations half as much again; one pass over `samples`.
With SGD, signs of activations like a higher rate (`lr: 0.1`) than the usual one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from laconic.methods.base import Context, Method, Outcome
from laconic.program.normalize import base_name
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import binary_layers, learned_steps, placement, ranges
from laconic.solvers.quantization.binary_grids import BinaryGrids
from laconic.solvers.quantization.binary_layers import BinaryWeight, Estimator
from laconic.solvers.quantization.grid_training import GridTraining, GridWork, opened
from laconic.solvers.quantization.learned_steps import LearnedStep
from laconic.solvers.quantization.placement import Place
from laconic.solvers.quantization.weight_sites import WeightSite, choose_sites, weight_sites
from laconic.statistics.base import Statistic
from laconic.statistics.histogram import Histogram
from laconic.statistics.moments import Moments


class QuantizeBinary(GridTraining, Method):
    """Options of `quantize.binary`; see `GridTraining`, `Learning` and `Plan` for the training's.

    Sites are weights; all float parameters are trained.

    Attributes:
        activations: whether what goes into the operators has one bit as well.
        first_last: bits of the first and of the last weight, and with `activations` of their
            inputs; None: one bit like the rest.
        balanced: centre weights and give them unit variance before their sign is taken.
        estimator: what the gradient of a sign goes through: "straight", or "tanh", which sharpens.
        prelu: with `activations`: PReLU in place of ReLU in front of binary activations.
        shortcuts: with `activations`: lead each convolution's input past it where shapes allow.
        first: with `activations`: part of the steps in which weights are still floats.
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"steps": 4, "samples": 8}

    activations: bool = True
    first_last: int | None = Field(default=8, ge=2, le=8)
    balanced: bool = True
    estimator: Estimator = "straight"
    prelu: bool = True
    shortcuts: bool = True
    first: float = Field(default=0.3, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compile and self.activations and self.first:
            raise ValueError("two steps change the graph while it trains: compile needs first: 0")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Put signs into a copy and train it with them; the input stays as it was.

        Raises:
            RecipeError: sites that match nothing.
            DataError: no data, or data that do not fit or are not finite; names the node.
            TrainingError: the loss diverged before there was anything worth keeping.
        """
        work = _Work(opened(program, context), context)
        self._select(work, sites)
        if not work.sites and not work.ends:
            work.notes.append("nothing to quantise: no float weight of a known operator is left")
            return Outcome(program=program.clone(), notes=work.notes)
        self._reshape(work)
        self._insert(work)
        first = self.first if self.activations else 0.0
        attendant = BinaryGrids(work.steps, work.weights, first)
        figures = {
            "weights": len(work.weights),
            "activations": len(work.binary),
            "shortcuts": work.shortcuts,
        }
        ran = self.trained(program, work, attendant, lambda: self._settle(work), lambda: figures)
        return Outcome(**vars(ran))

    # the graph --------------------------------------------------------------------------------

    def _select(self, work: "_Work", sites: Sites) -> None:
        every, notes = weight_sites(work.program)
        names = choose_sites(work.program, sites, [site.name for site in every])
        layers = [site.name for site in every if not site.weight_only]
        ends = {layers[0], layers[-1]} if layers and self.first_last is not None else set[str]()
        chosen = [site for site in every if site.name in names]
        work.notes += notes
        work.notes += [
            f"{s.name}: stays float, it is looked up or recurrent" for s in chosen if s.weight_only
        ]
        work.ends = [site for site in chosen if site.name in ends]
        work.sites = [s for s in chosen if s.name not in ends and not s.weight_only]
        if not work.sites:
            work.notes.append("no weight is left for one bit beside the first and the last")

    def _reshape(self, work: "_Work") -> None:
        """Everything around binary activations, in floats."""
        if not self.activations:
            return
        program = work.program
        places = placement.places(program, work.sites, [])
        if self.shortcuts:
            work.shortcuts = binary_layers.add_shortcuts(program, places)
        if self.prelu:
            for source in dict.fromkeys(place.source for place in places):
                if base_name(source) == "relu" and _channels_second(places, source):
                    binary_layers.soften(program, source)
        program.recompile()
        program.propagate()

    def _insert(self, work: "_Work") -> None:
        program = work.program
        binary = placement.places(program, work.sites, []) if self.activations else []
        ends = placement.places(program, work.ends, []) if self.activations else []
        histograms, moments = self._calibrate(work, ends, binary)
        for place in (*ends, *binary):
            if reason := ranges.unfit(histograms[place.name]):
                work.notes.append(f"{place.name}: stays float, {reason}")
            elif place in binary:
                self._binary(work, place, moments[place.name])
            else:
                found = histograms[place.name]
                grid = learned_steps.activation_grid(found, self.first_last or 8, "mse")
                work.steps.append(learned_steps.insert_activation(program, place, [grid], "lsq"))
        for site in work.ends:
            bits = [learned_steps.weight_ends(self.first_last or 8)]
            work.steps.append(learned_steps.insert_weight(program, site, site.axis, bits, "mse"))
        for site in work.sites:
            work.weights.append(
                binary_layers.insert_weight(program, site, self.estimator, balanced=self.balanced)
            )
        program.recompile()
        program.propagate()

    def _calibrate(
        self, work: "_Work", ends: Sequence[Place], binary: Sequence[Place]
    ) -> tuple[dict[str, Histogram], dict[str, Moments]]:
        histograms = {place.name: Histogram() for place in (*ends, *binary)}
        moments = {place.name: Moments(binary_layers.channel_axis(place)) for place in binary}
        wanted: dict[tuple[str, str], tuple[str, str, Statistic]] = {
            **{("range", name): (name, "output", held) for name, held in histograms.items()},
            **{("moments", name): (name, "output", held) for name, held in moments.items()},
        }
        self.collect(work, wanted)
        return histograms, moments

    def _binary(self, work: "_Work", place: Place, found: Moments) -> None:
        spread = float(found.variance.mean()) ** 0.5
        if not spread > 0:
            work.notes.append(f"{place.name}: stays float, it is constant in calibration")
            return
        like: Tensor = next(t for _, t in work.program.tensors() if t.is_floating_point())
        step = binary_layers.insert_activation(
            work.program,
            place,
            found.mean.to(like.device).float(),
            like.new_tensor(spread).float(),
            self.estimator,
        )
        work.binary.append(step)
        work.steps.append(step)

    # the end ----------------------------------------------------------------------------------

    def _settle(self, work: "_Work") -> None:
        """The nodes of training become those that stay."""
        binary_layers.settle(work.program, work.weights, work.binary, even=self.balanced)
        others = [step for step in work.steps if step not in work.binary]
        learned_steps.settle(work.program, others)


@dataclass
class _Work(GridWork):
    """What is known while the method runs."""

    ends: list[WeightSite] = field(default_factory=list[WeightSite])
    binary: list[LearnedStep] = field(default_factory=list[LearnedStep])
    weights: list[BinaryWeight] = field(default_factory=list[BinaryWeight])
    shortcuts: int = 0


def _channels_second(places: Sequence[Place], source: Any) -> bool:
    """Whether dimension 1 of a value holds its channels."""
    at = [place for place in places if place.source is source]
    axes = {binary_layers.channel_axis(place) % len(source.meta["shape"]) for place in at}
    return axes == {1}
