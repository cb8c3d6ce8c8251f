"""Weights that share a few values: a codebook for each tensor, channel or group of channels.

Idea: the values of a weight are gathered into clusters by k-means, every value is stored as the
number of its cluster, and what the clusters stand for is stored once and can be trained on (each
value of a codebook gets the summed gradient of its members; the numbers stay). Zeros of a pruned
tensor are a cluster of their own and stay exactly zero, so that prune, cluster and the entropy
coder of the file add up.

Papers: Deep Compression (Han et al. 2016, arXiv 1510.00149); clustering weighted by the diagonal of
the Hessian: Choi et al. 2017 (arXiv 1612.01543).

Helps: the size of the file, most at 2 to 5 bits, where a uniform grid has too few values in the
middle and too many at the ends; after pruning, where few values are left to tell apart. `fisher`
helps at 2 and 3 bits; `hessian` is cheaper, but knows only a layer's inputs and can come out worse
than `none`. Train the values afterwards (distill.logits), above all below 4 bits.
Does not: nothing gets faster. No runtime computes with codebooks; exported, the weight is the float
tensor it stands for, exactly. Above 5 bits quantize.static is as good and fast as well. Codebooks
for each channel of a small tensor cost more than they save and are left out with a note.

Cost: seconds for millions of weights (a sort and a small dynamic programme for each codebook).
`hessian` is one forward pass over `samples`, `fisher` a forward and backward pass with the gradient
of every weight for every sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.suggest import nearest
from laconic.forms import codebook
from laconic.forms.codebook import Codebook
from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import insertion
from laconic.solvers.quantization.weight_sites import WeightSite, weight_sites
from laconic.solvers.sharing import kmeans
from laconic.solvers.weights.curvature import Weighted

_SPARSE = 0.01  # a tensor with a larger share of exact zeros was pruned

Books = dict[str, list[list[float]]]


class Cluster(Weighted, Method):
    """Store weights as numbers of a few shared values. Sites are names of weights.

    Attributes:
        bits: of a number: a codebook has 2**bits values, 1 to 8; or glob → bits, for the weights
            it matches (others stay float), as in {"conv*": 8, "fc*": 5}.
        clusters: values of a codebook, 2 to 256, in place of `bits`.
        per: one codebook for each tensor, output channel, or group of output channels.
        group: output channels of a group.
        start: "exact" finds the best clusters, "linear" and "plusplus" are Lloyd's iteration from
            values at equal distances, or drawn.
        zeros: exact zeros are kept as one of the values; "auto": in pruned tensors, and where more
            than 1 % are zero.
        codebooks: weight → values, in place of the search (a replay has them).
    """

    quick: ClassVar[Mapping[str, Any]] = {"bits": 3, "weighted": "hessian", "samples": 8}

    bits: int | dict[str, int] = 4
    clusters: int | None = Field(default=None, ge=2, le=256)
    per: Literal["tensor", "channel", "group"] = "tensor"
    group: int = Field(default=16, ge=1)
    start: kmeans.Start = "exact"
    zeros: Literal["auto"] | bool = "auto"
    codebooks: Books | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for bits in self.bits.values() if isinstance(self.bits, dict) else [self.bits]:
            if not 1 <= bits <= 8:
                raise ValueError(f"bits {bits} is not from 1 to 8")
        if self.clusters is not None and "bits" in self.model_fields_set:
            raise ValueError("clusters stands in place of bits: give one of them")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Replace the chosen weights by codebooks.

        Raises:
            RecipeError: sites or patterns of `bits` that match nothing; `codebooks` of another
                program.
            DataError: `weighted` without calibration data, or values that are not finite.
        """
        work = _Work(program.clone())
        work.program.propagate()
        every, work.notes = weight_sites(work.program)
        counts = self._counts(work.program, every, sites, work.notes)
        if not counts:
            work.notes.append("nothing to cluster: no float weight of a known operator is left")
        if self.codebooks is None:
            self._weigh(work, list(counts), context)
        for name in self.codebooks or {}:
            if name not in counts:
                raise RecipeError(
                    "no weight of this name can be clustered",
                    where=f"share.cluster codebooks {name}",
                    hint=nearest(name, counts),
                )
        for site in every:
            if site.name in counts:
                self._replace(work, site, counts[site.name], context)
        work.program.drop_unused()
        work.program.recompile()
        if work.books:
            work.notes.append(
                "runtimes get the float tensors that the codebooks stand for: the gain is in bytes"
            )
        plain = self.model_dump(mode="json", exclude_defaults=True)
        resolved = plain | {"codebooks": work.books}
        return Outcome(
            program=work.program, resolved=resolved, notes=work.notes, figures=work.figures
        )

    # choosing -------------------------------------------------------------------------------

    def _counts(
        self, program: Program, found: Sequence[WeightSite], sites: Sites, notes: list[str]
    ) -> dict[str, int]:
        """Chosen weight → how many values its codebooks have."""
        chosen = _chosen(program, sites, [site.name for site in found])
        if self.clusters is not None:
            return {name: self.clusters for name in chosen}
        if isinstance(self.bits, int):
            return {name: 2**self.bits for name in chosen}
        counts: dict[str, int] = {}
        for pattern, bits in self.bits.items():
            for name in _chosen(program, Sites.of(pattern), chosen):
                counts.setdefault(name, 2**bits)
        notes += [f"{name}: stays float, no pattern of bits matches it"
                  for name in chosen if name not in counts]  # fmt: skip
        return counts

    def _weigh(self, work: "_Work", names: Sequence[str], context: Context) -> None:
        """What an error of each weight counts."""
        if self.weighted == "none":
            return
        work.weights = self.counted(work.program, names, context)
        for name in names:
            if name not in work.weights:
                work.notes.append(f"{name}: clustered unweighted, no linear map of inputs reads it")
            elif not bool(work.weights[name].any()):
                work.notes.append(f"{name}: clustered unweighted, the data never excite it")

    # one weight -----------------------------------------------------------------------------

    def _replace(self, work: "_Work", site: WeightSite, clusters: int, context: Context) -> None:
        weight = work.program.tensor(site.name).detach().cpu()
        axis, group = self._rows(site, weight)
        if self.per != "tensor" and axis is None:
            work.notes.append(f"{site.name}: one codebook, its operators disagree on its outputs")
        zero = self._keeps_zeros(work.program, site.name, weight)
        if self.codebooks is None:
            books = self._search(work, site.name, weight, (axis, group, zero), clusters, context)
        elif site.name in self.codebooks:
            books = [torch.tensor(book, dtype=weight.dtype) for book in self.codebooks[site.name]]
        else:
            return
        pieces = 1 if axis is None else -(-weight.shape[axis] // group)
        if len(books) != pieces:
            raise RecipeError(
                f"{len(books)} codebooks for {pieces} groups of channels",
                where=f"{site.name} (codebooks)",
                hint="resolved codebooks belong to the very program they were found on",
            )
        made = codebook.nearest(weight, books, axis, group, zero)
        before = weight.numel() * weight.element_size()
        if made.nbytes() >= before:
            work.notes.append(
                f"{site.name}: stays float, {before} bytes would be {made.nbytes()} with codebooks"
            )
            return
        work.books[site.name] = [book.tolist() for book in books]
        away = (made.decode() - weight).double().norm() / weight.double().norm().clamp(min=1e-300)
        work.figures[site.name] = {
            "values": made.values.shape[-1],
            "bytes": [before, made.nbytes()],
            "error": float(away),
        }
        _insert(work.program, site, made)

    def _keeps_zeros(self, program: Program, name: str, weight: Tensor) -> bool:
        """Whether exact zeros of the weight are a value of their own."""
        if self.zeros != "auto":
            return self.zeros
        return name in program.sparse or bool((weight == 0).double().mean() > _SPARSE)

    def _rows(self, site: WeightSite, weight: Tensor) -> tuple[int | None, int]:
        """The axis that codebooks belong to, and how many of its slices share one."""
        if self.per == "tensor" or site.axis is None:
            return None, 1
        return site.axis, 1 if self.per == "channel" else min(self.group, weight.shape[site.axis])

    def _search(
        self,
        work: "_Work",
        name: str,
        weight: Tensor,
        rows: tuple[int | None, int, bool],
        clusters: int,
        context: Context,
    ) -> list[Tensor]:
        """The values of every codebook, in the dtype of the weight.

        Raises:
            DataError: the weight holds NaN or infinite values.
        """
        axis, group, zero = rows
        counted = work.weights.get(name, torch.ones(()).expand(weight.shape))
        pieces = [weight] if axis is None else list(weight.split(group, axis))
        shares = [counted] if axis is None else list(counted.split(group, axis))
        generator = context.generator()
        books: list[Tensor] = []
        for piece, share in zip(pieces, shares, strict=True):
            kept = piece != 0 if zero else torch.ones_like(piece, dtype=torch.bool)
            try:
                found = kmeans.centroids(
                    piece[kept], clusters - int(zero), share[kept],
                    start=self.start, generator=generator,
                )  # fmt: skip
            except DataError as error:
                raise DataError(error.message, where=name, hint=error.hint) from error
            books.append(found.to(weight.dtype).unique())
        return books


@dataclass
class _Work:
    """What is known while the method runs."""

    program: Program
    notes: list[str] = field(default_factory=list[str])
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    books: Books = field(default_factory=dict[str, list[list[float]]])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])


def _insert(program: Program, site: WeightSite, made: Codebook) -> None:
    """Codes under the weight's name, values beside it, one node that decodes them."""
    held = program.tensor(site.name)
    values = made.values.to(held.device)
    if isinstance(held, nn.Parameter):
        values = nn.Parameter(values, requires_grad=held.requires_grad)
    program.set_tensor(site.name, made.codes.to(held.device))
    if not made.zero:
        program.sparse -= {site.name}
    insertion.insert_lookup(program, site, values, made)


def _chosen(program: Program, sites: Sites, names: Sequence[str]) -> list[str]:
    """The selected names; a tied weight is in by any of its names."""
    others: dict[str, list[str]] = {}
    for alias, name in program.aliases.items():
        others.setdefault(name, []).append(alias)
    every = {name: [name, *others.get(name, ())] for name in names}
    sites.choose([each for group in every.values() for each in group])
    return [name for name, group in every.items() if any(sites.match(each) for each in group)]
