"""Hashed weights: every position falls into one of a few buckets, and only the buckets are stored.

Idea: a hash of a position chooses its bucket and a sign, so nothing about positions is stored. The
value of a bucket is the mean, with signs, of the weights that fall into it, which is the least
squares fit, by the Fisher information or the inputs if `weighted`; buckets take gradients, each the
signed sum over its positions.

Paper: Chen et al., "Compressing Neural Networks with the Hashing Trick" (arXiv 1504.04788).

Helps: as a start for training a network with the shape of a large one and the parameters of a small
one (the paper's use), and where a size has to be met exactly. Does not: keep a trained network. The
weights that share a bucket have nothing in common, so a fit leaves an error of sqrt(1 - 1/sharing)
whatever they are: train afterwards (distill.logits), long. Where weights are known, share.cluster
and share.vector are better at every size. Nothing gets faster: runtimes get the dense tensors that
the buckets stand for, the gain is in bytes.

Cost: milliseconds; a step of training computes the hashes of all positions.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.core.errors import DataError, RecipeError
from laconic.forms import hashed
from laconic.forms.hashed import Hashed
from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import insertion
from laconic.solvers.quantization.weight_sites import WeightSite, weight_sites
from laconic.solvers.weights.curvature import Weighted

_ODD = 0x9E3779B1  # keeps the seeds of neighbouring weights apart


class Hash(Weighted, Method):
    """Keep weights as hashed buckets. Sites are names of weights.

    Attributes:
        ratio: buckets in parts of the weight's elements; or glob → ratio, for the weights it
            matches (others stay as they are).
        seed: of the hashes, one drawn from it for each weight; None takes the run's.
    """

    quick: ClassVar[Mapping[str, Any]] = {"ratio": 0.5, "weighted": "hessian", "samples": 8}

    ratio: float | dict[str, float] = 0.125
    seed: int | None = Field(default=None, ge=0, lt=2**32)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Replace the chosen weights by buckets.

        Raises:
            RecipeError: sites or patterns of `ratio` that match nothing, ratios outside (0, 1).
            DataError: `weighted` without calibration data, or values that are not finite.
        """
        made = program.clone()
        made.propagate()
        found, notes = weight_sites(made)
        every = {site.name: site for site in found}
        ratios = self._ratios(sites.choose(every), made, notes)
        counted = self._weigh(made, list(ratios), context, notes)
        seed = context.seed % 2**32 if self.seed is None else self.seed
        figures: dict[str, Any] = {}
        for number, name in enumerate(every):
            if name in ratios:
                own = (seed + _ODD * number) % 2**32
                figures[name] = _replace(made, every[name], ratios[name], own, counted.get(name))
        made.drop_unused()
        made.recompile()
        if figures:
            notes.append(
                "runtimes get the dense tensors that the buckets stand for: the gain is in bytes"
            )
            notes.append("hashed weights are a start for training, not an approximation")
        elif not every:
            notes.append("nothing to hash: no float weight of a known operator is left")
        resolved = self.model_dump(mode="json", exclude_defaults=True) | {"seed": seed}
        return Outcome(program=made, resolved=resolved, notes=notes, figures=figures)

    def _ratios(self, chosen: list[str], program: Program, notes: list[str]) -> dict[str, float]:
        """Chosen weight → buckets in parts of its elements."""
        asked = self.ratio if isinstance(self.ratio, dict) else {"*": self.ratio}
        ratios: dict[str, float] = {}
        for pattern, ratio in asked.items():
            if not 0 < ratio < 1:
                raise RecipeError(
                    f"ratio {ratio:g} for {pattern!r}", where="share.hash",
                    hint="buckets are a part of the elements, between 0 and 1",
                )  # fmt: skip
            for name in Sites.of(pattern).choose(chosen):
                ratios.setdefault(name, ratio)
        for name in chosen:
            if name in program.sparse:
                ratios.pop(name, None)
                notes.append(f"{name}: stays as it is, its zeros would be lost")
            elif name not in ratios:
                notes.append(f"{name}: stays as it is, no pattern of ratio matches it")
            elif not bool(torch.isfinite(program.tensor(name)).all()):
                raise DataError("the weight holds NaN or infinite values", where=name)
            elif program.tensor(name).numel() < 2:
                del ratios[name]
                notes.append(f"{name}: stays as it is, it has no two elements to share")
        return ratios

    def _weigh(
        self, program: Program, names: list[str], context: Context, notes: list[str]
    ) -> dict[str, Tensor]:
        """What an error of each weight counts, where that is known."""
        if self.weighted == "none":
            return {}
        found = self.counted(program, names, context)
        known = {name: tensor for name, tensor in found.items() if bool(tensor.any())}
        notes += [f"{name}: fitted unweighted, the data say nothing about it"
                  for name in names if name not in known]  # fmt: skip
        return known


def _replace(
    program: Program, site: WeightSite, ratio: float, seed: int, counted: Tensor | None
) -> dict[str, Any]:
    """Buckets in the place of one weight; its figures."""
    held = program.tensor(site.name)
    weight = held.detach().cpu()
    least = -(-weight.numel() // hashed.SHARING)
    buckets = min(max(least, round(ratio * weight.numel())), weight.numel() - 1)
    if counted is not None:  # what the data never excite still wants a value
        counted = counted.double().clamp(min=1e-4 * float(counted.double().mean()))
    values = hashed.fitted(weight, buckets, seed, counted)
    made = Hashed(values, tuple(weight.shape), seed)
    stored: Tensor = values.to(held.device)
    if isinstance(held, nn.Parameter):
        stored = nn.Parameter(stored, requires_grad=held.requires_grad)
    program.set_tensor(site.name, stored)
    insertion.insert_hashed(program, site, made)
    away = (made.decode().double() - weight.double()).norm()
    return {
        "buckets": buckets,
        "bytes": [weight.numel() * weight.element_size(), made.nbytes()],
        "error": float(away / weight.double().norm().clamp(min=1e-300)),
    }
