"""Leave the network where the answer is already sure.

Idea: most inputs are easy. Small heads on inner values answer early; a sample that one of them is
sure about leaves, the rest goes on. Places are found from the graph: values on which everything
later depends, spread over the work. Heads are as wide as a share of the multiply-adds allows, or
are the rest of the network with as few of its residual layers (`head: tail`). They learn from the
deepest output and from labels; the network in front of them stays as it is, or is trained along.
Limits of doubt are chosen on one part of the validation data and tested on the other, step by step,
until a step fails: what is kept loses at most `max_drop` with the confidence asked for. The program
stays one static graph with one output; exported, it is a chain of pieces, and rows that have left
cost nothing.

Papers: Teerapittayanon, McDanel & Kung, "BranchyNet" (ICPR 2016, arXiv 1709.01686); Huang et al.,
"Multi-scale dense networks" (ICLR 2018, 1703.09844) for limits under a budget; Phuong & Lampert,
"Distillation-based training for multi-exit architectures" (ICCV 2019) for the deepest output as
the teacher; Angelopoulos et al., "Learn then Test" (2110.01052) for the promise.

Helps: deep classifiers whose inputs differ in difficulty; most at batch 1. Does not: shallow
networks, where a piece costs little more than a call; embeddings and regressions, which have no
confidence, and outputs besides class scores, which no head gives (refused); few validation samples,
on which nothing can be promised (some thousands for a third of a point). With the network frozen
nothing is lost where nobody leaves, and training takes minutes; early features of a network that
was not trained for it are poor, though: tails make something of them, new heads need the network
trained along (`backbone: trained`).

Cost: training steps; frozen, a run of the network forward and a step of the heads for each sample.
One pass over the validation data. Each head adds its share of multiply-adds to what goes past it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from laconic.core.errors import RecipeError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import cost
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.dynamic import confidence, exits
from laconic.solvers.dynamic.answers import (
    check_held_out,
    classes_of,
    figures_of,
    judged,
    why_none,
)
from laconic.solvers.dynamic.confidence import NEVER, Answers, Measure
from laconic.solvers.dynamic.exit_training import train_along, train_heads
from laconic.solvers.dynamic.exits import Place
from laconic.solvers.dynamic.tails import tails
from laconic.solvers.teaching.learning import Course
from laconic.training.job import Trained
from laconic.training.plan import Plan

_SIZES = {"new": 0.03, "tail": 0.2}


class EarlyExit(Plan, Method):
    """Options of `dynamic.early_exit`; `Plan` has those of training. Sites are names of places.

    Attributes:
        exits: how many, spread evenly over the work.
        at: names of the values that get an exit (graph nodes, or module paths, whose last value is
            meant), in place of `exits`.
        head: "new", or "tail": the rest of the network with fewer of its residual layers, which
            begins with the network's weights; far better in front, where features are not yet those
            that classes are told by.
        depth: of new heads on images: convolutions in each stage, stages halving the resolution
            down to 8 pixels; on other values a hidden layer. 0 is pooling and one layer.
        size: most that a head may take, as a share of the network's multiply-adds; widths, or the
            layers of a tail, follow. None is 0.03, for a tail 0.2.
        backbone: "frozen" trains the heads only; "trained" the network along with them.
        temperature: of the softened answers that the heads learn from.
        alpha: weight of the teacher's answers; the rest goes to labels, where there are any. At 0 a
            frozen network runs no further than to the last head: twice the steps in the same time.
        measure: of doubt: "max", "entropy" or "margin"; None takes "max" where the task scores
            right and wrong, and refuses other tasks.
        max_drop: what may be lost against the program before, in the task's unit.
        confidence: that no more is lost.
        limits: largest doubt with which a sample leaves, for each exit or one for all, in place of
            the search (a replay has them); below 0 nobody does.
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"exits": 1, "steps": 2, "measure": "max", "limits": 0.7}

    exits: int = Field(default=2, ge=1, le=6)
    at: list[str] | None = None
    head: Literal["new", "tail"] = "new"
    depth: int = Field(default=1, ge=0, le=4)
    size: float | None = Field(default=None, gt=0, le=0.5)
    backbone: Literal["frozen", "trained"] = "frozen"
    temperature: float = Field(default=2.0, gt=0)
    alpha: float = Field(default=0.5, ge=0, le=1)
    measure: Measure | None = None
    max_drop: float = Field(default=0.3, ge=0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    limits: list[float] | float | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Put exits into a copy, train them, and set their limits.

        Raises:
            RecipeError: outputs without a confidence, sites or `at` that name no place, a value
                that cannot be pooled, limits that are not as many as exits.
            DataError: no training or validation data, or data that do not fit.
            TrainingError: the loss diverged at once.
        """
        measure, classes, _ = classes_of(program, context.task, self.measure)
        _need_one_output(program)
        work = (thaw(program) if is_frozen(program) else program).clone()
        work.propagate()
        found = self._places(work, sites)
        given = self._given(len(found))
        own = self.model_dump(mode="json", exclude_defaults=True)
        resolved = {**own, "at": [place.node for place in found], "measure": measure}
        resolved.pop("exits", None)
        if not found or (given is not None and max(given) < 0):
            note = "no exits" if found else "no place for an exit: no value that everything after "
            note += "" if found else "it depends on and that can be pooled"
            return Outcome(
                program=program.clone(), resolved={**resolved, "limits": given}, notes=[note]
            )
        if given is None:
            check_held_out(context.task)  # refuses before anything is trained
        made, nodes, trained = self._trained(work, found, classes, context)
        figures: dict[str, Any] = {"places": {place.name: place.share for place in found}}
        notes = list(trained.notes)
        if given is None:
            answers = self._answers(program, made, nodes, measure, context)
            solved = confidence.solve(
                answers, context.task, self.max_drop, self.confidence, context.generator()
            )
            given = list(solved.values)
            figures |= figures_of(solved, context.task, self.max_drop)
            notes += why_none(solved, context.task, self.max_drop, self.confidence)
        plan = trained.plan.model_dump(mode="json", exclude={"save_every"})
        resolved |= {**plan, "limits": given}
        if max(given) < 0:
            return Outcome(program=program.clone(), resolved=resolved, notes=notes, figures=figures)
        self._choose(made, nodes, given, measure)
        result = freeze(made) if is_frozen(program) else made
        return Outcome(program=result, resolved=resolved, notes=notes, figures=figures)

    def _places(self, program: Program, sites: Sites) -> list[Place]:
        if self.at is not None:
            return sorted(exits.named(program, self.at), key=lambda place: place.share)
        known = exits.places(program)
        chosen = sites.choose([place.name for place in known])
        return exits.spread([place for place in known if place.name in chosen], self.exits)

    def _given(self, count: int) -> list[float] | None:
        if not isinstance(self.limits, list):
            return None if self.limits is None else [float(self.limits)] * count
        if len(self.limits) != count:
            raise RecipeError(
                f"{len(self.limits)} limits for {count} exits",
                where="limits",
                hint="give one for each exit, or a single number for all",
            )
        return list(self.limits)

    def _trained(
        self, work: Program, found: Sequence[Place], classes: int, context: Context
    ) -> tuple[Program, list[str], Trained]:
        """The program with heads that nothing reads yet, the nodes of their outputs, the run."""
        size = _SIZES[self.head] if self.size is None else self.size
        budget = size * cost(work).macs
        if self.head == "tail":
            heads = tails(work, found, budget)
        else:
            heads = exits.heads(found, classes, self.depth, budget, context.seed)
        plan = Plan.model_validate({key: getattr(self, key) for key in Plan.model_fields})
        course = Course.of(context)
        if self.backbone == "frozen":
            trained = train_heads(plan, work, heads, course, self.temperature, self.alpha)
            made = work.clone()
            nodes = exits.attach(made, heads)
            made.recompile()
        else:
            made = work.clone()
            nodes = exits.attach(made, heads)
            made.recompile()
            trained = train_along(plan, work, made, nodes, course, self.temperature, self.alpha)
        made.eval()
        made.propagate()
        return made, nodes, trained

    def _answers(
        self,
        program: Program,
        made: Program,
        nodes: Sequence[str],
        measure: Measure,
        context: Context,
    ) -> Answers:
        """What every exit and the end say about the validation data, and what it costs."""
        last = _output(made).name
        before = cost(program).macs
        passed = [exits.macs_until(made, nodes[: place + 1]) for place in range(len(nodes))]
        passed.append(exits.macs_until(made, [*nodes, last]))
        same = self.backbone == "frozen"
        return judged(
            made, [[name] for name in (*nodes, last)], 0, None if same else program, measure,
            np.array(passed) / max(before, 1), context,
        )  # fmt: skip

    def _choose(
        self, made: Program, nodes: Sequence[str], limits: Sequence[float], measure: Measure
    ) -> None:
        """Let each sample take the first answer that is sure enough; unused heads go."""
        by_name = {node.name: node for node in made.graph.nodes}
        value = _output(made)
        for place, (name, limit) in reversed(list(enumerate(zip(nodes, limits, strict=True)))):
            if limit > NEVER and limit >= 0:
                label = f"exits.{place}.limit"
                (value,) = confidence.add_choice(
                    made, [by_name[name]], [value], measure, limit, label
                )
        made.output_node.args = ((value,),)
        made.graph.eliminate_dead_code()
        made.drop_unused()
        made.recompile()
        made.propagate()


def _need_one_output(program: Program) -> None:
    """Refuse outputs besides class scores: a head has none of them to give."""
    flat: Any = program.output_node.args[0]
    if len(flat) > 1:
        raise RecipeError(
            f"the model gives {len(flat)} outputs: a sample that leaves early has class scores and "
            "no value for the others",
            where="outputs",
            hint="capture a model that gives its class scores alone",
        )


def _output(program: Program) -> Any:
    flat: Any = program.output_node.args[0]
    return flat[0]
