"""Runs of weights that share a few short vectors: product quantisation.

Idea: the rows of a weight (one for each output) are cut into runs of `dim` elements, a whole
kernel or several input channels; k-means finds the vectors that stand for the runs, each run is
stored as the number of one. Eight bits for a run of 8 are one bit a weight. The vectors take
gradients (each the sum over its runs), the numbers stay. Tensors with runs of one length can share
one list (`per: "length"`), where a list for each costs too much.

Papers: Jégou et al. 2011 (product quantisation); "And the bit goes down" (Stock et al. 2020, arXiv
1907.05686), whose error counts by the layer's inputs: `weighted` takes the diagonal of that, or of
the Fisher information. The permutations of PQF (Martinez et al. 2021, arXiv 2010.15703) are not
done: they change the order of channels, which a graph with branches seldom leaves free.

Helps: the size of large layers below 2 bits a weight, where single values (share.cluster) are too
few; train afterwards (distill.logits), always. Does not: nothing gets faster. Runtimes get the
dense tensors that the vectors stand for: the gain is in bytes. Small layers, where a list of
vectors weighs as much as what it stands for, are left out with a note.

Cost: `rounds` products of all runs with all vectors; a minute for 10 million weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.suggest import nearest
from laconic.forms import vectors
from laconic.forms.vectors import Vectors
from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import insertion
from laconic.solvers.quantization.weight_sites import WeightSite, weight_sites
from laconic.solvers.sharing import vector_kmeans
from laconic.solvers.weights.curvature import Weighted

_FLOOR = 1e-4  # least that an error counts, in parts of the mean


class Vector(Weighted, Method):
    """Store runs of weights as numbers of shared short vectors. Sites are names of weights.

    Attributes:
        dim: longest run of elements of a row; each weight takes the largest divisor of its rows'
            length. Or glob → length, for the weights it matches (others stay float).
        codewords: vectors of a list, 2 to 4,096.
        per: a list for each tensor, or one for all tensors with runs of one length.
        rounds: of k-means.
        found: resolved: weight → vectors; of several weights with one list the first has them, the
            others name it.
    """

    quick: ClassVar[Mapping[str, Any]] = {
        "dim": 4, "codewords": 6, "weighted": "hessian", "samples": 8,
    }  # fmt: skip

    dim: int | dict[str, int] = 8
    codewords: int = Field(default=256, ge=2, le=4096)
    per: Literal["tensor", "length"] = "tensor"
    rounds: int = Field(default=30, ge=1)
    found: dict[str, list[list[float]] | str] | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Replace the chosen weights by numbers of vectors.

        Raises:
            RecipeError: sites or patterns of `dim` that match nothing, lengths below 1; `found` of
                another program.
            DataError: `weighted` without calibration data, or values that are not finite.
        """
        work = _Work(program.clone())
        work.program.propagate()
        found, work.notes = weight_sites(work.program)
        every = {site.name: site for site in found}
        lengths = self._lengths(work, [every[name] for name in sites.choose(every)])
        self._weigh(work, list(lengths), context)  # in a replay as well: it chooses the numbers
        for group in self._groups(work, every, lengths):
            self._replace(work, [every[name] for name in group], lengths[group[0]], context)
        work.program.drop_unused()
        work.program.recompile()
        if work.lists:
            work.notes.append(
                "runtimes get the dense tensors that the vectors stand for: the gain is in bytes"
            )
        elif not every:
            work.notes.append("nothing to share: no float weight of a known operator is left")
        resolved = self.model_dump(mode="json", exclude_defaults=True) | {"found": work.lists}
        return Outcome(
            program=work.program, resolved=resolved, notes=work.notes, figures=work.figures
        )

    # choosing -------------------------------------------------------------------------------

    def _lengths(self, work: "_Work", chosen: Sequence[WeightSite]) -> dict[str, int]:
        """Weight → elements of a run; weights that are better left alone get a note."""
        asked = {"*": self.dim} if isinstance(self.dim, int) else self.dim
        wanted: dict[str, int] = {}
        for pattern, length in asked.items():
            if length < 1:
                raise RecipeError(f"runs of {length} elements", where=f"share.vector dim {pattern}")
            for name in Sites.of(pattern).choose([site.name for site in chosen]):
                wanted.setdefault(name, length)
        lengths: dict[str, int] = {}
        for site in chosen:
            name, reason = site.name, "no pattern of dim matches it"
            if name in work.program.sparse:
                reason = "its zeros would be lost"
            elif name in wanted:
                weight = work.weight(name)
                row = weight.numel() // max(1, weight.shape[site.axis or 0])
                length = max(d for d in range(1, wanted[name] + 1) if row % d == 0) if row else 1
                if length > 1 or wanted[name] == 1:
                    lengths[name] = length
                    continue
                reason = f"its rows of {row} have no divisor up to {wanted[name]}; share.cluster it"
            work.notes.append(f"{name}: stays float, {reason}")
        return lengths

    def _groups(
        self, work: "_Work", every: Mapping[str, WeightSite], lengths: Mapping[str, int]
    ) -> list[list[str]]:
        """Weights with one list of vectors, in the order of the graph."""
        names = [name for name in every if name in lengths]
        if self.found is not None:
            for name in self.found:
                if name not in lengths:
                    raise RecipeError(
                        "no weight of this name can be stored as vectors",
                        where=f"share.vector found {name}",
                        hint=nearest(name, names),
                    )
            heads = [name for name in names if isinstance(self.found.get(name), list)]
            return [[h, *(n for n in names if self.found.get(n) == h)] for h in heads]
        if self.per == "tensor":
            return [[name] for name in names]
        alike: dict[Any, list[str]] = {}
        for name in names:
            alike.setdefault((lengths[name], work.weight(name).dtype), []).append(name)
        return list(alike.values())

    def _weigh(self, work: "_Work", names: Sequence[str], context: Context) -> None:
        """What an error of each weight counts."""
        if self.weighted == "none":
            return
        work.counted = self.counted(work.program, names, context)
        for name in names:
            if name not in work.counted or not bool(work.counted[name].any()):
                work.notes.append(f"{name}: found unweighted, the data say nothing about it")
                work.counted.pop(name, None)
            else:  # what the data never excite still wants the closest vector
                share = work.counted[name]
                work.counted[name] = share.clamp(min=_FLOOR * float(share.double().mean()))

    # replacing ------------------------------------------------------------------------------

    def _replace(
        self, work: "_Work", group: Sequence[WeightSite], length: int, context: Context
    ) -> None:
        """One list of vectors for a group of weights."""
        if self.found is None:
            values = self._search(work, group, length, context)
        else:
            given: Any = self.found[group[0].name]
            values = torch.tensor(given, dtype=work.weight(group[0].name).dtype)
            if values.ndim != 2 or values.shape[1] != length:
                raise RecipeError(
                    f"vectors of shape {list(values.shape)}, expected [count, {length}]",
                    where=f"{group[0].name} (found)",
                    hint="resolved vectors belong to the very program they were found on",
                )
        forms = {site.name: work.coded(site, values, length) for site in group}
        before = sum(work.weight(name).numel() * work.weight(name).element_size() for name in forms)
        spare = values.numel() * values.element_size()
        after = sum(form.nbytes() for form in forms.values()) - (len(forms) - 1) * spare
        names = ", ".join(list(forms)[:3]) + (", ..." if len(forms) > 3 else "")
        if after >= before:
            work.notes.append(f"{names}: stays float, {before} bytes would be {after} with vectors")
            return
        side = work.insert(group, forms, values)
        for site in group:
            first = group[0].name
            work.lists[site.name] = values.tolist() if site.name == first else first
            form, weight = forms[site.name], work.before[site.name].double()
            away = float((form.decode().double() - weight).norm() / weight.norm().clamp(min=1e-300))
            work.figures[site.name] = {
                "vectors": list(values.shape), "list": side, "error": away,
                "bits": math.log2(max(2, len(values))) / length,
            }  # fmt: skip
        work.figures[group[0].name]["bytes"] = [before, after]

    def _search(
        self, work: "_Work", group: Sequence[WeightSite], length: int, context: Context
    ) -> Tensor:
        """The vectors of a group, in the dtype of its weights."""
        runs = [work.runs(site, work.weight(site.name), length) for site in group]
        counted = None
        if any(site.name in work.counted for site in group):
            shares = [work.runs(site, work.counts(site.name), length) for site in group]
            # each tensor counts as much as it has elements, whatever the size of its inputs
            counted = torch.cat([share.float() / share.mean().clamp(min=1e-30) for share in shares])
        try:
            return vector_kmeans.centroids(
                torch.cat(runs), self.codewords, counted, context.generator(), self.rounds
            )
        except DataError as error:
            raise DataError(error.message, where=group[0].name, hint=error.hint) from error


