"""N:M patterns: of every M neighbouring weights, N stay.

Idea: hardware skips zeros that stand in a fixed pattern: 2:4 runs on the sparse tensor cores of
GPUs since Ampere. The pattern runs along a linear layer's inputs, and along a convolution's input
channels at each place of its kernel. `score: obs` drops and repairs as `prune.obs` does; the other
scores keep the N best of each M and leave the rest as it is.

Papers: Mishra et al. 2021 (arXiv 2104.08378); with second-order repair: Frantar & Alistarh 2023
(arXiv 2301.00774); Sun et al. 2023 (arXiv 2306.11695).

Helps: linear layers of large transformers on such GPUs, and files. `semi_structured` says whether a
tensor qualifies for torch's semi-structured tensors (half precision, both sizes multiples of 64).
Does not: CPUs and dense runtimes are not faster for it. At equal sparsity the pattern costs more
accuracy than free choice. Weights with fewer than M inputs stay whole, and are noted.

Cost: that of the score; with obs, that of `prune.obs`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.weights import patterns
from laconic.solvers.weights.obs_layers import Surgeon
from laconic.solvers.weights.obs_weights import Wanted
from laconic.solvers.weights.weight_masks import Pruning
from laconic.solvers.weights.weight_scores import Sampled, scored


class Nm(Sampled, Method):
    """Options of `prune.nm`; `samples` and `temperature` as in `Sampled`.

    Attributes:
        n: so many of every `m` stay.
        m: neighbours that share a pattern.
        score: what a weight is worth: l1, l2, taylor, fisher, wanda, or obs, which also repairs.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    n: int = Field(default=2, ge=1)
    m: int = Field(default=4, ge=2)
    score: Literal["l1", "l2", "taylor", "fisher", "wanda", "obs"] = "obs"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n > self.m:
            raise ValueError(f"n {self.n} of every m {self.m} cannot stay: n is at most m")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Zero all but the best n of every m. A replay needs the same data.

        Raises:
            RecipeError: sites that match nothing.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        work = Pruning(program, sites, context.device)
        data = self.calibration(context)
        aims, readers = self._aims(work), work.layers()
        if self.score == "obs":
            made = Surgeon(work, data, readers).prune(aims)
        else:
            scores = scored(self.score, work, data)
            made = work.close(
                {n: patterns.kept(readers[n][0], scores[n], a) for n, a in aims.items()}
            )
        work.figures["semi_structured"] = [
            name for name in aims if (self.n, self.m) == (2, 4) and fits(made.tensor(name))
        ]
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures=work.figures,
        )

    def _aims(self, work: Pruning) -> dict[str, Wanted]:
        """The pattern of every weight that has room for it."""
        aims: dict[str, Wanted] = {}
        for name, (layer, *_) in work.layers().items():
            width = patterns.room(layer, work.bare.tensor(name), self.m)
            if not width:
                work.notes.append(f"{name}: stays, fewer than {self.m} inputs an output")
            elif self.n < self.m:
                aims[name] = Wanted(n=self.n, m=self.m, width=width)
        return aims


def fits(weight: Tensor) -> bool:
    """Whether torch's semi-structured tensors take a 2:4 weight of this shape, in half precision.

    >>> import torch
    >>> fits(torch.zeros(128, 64)), fits(torch.zeros(10, 64))
    (True, False)
    """
    return weight.ndim == 2 and all(size % 64 == 0 for size in weight.shape)
