"""Second-order pruning in one shot: weights go where the rest of their row can make up for them.

Idea: layer by layer, front to back, each layer is first fitted by least squares so that on the
inputs the pruned network gives it, it does what it did in the network before; then its weights are
dropped by what that costs after the best repair, and the others of the row are solved for. A batch
norm behind it takes the new statistics. No labels, no training. With `scope: global` the parts of
the layers follow from one threshold for all: on magnitudes, or on the Fisher information.

Papers: Hassibi & Stork 1993; ExactOBS (Frantar & Alistarh 2022, arXiv 2208.11580) for layers where
it is affordable, SparseGPT (2023, arXiv 2301.00774) for larger ones; asymmetric refit as in He et
al. 2017 (arXiv 1707.06168).

Helps: convolutions and linear layers at 70 to 90 %, where magnitudes break down. Zeros last when
training goes on.
`allocation: fisher` does not depend on how a network happens to scale its layers, but it counts
nothing of what is repaired and starves the last layers: a ResNet-20 with 80 and 90 % zeros, nothing
trained, is right on 84 and 66 % of 1,000 validation images with it, on 87 and 74 % with magnitudes
(zeros by magnitude alone, batch norm measured anew: 77 and 49 %).
Does not: dense runtimes are not faster for it, files are smaller; embeddings and transposed
convolutions stay. Grouped convolutions and weights that several layers read are pruned and repaired
from their own inputs, before the others. Too few samples for a layer's columns are noted: the
ridge, chosen on held-out halves of the data, then keeps it close to its old weights.

Cost: one pass over `samples` in two networks side by side, and for each layer of n columns and m
rows at most 8 m n^3 multiply-adds (exact) or n^3 + m n^2 (sweep). A ResNet-20 with 256 samples at
80 % takes 16 seconds of one core, 7 of them in the exact solver; `solver: sweep` saves these and
costs 1.4 points. `allocation: fisher` adds a backward pass over the samples.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.weights.obs_layers import Surgeon
from laconic.solvers.weights.obs_weights import Solver, Wanted
from laconic.solvers.weights.weight_masks import Amount, Pruning, Scope
from laconic.solvers.weights.weight_scores import Calibration, Sampled, scored


class Obs(Sampled, Method):
    """Options of `prune.obs`; `samples` and `temperature` as in `Sampled`.

    Attributes:
        ratio: part of the weights that goes, from 0 to below 1.
        count: keep so many weights; takes the place of `ratio`.
        scope: "global": `ratio` and `count` hold for all tensors together, "tensor" for each.
        allocation: what decides the parts of the tensors with `scope: global`: "magnitude" or
            "fisher".
        solver: "exact", "sweep", or "auto": exact where a layer is small enough for it.
        kept: tensor → how many of its weights stay, in place of everything that chooses them (a
            replay has it).
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    ratio: float = Field(default=0.5, ge=0, lt=1)
    count: int | None = Field(default=None, ge=1)
    scope: Scope = "global"
    allocation: Literal["magnitude", "fisher"] = "magnitude"
    solver: Solver = "auto"
    kept: dict[str, int] | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Zero weights and refit the others. A replay needs the same data.

        Raises:
            RecipeError: sites that match nothing; `kept` of another program.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        work = Pruning(program, sites, context.device)
        data = self.calibration(context)
        readers = work.layers()
        counts = self._counts(work, data) if self.kept is None else self._asked(work.names)
        wanted = {name: Wanted(count=counts[name]) for name in work.names if name in counts}
        wanted = {n: w for n, w in wanted.items() if w.count < work.program.tensor(n).numel()}
        made = Surgeon(work, data, readers, self.solver).prune(wanted)
        resolved = {**self.model_dump(mode="json", exclude_defaults=True), "kept": counts}
        return Outcome(program=made, resolved=resolved, notes=work.notes, figures=work.figures)

    def _asked(self, names: list[str]) -> dict[str, int]:
        """What `kept` says."""
        kept = dict(self.kept or {})
        for name, count in kept.items():
            if name not in names or count < 0:
                raise RecipeError(
                    "no weight of this name can be pruned" if count >= 0 else f"{count} stay",
                    where=f"prune.obs kept {name}",
                    hint=nearest(name, names),
                )
        return kept

    def _counts(self, work: Pruning, data: Calibration) -> dict[str, int]:
        """How many weights of each tensor stay."""
        options = {"count": self.count} if self.count is not None else {"ratio": self.ratio}
        amount = Amount(scope=self.scope, **options)  # pyright: ignore[reportArgumentType]
        shares = self.scope == "global" and len(work.names) > 1
        looks = shares and self.ratio > 0 and self.allocation == "fisher"
        scores = scored("fisher" if looks else "l1", work, data)
        return {name: int(keep.sum()) for name, keep in amount.kept(scores).items()}