@dataclass
class _Work:
    """What is known while the method runs."""

    program: Program
    notes: list[str] = field(default_factory=list[str])
    counted: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    before: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    lists: dict[str, list[list[float]] | str] = field(
        default_factory=dict[str, list[list[float]] | str]
    )
    figures: dict[str, Any] = field(default_factory=dict[str, Any])

    def weight(self, name: str) -> Tensor:
        """A stored weight, on the CPU."""
        return self.program.tensor(name).detach().cpu()

    def counts(self, name: str) -> Tensor:
        """What an error of each element counts; all alike where nothing is known."""
        return self.counted.get(name, torch.ones(self.weight(name).shape))

    def runs(self, site: WeightSite, x: Tensor, length: int) -> Tensor:
        """A tensor of a weight's shape as runs `[n, length]`."""
        return vectors.runs_of(x, length, site.axis or 0).flatten(0, 1)

    def coded(self, site: WeightSite, values: Tensor, length: int) -> Vectors:
        """A weight as numbers of vectors."""
        weight, axis = self.weight(site.name), site.axis or 0
        share = self.counted.get(site.name)
        runs = self.runs(site, weight, length)
        counted = None if share is None else self.runs(site, share, length).float()
        codes = vectors.nearest(runs.float(), values.float(), counted)
        kept = codes.reshape(weight.shape[axis], -1).to(vectors.code_type(len(values)))
        return Vectors(kept, values, tuple(weight.shape), axis)

    def insert(
        self, group: Sequence[WeightSite], forms: Mapping[str, Vectors], values: Tensor
    ) -> str:
        """Codes under the weights' names, the vectors beside the first; the vectors' name."""
        first = self.program.tensor(group[0].name)
        held = values.to(first.device)
        if isinstance(first, nn.Parameter):
            held = nn.Parameter(held, requires_grad=first.requires_grad)
        side = self.program.add_tensor(f"{group[0].name}_vectors", held)
        for site in group:
            self.before[site.name] = self.weight(site.name)
            self.program.set_tensor(site.name, forms[site.name].codes.to(first.device))
            insertion.insert_vectors(self.program, site, side, forms[site.name])
        return side
