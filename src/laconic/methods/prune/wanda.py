"""Weight times activation norm: weights that meet hardly any input go, row by row.

Idea: what a weight does to its layer's output is its magnitude times the norm of the input column
it multiplies. Weights compete within their output row, so that no output loses all of its inputs.

Paper: Sun et al. 2023 (arXiv 2306.11695).

Helps: large transformers with outlier features, where magnitudes alone fail; seconds instead of the
minutes of `prune.obs`, close to it up to about half of the weights.
Does not: nothing is compensated, so beyond that `prune.obs` is far ahead; in a convolutional
network with batch norm every row losing the same part is worse than a global threshold on
magnitudes (ResNet-20 at 80 %). Zeros make files smaller, not dense runtimes faster.

Cost: one forward pass over `samples` and a sort of each row.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.weights.weight_masks import Amount, Pruning, highest_in_rows
from laconic.solvers.weights.weight_scores import Calibration, scored
from laconic.statistics.layers import Layer


class Wanda(Method):
    """Options of `prune.wanda`.

    Attributes:
        ratio: part of the weights that goes, from 0 to below 1.
        scope: what weights compete within: the "row" of an output, the "tensor", or "global".
        samples: calibration samples at most.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    ratio: float = Field(default=0.5, ge=0, lt=1)
    scope: Literal["row", "tensor", "global"] = "row"
    samples: int = Field(default=256, ge=1)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Zero the weights of the smallest effect on their output. A replay needs the same data.

        Raises:
            RecipeError: sites that match nothing.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        work = Pruning(program, sites, context.device)
        data = Calibration(
            context.task, self.samples, context.seed, context.device, context.progress
        )
        scores = scored("wanda", work, data)
        if self.scope == "row":
            readers = work.layers()
            keep = {n: _by_row(readers[n][0], score, self.ratio) for n, score in scores.items()}
        else:
            keep = Amount(ratio=self.ratio, scope=self.scope).kept(scores)
        return Outcome(
            program=work.close(keep),
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures=work.figures,
        )


def _by_row(layer: Layer, score: Tensor, ratio: float) -> Tensor:
    rows = layer.matrix(score)
    columns = rows.shape[1]
    return layer.weight_from(highest_in_rows(rows, columns - round(ratio * columns)), score.bool())
