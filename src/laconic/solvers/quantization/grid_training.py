"""Training a network with the grids that it will run on: what such methods share.

A copy is opened (float master weights), nodes that stand for the grids are put in, statistics of a
calibration pass say where they begin, an attendant looks after them while the copy learns from the
original, and in the end the nodes take their final form, batch norm is folded, and weights that
came as integers are integers again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.finite import refuse_broken
from laconic.solvers.layers import folding
from laconic.solvers.quantization.learned_steps import LearnedStep
from laconic.solvers.quantization.weight_sites import WeightSite
from laconic.solvers.setting import Setting
from laconic.solvers.teaching.learning import Course, Learning, trainable
from laconic.statistics.base import Statistic
from laconic.statistics.batches import Batches
from laconic.statistics.collect import collect
from laconic.training.attendant import Attendant

Requests = Mapping[Any, tuple[str, str, Statistic]]


@dataclass
class GridWork:
    """What is known while such a method runs.

    Attributes:
        program: the copy that trains.
        context: task, device, progress.
        sites: the weights that get grids.
        steps: of the quantisation nodes whose steps train.
        notes: sentences for the outcome.
    """

    program: Program
    context: Setting
    sites: list[WeightSite] = field(default_factory=list[WeightSite])
    steps: list[LearnedStep] = field(default_factory=list[LearnedStep])
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of it, by the names of a method's outcome."""

    program: Program
    resolved: Mapping[str, Any]
    notes: list[str]
    figures: Mapping[str, Any]


class GridTraining(Learning):
    """Options of a method that trains with grids, the same in all of them.

    Attributes:
        samples: calibration samples for where the grids begin.
        fold: fold batch norm at the end, as runtimes want it; without, it can train on as it is.
        freeze: store the weights as codes; the Program then does not train on.
    """

    samples: int = Field(default=256, ge=1)
    fold: bool = True
    freeze: bool = False

    def collect(self, work: GridWork, wanted: Requests) -> None:
        """Fill statistics from the calibration data.

        Raises:
            DataError: no data, or data that do not fit or are not finite; names the node.
        """
        if wanted:
            task, device = work.context.task, work.context.device
            batches = Batches(work.program, task, self.samples, device, size=64)
            collect(work.program, batches, wanted, work.context.progress)

    def trained(
        self,
        program: Program,
        work: GridWork,
        attendant: Attendant,
        settle: Callable[[], object],
        figures: Callable[[], Mapping[str, Any]],
        converted: Callable[[], object] = lambda: None,
    ) -> Ran:
        """Train the copy with its grids and bring it into its final form.

        Args:
            program: the method's input, left as it was.
            work: its program has the nodes.
            attendant: looks after them.
            settle: gives the nodes their final form, before batch norm is folded.
            figures: what else is worth keeping, asked right after the training.
            converted: what is to be done once batch norm is folded.

        Raises:
            TrainingError: the loss diverged before there was anything worth keeping.
            DataError: the last step gave NaN or infinite values; names the parameter.
        """
        student = work.program.train()
        names = trainable(student, Sites())
        learned = self.learn(program, student, names, Course.of(work.context), attendant=attendant)
        refuse_broken(student)  # the very last step may have been one too far
        told = {**learned.figures, **figures()}
        settle()
        if self.fold:
            work.notes += folding.fold_batch_norms(work.program, forwards=False).notes
        converted()
        work.program.drop_unused()
        work.program.recompile()
        work.program.propagate()
        integers = self.freeze or is_frozen(program)
        return Ran(
            program=freeze(work.program) if integers else work.program,
            resolved={**self.model_dump(mode="json", exclude_defaults=True), **learned.resolved},
            notes=[*work.notes, *learned.notes],
            figures=told,
        )


def opened(program: Program, setting: Setting) -> Program:
    """A copy with float master weights on the device, shapes propagated.

    Raises:
        DataError: a parameter holds NaN or infinite values.
    """
    refuse_broken(program)
    made = (thaw(program) if is_frozen(program) else program.clone()).to(setting.device)
    made.propagate()
    return made
