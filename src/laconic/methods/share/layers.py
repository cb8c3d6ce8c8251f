"""Layers that share their weights: near-equal ones tied, others as sums over a common basis.

Idea: the weights of one shape are seen as points. `tie` stores the mean of those that lie close
together once, under all their names. `basis` writes each of them as a weighted sum of a few shared
tensors (the best ones in the squared sense, by a singular value decomposition of the stacked
weights) and keeps a handful of coefficients for each layer. Biases and norms stay each layer's own;
everything takes gradients, so that training (distill.logits) brings back what sharing took.

Papers: sharing across layers as in ALBERT (Lan et al. 2020, arXiv 1909.11942); the decomposition is
Eckart & Young 1936 on the stacked weights.

Helps: files of networks with many equal blocks that were trained tied, grown by copying layers, or
pruned of nothing yet; as a start for training small models with the depth of large ones.
Does not: nothing gets faster, every layer is still computed. Layers trained independently are close
to orthogonal: `error` then asks for as many basis tensors as there are layers and nothing is done,
which the notes say. Without training afterwards only small errors are bearable.

Cost: products of the weights of one shape with each other; seconds. No data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.suggest import nearest
from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import insertion
from laconic.solvers.quantization.weight_sites import WeightSite, weight_sites


class Layers(Method):
    """Store equally shaped weights once, or as sums over a shared basis. Sites are weights.

    Attributes:
        mode: "tie" stores the mean of a family once; "basis" a few tensors for the family and
            coefficients for each layer.
        error: largest relative distance of a layer's weight from what stands for it afterwards:
            chooses the families of `tie` and the rank of `basis`.
        rank: tensors of every basis; None: the fewest that keep `error`.
        layers: the families, each a list of weights, in place of the search. Their distance does
            not matter to `tie`.
        ranks: resolved: the rank of each family.
    """

    quick: ClassVar[Mapping[str, Any]] = {"error": 0.9}

    mode: Literal["tie", "basis"] = "basis"
    error: float = Field(default=0.1, ge=0)
    rank: int | None = Field(default=None, ge=1)
    layers: list[list[str]] | None = None
    ranks: list[int] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = [name for family in self.layers or [] for name in family]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} stands twice in layers")
        if self.ranks is not None and len(self.ranks) != len(self.layers or []):
            raise ValueError("ranks are given for resolved layers, one for each")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Share the chosen weights.

        Raises:
            RecipeError: sites that match nothing; `layers` that are unknown or of unequal shapes.
            DataError: weights that are not finite.
        """
        del context
        made = program.clone()
        made.propagate()
        every, refused = weight_sites(made)
        found = {site.name: site for site in every}
        chosen = {name: found[name] for name in sites.choose(found)}
        pruned = sorted(made.sparse & set(chosen))
        work = _Work(made, {name: site for name, site in chosen.items() if name not in pruned})
        work.notes += [note.replace("stays float", "not shared") for note in refused]
        work.notes += [f"{name}: not shared, its zeros would be lost" for name in pruned]
        families = self._families(work)
        shared: list[list[str]] = []
        ranks: list[int] = []
        for number, family in enumerate(families):
            rank = self._rank(work, family, None if self.ranks is None else self.ranks[number])
            if rank is not None:
                shared.append(family)
                ranks.append(rank)
                self._share(work, family, rank)
        result = work.tied() if self.mode == "tie" else work.program
        result.drop_unused()
        result.recompile()
        if shared and self.mode == "basis":
            work.notes.append(
                "runtimes get the float tensors that the sums stand for: the gain is in bytes"
            )
        elif shared:
            work.notes.append(
                "every layer is still computed, and runtimes store tied tensors as they please: "
                "the gain is in bytes"
            )
        if not shared and len(work.notes) == len(refused):
            work.notes.append("nothing to share: no two weights of one shape are close enough")
        plain = self.model_dump(mode="json", exclude_defaults=True)
        return Outcome(
            program=result,
            resolved=plain | {"layers": shared, "ranks": ranks},
            notes=work.notes,
            figures=work.figures,
        )

    def _families(self, work: "_Work") -> list[list[str]]:
        """The weights that could share, in the order of the graph."""
        if self.layers is not None:
            return [work.checked(family) for family in self.layers]
        alike: dict[Any, list[str]] = {}
        for name, site in work.sites.items():
            tensor = work.weight(name)
            alike.setdefault((tuple(tensor.shape), tensor.dtype, site.axis), []).append(name)
        if self.mode == "basis":
            return [names for names in alike.values() if len(names) > 1]
        return [
            family for names in alike.values() for family in self._close(work, names)
            if len(family) > 1
        ]  # fmt: skip

    def _close(self, work: "_Work", names: Sequence[str]) -> list[list[str]]:
        """Families whose members all lie within `error` of their mean, greedily."""
        families: list[list[str]] = []
        for name in names:
            for family in families:
                if max(work.distances([*family, name])) <= self.error:
                    family.append(name)
                    break
            else:
                families.append([name])
        return families

    def _rank(self, work: "_Work", family: Sequence[str], known: int | None) -> int | None:
        """How many tensors stand for a family; None, with a note, where that saves nothing."""
        if self.mode == "tie":
            return 1
        errors = work.errors(family)
        size, count = work.weight(family[0]).numel(), len(family)
        enough = [r for r, error in enumerate(errors, 1) if error <= self.error] or [count]
        rank = known or self.rank or enough[0]
        if rank <= count and rank * (size + count) < size * count:
            return rank
        some = ", ".join(family[:3]) + (", ..." if count > 3 else "")
        work.notes.append(
            f"{some}: not shared, {rank} tensors for {count} layers store no less "
            f"(one leaves an error of {errors[0]:.2f})"
        )
        return None

    def _share(self, work: "_Work", family: Sequence[str], rank: int) -> None:
        size, count = work.weight(family[0]).numel(), len(family)
        if self.mode == "tie":
            errors, after = work.distances(family), size
            work.tie(family)
        else:
            errors, after = work.combine(family, rank), rank * (size + count)
        work.figures[family[0]] = {
            "layers": count,
            "rank": rank,
            "parameters": [size * count, after],
            "error": max(errors),
        }


