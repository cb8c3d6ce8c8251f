"""Distillation from inside: what matched nodes of student and teacher hold is compared too.

Idea: outputs say what the teacher decides, inner values how it gets there. Kinds of comparison:

* `hint`: the values themselves, in units of the teacher's mean square; where widths differ, through
  a learned projection of the student's (Romero et al., "FitNets", arXiv 1412.6550).
* `attention`: where in an image, or at which tokens, the values are large; widths may differ
  (Zagoruyko & Komodakis, arXiv 1612.03928).
* `relational`: distances and angles among the samples of a batch (Park et al., arXiv 1904.05068).
* `contrastive`: a sample's own teacher value is to be told from those of the rest of the batch
  (Tian et al., arXiv 1910.10699, with the batch for a memory as van den Oord et al., 1807.03748).
* `relations`: of transformers, the products of queries, keys and values with themselves; heads and
  widths may differ (Wang et al., MiniLM v2, arXiv 2012.15828).

Matching nodes are found: by name where the student comes from the teacher, else by stage, ends of
residual blocks with ends of residual blocks of the same resolution; or they are given as pairs.
Projections are trained beside the student and thrown away.

Helps: students of another architecture or much smaller than the teacher, few data, embeddings.
Does not: where outputs alone are learned well already; a student with far less depth has no node
that could hold what the teacher's early ones hold, give pairs then.

Cost: as `distill.logits`, a training step of the student and a run of the teacher for each batch,
and the projections, which are small; the teacher's inner values take memory beside the student's.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.layers.attentions import attentions
from laconic.solvers.teaching import feature_losses
from laconic.solvers.teaching.beside import Beside, beside
from laconic.solvers.teaching.learning import Course, Inside, trainable
from laconic.solvers.teaching.synthetic_inputs import DataFree
from laconic.training import losses
from laconic.training.feed import mixed
from laconic.training.taps import Alike, matched

Shape = tuple[int, ...]
_USUAL = {"hint": 5.0, "attention": 10.0, "relational": 10.0, "contrastive": 1.0, "relations": 1.0}
"""So that a loss moves a student about as much as soft targets at temperature 4 do, or less."""


@dataclass(frozen=True)
class _Relation:
    """An attention of as many keys as queries.

    Attributes:
        name: of the node that gives its output.
        values: names of the nodes of query, key and value, each `[batch, heads, tokens, width]`, or
            `[batch, tokens, width]` without heads.
        heads: the most heads that all three have.
        widths: of each of the three, over all heads.
    """

    name: str
    values: list[str]
    heads: int
    widths: list[int]


class Features(DataFree, Method):
    """Train towards what is inside the teacher; see `Learning` and `Plan` for the other fields.

    Attributes:
        match: what is compared, see above.
        features: weight of that loss; 1 is usual: it moves the student less than the outputs do.
        nodes: globs over names that both have, or pairs {node: the teacher's node}; of attentions
            (`relations`) those that give their outputs. None takes up to eight ends of blocks for
            hints and attention maps, the last one for relational and contrastive, the last
            attention for relations.
        project: for hints, what goes through a learned projection: "unequal" widths only, or "all".
        heads: for relations, how many heads both networks' values are split into; None takes the
            most that fit both.
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {
        "steps": 3, "evaluations": 1, "teacher": "torch", "precision": "fp32",
    }  # fmt: skip

    match: Literal["hint", "attention", "relational", "contrastive", "relations"] = "hint"
    features: float = Field(default=1.0, ge=0)
    project: Literal["unequal", "all"] = "unequal"
    heads: int | None = Field(default=None, ge=1)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Train a copy; the input stays as it was.

        Raises:
            DataError: no training data, or data that do not fit.
            RecipeError: nodes that cannot be matched, heads that do not divide the widths; no
                batch normalisation to draw synthetic inputs from.
            TrainingError: the loss diverged at once, or outputs differ in shape.
        """
        student = (thaw(program) if is_frozen(program) else program.clone()).train()
        names = trainable(student, sites)
        if not names:
            return Outcome(program=program.clone(), notes=["there is no float parameter to train"])
        course, notes = self.course(student, context)
        learned = self.learn(program, student, names, course)
        own = self.model_dump(mode="json", exclude_defaults=True)
        return Outcome(
            program=freeze(student) if is_frozen(program) else student,
            resolved={**own, **learned.resolved},
            notes=[*notes, *learned.notes],
            figures=learned.figures,
        )

    def inside(
        self, stack: ExitStack, student: Program, teacher: Program, course: Course
    ) -> Inside:
        """Matched nodes, and projections beside the student where they are needed."""
        theirs = teacher.clone()
        found = (
            self._relations(student, theirs)
            if self.match == "relations"
            else self._values(stack, student, theirs, course)
        )
        usual = _USUAL[self.match]
        compare = found.compare
        return replace(found, compare=lambda s, t, mask: usual * compare(s, t, mask))

    def _values(
        self, stack: ExitStack, student: Program, theirs: Program, course: Course
    ) -> Inside:
        """Pairs of nodes for all kinds but relations."""
        pairs = matched(student, theirs, self.nodes, self._alike())
        if self.nodes is None and self.match in ("relational", "contrastive"):
            pairs = dict(list(pairs.items())[-1:])
        if self.match == "attention":
            return Inside(
                ours=list(pairs), theirs=list(pairs.values()), nodes=pairs,
                compare=feature_losses.attention,
            )  # fmt: skip
        if self.match == "relational":
            return Inside(
                ours=list(pairs), theirs=list(pairs.values()), nodes=pairs,
                compare=feature_losses.relational,
            )  # fmt: skip
        generator = torch.Generator().manual_seed(mixed(course.seed, 3))
        by_name = {node.name: node for node in theirs.graph.nodes}
        made = stack.enter_context(beside(student, generator))
        ours = [
            self._projected(made, one, by_name[two].meta["shape"]) for one, two in pairs.items()
        ]
        student.recompile()
        return Inside(
            ours=ours,
            theirs=list(pairs.values()),
            nodes=pairs,
            compare=losses.features if self.match == "hint" else feature_losses.contrastive,
            beside=made.names,
        )

    def _alike(self) -> Alike:
        if self.match == "hint":
            return _widths_differ
        return _same_batch if self.match in ("relational", "contrastive") else _one_map

    def _projected(self, made: Beside, name: str, wanted: Shape) -> str:
        """The node that is compared: the student's own, or a projection of it."""
        node = made.node(name)
        shape: Shape = node.meta["shape"]
        if self.match == "contrastive":
            value, width = node, shape[-1] if len(shape) == 3 else shape[1]
            if len(shape) > 3:
                value = made.mean(node, range(2, len(shape)))
            return made.linear(value, width, wanted[-1] if len(wanted) == 3 else wanted[1]).name
        if shape == wanted and self.project == "unequal":
            return name
        if _channels_first(shape, wanted):
            return made.pointwise(node, shape[1], wanted[1], len(shape)).name
        return made.linear(node, shape[-1], wanted[-1]).name

    def _relations(self, student: Program, theirs: Program) -> Inside:
        """Pairs of attentions."""
        student.propagate()
        theirs.propagate(student.example)
        ours, others = _relations(student), _relations(theirs)
        if not ours or not others:
            whose = "program" if not ours else "teacher"
            raise RecipeError(
                f"the {whose} has no attention of as many keys as queries",
                where="match: relations",
                hint="take another kind: hint or attention",
            )
        pairs = self._attention_pairs(ours, others)
        flat = [one for pair in pairs for one in pair]
        most = min(one.heads for one in flat)
        common = gcd(*(width for one in flat for width in one.widths))
        if self.heads is not None and common % self.heads:
            raise RecipeError(
                f"{self.heads} heads do not divide all widths, of which {common} is the largest "
                "common divisor",
                where="heads",
            )
        heads = self.heads or next(n for n in range(most, 0, -1) if common % n == 0)
        return Inside(
            ours=[name for one, _ in pairs for name in one.values],
            theirs=[name for _, other in pairs for name in other.values],
            nodes={one.name: other.name for one, other in pairs},
            compare=feature_losses.relations(heads),
            resolved={"heads": heads},
        )

    def _attention_pairs(
        self, ours: list[_Relation], theirs: list[_Relation]
    ) -> list[tuple[_Relation, _Relation]]:
        if self.nodes is None:
            return [(ours[-1], theirs[-1])]
        mine = {one.name: one for one in ours}
        other = {one.name: one for one in theirs}
        if not isinstance(self.nodes, dict):
            both = [name for name in mine if name in other]
            return [(mine[n], other[n]) for n in Sites.of(list(self.nodes)).choose(both)]
        for names, known, whose in ((self.nodes, mine, "program"),
                                    (self.nodes.values(), other, "teacher")):  # fmt: skip
            for name in names:
                if name not in known:
                    raise RecipeError(
                        f"the {whose} has no attention {name!r}",
                        where="nodes",
                        hint=nearest(name, known),
                    )
        return [(mine[one], other[two]) for one, two in self.nodes.items()]


def _channels_first(mine: Shape, other: Shape) -> bool:
    """Whether the width is dimension 1: it is the one that differs, or there are pixels behind."""
    if mine == other:
        return len(mine) > 3
    return len(mine) > 2 and mine[1] != other[1]


def _widths_differ(mine: Shape, other: Shape) -> bool:
    """Equal but for one dimension at the most, the second or the last."""
    if len(mine) != len(other) or len(mine) < 2:
        return False
    unequal = [dim for dim, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b]
    return not unequal or (unequal in ([1], [len(mine) - 1]) and len(mine) <= 5)


def _one_map(mine: Shape, other: Shape) -> bool:
    """Maps over the same pixels, or the same tokens."""
    if len(mine) != len(other) or len(mine) < 3 or mine[0] != other[0]:
        return False
    return mine[1] == other[1] if len(mine) == 3 else mine[2:] == other[2:]


def _same_batch(mine: Shape, other: Shape) -> bool:
    """A value for each sample of both."""
    return min(len(mine), len(other)) > 1 and mine[0] == other[0]


def _relations(program: Program) -> list[_Relation]:
    """In graph order; shapes have to be propagated."""
    found: list[_Relation] = []
    for one in attentions(program):
        parts = [node for node in (one.query, one.key, one.value) if node is not None]
        shapes = [node.meta["shape"] for node in parts]
        ranks = {len(shape) for shape in shapes}
        if one.output is None or len(parts) < 3 or ranks not in ({3}, {4}):
            continue
        if len({shape[-2] for shape in shapes}) != 1:
            continue
        heads = [shape[1] if len(shape) == 4 else 1 for shape in shapes]
        widths = [h * shape[-1] for h, shape in zip(heads, shapes, strict=True)]
        names = [node.name for node in parts]
        found.append(_Relation(one.output.name, names, min(heads), widths))
    return found
