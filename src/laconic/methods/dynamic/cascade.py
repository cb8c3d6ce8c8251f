"""Ask a small model first, and the large one only when the small one is unsure.

Idea: two models that answer the same question become one program. The small one answers every
input; where its doubt is above a limit, the large one's answer counts. The limit is set as in
`dynamic.early_exit`: chosen on one part of the validation data, tested on the other, so that with
the confidence asked for no more than `max_drop` is lost against the large model. By default the
program of this step, pruned or distilled by the steps before, is the small one and the original the
large one. The program stays one static graph with one output; exported, it is a chain of pieces,
and rows that the small model answers cost the large one nothing.

Papers: Viola & Jones (CVPR 2001) for cascades; Wang et al., "Wisdom of committees" (ICLR 2022,
arXiv 2012.01988) for cascades of networks; Angelopoulos et al., "Learn then Test" (2110.01052).

Helps: where a much smaller model is right about most inputs; nothing has to be trained, and the
pieces may have any architecture. Of several outputs the task's `logits` names the one that is
judged; a sample has all of them from one model. Does not: where the small model costs more than a
third of the large one, since unsure inputs pay for both; memory holds both; embeddings and
regressions, which have no confidence, are refused.

Cost: one pass of both models over the validation data.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from laconic import storage
from laconic.core.errors import RecipeError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import cost
from laconic.program.members import alone
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.dynamic import confidence
from laconic.solvers.dynamic.answers import classes_of, figures_of, judged, why_none
from laconic.solvers.dynamic.confidence import Measure
from laconic.solvers.layers.grafting import graft


class Cascade(Method):
    """Options of `dynamic.cascade`. Sites have no meaning here: it is about whole models.

    Attributes:
        small: `.laconic` file of the small model; the program of this step is then the large one.
            None: the program of this step is small, the original large.
        measure: of doubt: "max", "entropy" or "margin"; None takes "max" where the task scores
            right and wrong, and refuses other tasks.
        max_drop: what may be lost against the large model, in the task's unit.
        confidence: that no more is lost.
        limit: largest doubt with which the small model's answer counts, in place of the search (a
            replay has it); below 0 it never does.
    """

    quick: ClassVar[Mapping[str, Any]] = {"measure": "max", "limit": 0.7}

    small: str | None = None
    measure: Measure | None = None
    max_drop: float = Field(default=0.3, ge=0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    limit: float | None = None

    def files(self) -> Sequence[str]:
        """The small model's file."""
        return () if self.small is None else (self.small,)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Make one program of two.

        Raises:
            RecipeError: outputs without a confidence, models that take or give different things,
                sites other than all.
            DataError: no validation data, or data that do not fit.
            StorageError: the small model's file cannot be read.
        """
        if sites.patterns != ("*",):
            raise RecipeError(
                f"sites {list(sites.patterns)}: a cascade is made of whole models",
                where="sites",
                hint="leave sites out",
            )
        small, large = self._pair(program, context)
        measure, _, place = classes_of(small, context.task, self.measure)
        macs = [cost(model).macs for model in (small, large)]
        own = self.model_dump(mode="json", exclude_defaults=True)
        resolved = {**own, "measure": measure, "limit": self.limit}
        if macs[0] >= macs[1]:
            note = f"the small model takes {macs[0]:,} multiply-adds, the large one {macs[1]:,}: "
            return self._nothing(program, resolved, [note + "asking it first saves nothing"], {})
        made, first = self._joined(small, large)
        figures: dict[str, Any] = {"macs": macs}
        limit, notes = self.limit, list[str]()
        if limit is None:
            share = np.array([macs[0], sum(macs)]) / max(macs[1], 1)
            asked = [first, _outputs(made)]
            answers = judged(made, asked, place, None, measure, share, context)
            solved = confidence.solve(
                answers, context.task, self.max_drop, self.confidence, context.generator()
            )
            limit = solved.values[0]
            figures |= figures_of(solved, context.task, self.max_drop)
            notes += why_none(solved, context.task, self.max_drop, self.confidence)
        resolved["limit"] = limit
        if limit < 0:
            return self._nothing(program, resolved, notes, figures)
        nodes = {node.name: node for node in made.graph.nodes}
        early, late = ([nodes[name] for name in names] for names in (first, _outputs(made)))
        values = confidence.add_choice(made, early, late, measure, limit, "cascade.limit", place)
        made.output_node.args = (tuple(values),)
        made.recompile()
        made.propagate()
        return Outcome(program=made, resolved=resolved, notes=notes, figures=figures)

    def _pair(self, program: Program, context: Context) -> tuple[Program, Program]:
        """The small and the large model, each alone.

        Raises:
            RecipeError: they take or give different things.
        """
        other = context.original if self.small is None else storage.load(Path(self.small))
        pair = (program, other) if self.small is None else (other, program)
        held = [alone(model).clone() for model in pair]
        for model in held:
            model.propagate()
        takes, gives = ([_shapes(model, end) for model in held] for end in ("inputs", "outputs"))
        for what, shapes in (("takes", takes), ("gives", gives)):
            if shapes[0] != shapes[1]:
                raise RecipeError(
                    f"the small model {what} {shapes[0]}, the large one {shapes[1]}",
                    where="cascade",
                    hint="both have to answer the same question about the same inputs",
                )
        flat: Any = held[0].output_node.args[0]
        same = held[0].signature.output == held[1].signature.output
        apart = all(n.meta["shape"][:1] == (held[0].batch_size(),) for n in flat)
        if len(flat) > 1 and not (same and apart):
            raise RecipeError(
                "of several outputs "
                + ("not all have the batch in front" if same else "the two models' order differs"),
                where="cascade",
                hint="every sample takes all its outputs from one of two models that name them "
                "alike; capture models that give class scores alone",
            )
        return held[0], held[1]

    def _joined(self, small: Program, large: Program) -> tuple[Program, list[str]]:
        """A program that computes both and gives the large one's answer; the small one's nodes."""
        base, other = (small, large) if self.small is None else (large, small)
        made = base.clone()
        prefix = "large." if self.small is None else "small."
        same = dict(zip(other.placeholders, made.placeholders, strict=True))
        answer = graft(made, other, same, prefix)
        first = [node.name for node in answer]
        if self.small is None:
            first = _outputs(made)
            made.output_node.args = (tuple(answer),)
        made.recompile()
        made.propagate()
        return made, first

    def _nothing(
        self,
        program: Program,
        resolved: Mapping[str, Any],
        notes: Sequence[str],
        figures: Mapping[str, Any],
    ) -> Outcome:
        return Outcome(program=program.clone(), resolved=resolved, notes=notes, figures=figures)


def _outputs(program: Program) -> list[str]:
    flat: Any = program.output_node.args[0]
    return [node.name for node in flat]


def _shapes(program: Program, end: str) -> list[str]:
    """What goes in or comes out: shapes without the batch, free dimensions by name, kinds."""
    flat: Any = program.placeholders if end == "inputs" else program.output_node.args[0]
    found: list[str] = []
    for node in flat:
        free = program.dynamic.get(node.name, {}) if end == "inputs" else {}
        shape = [free.get(dim, size) for dim, size in enumerate(node.meta["shape"])][1:]
        kind = "float" if node.meta["dtype"].is_floating_point else "integer"
        found.append(f"{kind} [batch{''.join(f', {size}' for size in shape)}]")
    return found