@dataclass
class _Work:
    """The program that is changed, and what is known about it."""

    program: Program
    sites: Mapping[str, WeightSite]
    notes: list[str] = field(default_factory=list[str])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    ties: dict[str, str] = field(default_factory=dict[str, str])

    def weight(self, name: str) -> Tensor:
        """A stored weight."""
        return self.program.tensor(name).detach()

    def checked(self, family: Sequence[str]) -> list[str]:
        """A family that was asked for, by the names its weights are stored under."""
        for name in family:
            if self.program.aliases.get(name, name) not in self.sites:
                raise RecipeError(
                    f"no weight {name!r} to share among the selected ones",
                    where="share.layers layers",
                    hint=nearest(name, list(self.sites)),
                )
        names = [self.program.aliases.get(name, name) for name in family]
        shapes = {tuple(self.weight(name).shape) for name in names}
        if len(shapes) > 1 or len(set(names)) < 2:
            raise RecipeError(
                f"{list(family)} has {len(set(names))} weights of shapes {sorted(shapes)}",
                where="share.layers layers",
                hint="a family is two weights or more, all of one shape",
            )
        return names

    def stacked(self, family: Sequence[str]) -> Tensor:
        """The weights as rows, float64 `[layers, elements]`.

        Raises:
            DataError: NaN or infinite values.
        """
        for name in family:
            if not bool(torch.isfinite(self.weight(name)).all()):
                raise DataError("the weight holds NaN or infinite values", where=name)
        return torch.stack([self.weight(name).double().flatten().cpu() for name in family])

    def distances(self, family: Sequence[str]) -> list[float]:
        """Relative distance of each weight from their mean."""
        rows = self.stacked(family)
        return _relative(rows - rows.mean(0), rows)

    def errors(self, family: Sequence[str]) -> list[float]:
        """The largest relative error of any layer with a basis of 1, 2, ... tensors."""
        rows = self.stacked(family)
        turned = _directions(rows)
        return [
            max(_relative(rows - turned[:, :r] @ (turned[:, :r].T @ rows), rows))
            for r in range(1, len(family) + 1)
        ]

    def combine(self, family: Sequence[str], rank: int) -> list[float]:
        """Replace a family by coefficients and one basis; the relative error of each layer."""
        rows = self.stacked(family)
        coefficients = _directions(rows)[:, :rank]
        first = self.program.tensor(family[0])
        basis = (coefficients.T @ rows).reshape(rank, *first.shape).to(first)
        if isinstance(first, nn.Parameter):
            basis = nn.Parameter(basis, requires_grad=first.requires_grad)
        name = self.program.add_tensor(f"{family[0]}_basis", basis)
        for own, member in zip(coefficients, family, strict=True):
            self.program.set_tensor(member, own.to(first).contiguous())
            insertion.insert_combine(self.program, self.sites[member], name)
        return _relative(rows - coefficients @ (coefficients.T @ rows), rows)

    def tie(self, family: Sequence[str]) -> None:
        """Store the mean of a family under its first name."""
        first = self.weight(family[0])
        mean = self.stacked(family).mean(0).reshape(first.shape).to(first)
        self.program.set_tensor(family[0], mean)
        self.ties |= dict.fromkeys(family[1:], family[0])

    def tied(self) -> Program:
        """The program with every tied name an alias."""
        if not self.ties:
            return self.program
        old = self.program
        for node in old.graph.nodes:
            if node.op == "get_attr":
                node.target = self.ties.get(str(node.target), node.target)
        held = {alias: self.ties.get(name, name) for alias, name in old.aliases.items()}
        made = Program(
            old.graph,
            {name: tensor for name, tensor in old.tensors() if name not in self.ties},
            old.signature,
            old.example,
            dynamic=old.dynamic,
            aliases=held | self.ties,
            lost=old.lost,
            sparse=old.sparse,
        )
        made.share()  # what is not tied is still the memory of the step's input
        return made


def _directions(rows: Tensor) -> Tensor:
    """Left singular vectors of `rows` as columns, the strongest first, of a settled sign."""
    vectors = torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1)
    largest = vectors.abs().argmax(0)
    return vectors * vectors[largest, torch.arange(len(vectors))].sign()


def _relative(away: Tensor, rows: Tensor) -> list[float]:
    """Norm of each row of `away` in parts of that of `rows`; 0 for a row of zeros left at zero."""
    norms = rows.norm(dim=1)
    return [
        float(a / n) if n else float(bool(a)) for a, n in zip(away.norm(dim=1), norms, strict=True)
    ]
