"""A small network that begins with slices of a large one instead of random numbers.

Idea: a trained network's tensors hold good starting values for a smaller one. Widths: every group
of coupled axes (channels, heads, hidden units) keeps a share of its indices, the same ones in every
tensor: the first (`leading`), those with the best score (`ranked`), or those with the rest refitted
by least squares so that every layer gives what it gave (`fitted`). Depth: some layers of every
chain of residual blocks stay, and with `fitted` each that stays gives what it and those that left
behind it gave. Or a network of one's own (`student`) is filled the same way, its tensors matched by
name, its layers by position. What it makes is a start: train it next, with `distill.*`.

Papers: Xu et al., "Initializing Models with Larger Ones" (ICLR 2024, arXiv 2311.18823) for
consistent slices; Sanh et al., "DistilBERT" (arXiv 1910.01108) and Shleifer & Rush, "Pre-trained
Summarization Distillation" (arXiv 2010.13002) for every second layer and evenly spread ones.

Helps: whenever a smaller network of the same family is to be trained for less time than it would
take from nothing. Does not: where training is long enough to forget how it began, or where the
sizes of a network are chosen by what its cuts cost (`prune.channels` does that).
Cost: none for leading; a score's for ranked; one pass over `samples` and a least-squares fit for
every layer for fitted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from laconic import storage
from laconic.methods.base import Changes, Context, Method, Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import selection, slices
from laconic.solvers.channels.compensate import towards
from laconic.solvers.channels.selection import Keep
from laconic.solvers.channels.shrinking import Plan, Shrinking, Shrunk
from laconic.solvers.channels.slices import Counts
from laconic.solvers.importance.base import Scene
from laconic.solvers.layers import depth
from laconic.solvers.teaching import student as students
from laconic.statistics.gradients import sampled_loss

_TEMPERATURE = 4.0  # as of prune.channels


class TransferWeights(Method):
    """Options of `transfer.weights`. Sites are names of groups and layers, or tensors of a student.

    Attributes:
        width: share of every group's indices that stay, above 0 to 1; or glob → share. None keeps
            all widths.
        layers: how many layers of every chain stay; a number below 1 is a share, rounded down; or
            glob → how many; or which ones, by name or position. None keeps all.
        spread: which layers a number takes: "even" both ends and evenly between, "alternate" the
            first of every run, "first", "last".
        select: which indices, and whether what is left is refitted: "leading", "ranked", "fitted".
        importance: the score of ranked and fitted: any that `prune.channels` knows.
        samples: calibration samples that a score and the refit see, at most.
        student: a `.laconic` file of the network to fill, in place of `width` and `layers`; it has
            the program's inputs and outputs.
        match: glob over the student's tensors → the program's name; each `*` stands for the same.
        keep: group → kept indices, in place of choosing them (a replay has it).
    """

    quick: ClassVar[Mapping[str, Any]] = {"width": 0.5, "layers": 0.5, "samples": 16}

    width: float | dict[str, float] | None = None
    layers: int | float | dict[str, int | float] | list[int | str] | None = None
    spread: depth.Spread = "even"
    select: Literal["leading", "ranked", "fitted"] = "fitted"
    importance: str = "l2"
    samples: int = Field(default=512, ge=1)
    student: str | None = None
    match: dict[str, str] = {}
    keep: dict[str, list[int]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        selection.check(0.0, self.importance)
        widths = self.width.values() if isinstance(self.width, dict) else [self.width]
        for share in widths:
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"width {share} is not above 0 to 1 (it is the share that stays)")
        depths = self.layers.values() if isinstance(self.layers, dict) else [self.layers]
        for count in depths:
            if isinstance(count, (int, float)) and (
                count < 0 or (isinstance(count, float) and count > 1)
            ):
                raise ValueError(f"layers {count} is neither a number of layers nor a share")
        if self.student is not None and self.width is not None:
            raise ValueError("a student has its own widths: leave width out")
        if self.match and self.student is None:
            raise ValueError("match names the tensors of a student: give student")
        return self

    def files(self) -> Sequence[str]:
        """The student."""
        return () if self.student is None else (self.student,)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Make the small network; the input stays as it was.

        Raises:
            RecipeError: sites match nothing; more layers than there are; a student with other
                inputs or outputs, or without one tensor in common.
            StorageError: a student that cannot be read.
            DataError: calibration data that a score or the refit needs and that do not fit.
        """
        job = Shrinking(self._plan(), program, context)
        start = _Start(self, job, program, context, sites)
        return start.into_student() if self.student is not None else start.within()

    def _plan(self) -> Plan:
        fit = self.select == "fitted"
        return Plan(
            ratios={}, importance=self.importance, compensate=fit, recalibrate=fit,
            samples=self.samples, temperature=_TEMPERATURE,
        )  # fmt: skip


class _Start:
    """One application: widths first, while the network still works, then depth."""

    def __init__(
        self,
        method: TransferWeights,
        job: Shrinking,
        program: Program,
        context: Context,
        sites: Sites,
    ) -> None:
        self.method, self.job, self.program = method, job, program
        self.context, self.sites = context, sites
        self.notes: list[str] = []

    def within(self) -> Outcome:
        """Slices of the program's own graph."""
        method, found = self.method, self.job.found
        work = self.program.clone()
        work.propagate()
        chains = depth.chains(work)
        named = [layer.name for chain in chains for layer in chain]
        sites, deep = self.sites, any(self.sites.match(name) for name in named)
        layers = named
        if method.layers is not None:
            if method.width is None:
                sites.choose(named)
            layers = depth.staying(chains, method.layers, method.spread, sites)
            self._say(not named, "no layer could be left out: no residual branch was found")
        elif method.width is None:
            self._say(True, "nothing was asked for: give width, layers or student")
        sizes: Counts = {}
        wide = any(sites.match(group.name) for group in found)
        if method.width is not None and (wide or not deep):
            sizes = slices.counts(found, method.width, sites)
            self._say(not sizes, "no group of this program shrinks to that width")
        small, keep = self._narrow(sizes)
        made, errors = self._shallow(small.program, layers)
        return self._outcome(made, keep, layers, small.changes, {**small.figures, **errors})

    def into_student(self) -> Outcome:
        """Slices that fill a given network."""
        method = self.method
        assert method.student is not None
        student = storage.load(method.student)
        work = self.program.clone()
        work.propagate()
        students.check(student, work)
        ours, theirs = depth.chains(student), depth.chains(work)
        if isinstance(method.layers, list):
            chosen = depth.staying(theirs, method.layers, method.spread, Sites())
            theirs = [c for x in theirs if (c := [y for y in x if y.name in chosen])]
        pairs = students.paired(
            student, work, method.match, (ours, theirs), method.spread, self.sites
        )
        layers = students.used(pairs, depth.chains(work))
        shapes = {pairs[name]: tuple(student.tensor(name).shape) for name in pairs}
        small, keep = self._narrow(slices.fitting(self.job.found, shapes))
        made, errors = self._shallow(small.program, layers)
        filled = students.fill(student, pairs, made, self.program)
        for what, names in (("by themselves, no group gives their shape", filled.cropped),
                            ("nothing: they keep their own values", filled.own)):  # fmt: skip
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self._say(bool(names), f"{', '.join(names[:5])}{more} took over {what}")
        taken = {"taken": len(filled.taken), "cropped": filled.cropped, "own": filled.own}
        return self._outcome(student, keep, layers, {}, {**small.figures, **errors, **taken})

    def _say(self, when: bool, sentence: str) -> None:
        if when:
            self.notes.append(sentence)

    def _narrow(self, sizes: Counts) -> tuple[Shrunk, Keep]:
        """The program with fewer indices in its groups."""
        keep = self._chosen(sizes)
        return self.job.finish(keep), keep

    def _chosen(self, sizes: Counts) -> Keep:
        method, job = self.method, self.job
        if method.keep is not None:
            return {name: torch.tensor(kept) for name, kept in sorted(method.keep.items())}
        if method.select == "leading" or not sizes:
            return slices.leading(sizes)
        score = selection.load(method.importance)
        scene = Scene(
            job.dense,
            [job.found.find(name) for name in sizes],
            job.batches() if score.needs_data else (),
            sampled_loss(self.context.task, self.context.generator(), _TEMPERATURE),
            self.context.seed,
            self.context.progress,
            job.notes,
        )
        return slices.ranked(sizes, score.removals(scene))

    def _shallow(self, program: Program, layers: Sequence[str]) -> tuple[Program, dict[str, Any]]:
        """The program with only those layers; with `fitted`, they make up for the others."""
        made = program.clone()
        chains = depth.chains(made)
        if all(layer.name in layers for chain in chains for layer in chain):
            return made, {}
        goals = depth.goals(chains, layers)
        depth.keep_only(made, chains, layers)
        if self.method.select != "fitted" or not goals:
            return made, {}
        program = program.clone()
        device, home = self.context.device, next((t.device for _, t in made.tensors()), None)
        report = towards(
            program.to(device), made.to(device), goals, self.job.batches(),
            seed=self.context.seed, progress=self.context.progress,
        )  # fmt: skip
        self.notes += report.notes
        return made.to(home), {"depth_error": report.errors}

    def _outcome(
        self,
        made: Program,
        keep: Keep,
        layers: Sequence[str],
        changes: Changes,
        figures: Mapping[str, Any],
    ) -> Outcome:
        before, after = cost(self.job.dense), cost(made)
        own = self.method.model_dump(mode="json", exclude_defaults=True)
        if self.method.layers is not None or self.method.student is not None:
            own["layers"] = list(layers)
        held = set(dict(made.tensors()))
        return Outcome(
            program=made,
            resolved={**own, "keep": {name: kept.tolist() for name, kept in keep.items()}},
            changes={name: dims for name, dims in changes.items() if name in held},
            notes=[*dict.fromkeys([*self.job.notes, *self.notes])],
            figures={
                **figures,
                "layers": list(layers),
                "macs": [before.macs, after.macs],
                "parameters": [before.params, after.params],
            },
        )
