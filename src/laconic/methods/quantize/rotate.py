"""Rotate axes, so that no channel stands out, before weights and activations are quantised.

Idea: an axis that is only ever written and read by linear operators can be seen from any angle:
`x R` in place of `x`, R orthogonal, is undone in the weights that read it. Hadamard matrices spread
a value that stands out over all channels, which integer grids like. Everything goes into stored
weights: the graph stays, nothing is computed at run time. Where that is exact is proved operator by
operator on the groups (`laconic inspect`): the residual stream of transformers whose norms stand in
front of the layers (their weights go into the next layers first; rotations around layer norm keep
the all-ones vector, so that its mean stays a mean), values and outputs of attention heads, queries
and keys without rotary positions, two linear layers in a row. Where a nonlinearity, a gate, a norm
that something else reads, or an operator nobody knows touches the axis, it stays; notes name it.

A rotation is kept if it brings the outputs of the network at `bits` nearer to its own (`judge`):
their divergence, cosine or squared error, as suits the task; with `steps` the matrices are learned
from there, by steps on the orthogonal group.

Papers: Ashkboos et al. 2024, "QuaRot" (arXiv 2404.00456); Liu et al. 2024, "SpinQuant" (arXiv
2405.16406).

Helps: language models and other transformers with norms in front, at 4 bits and below, with 8-bit
or 4-bit activations; quantise afterwards. Does not: convolutional networks (batch norm and ReLU
treat every channel for itself), BERT's residual stream (its norms' weights are read by the sums,
so only heads are rotated), weights on 8 bits, which lose nothing anyway. Pruned zeros are not
rotated. A tied head that has to take a norm's weight in gets a weight of its own, which is noted.

Cost: one pass over `samples` for each group with `judge`, and several for each step.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.core.errors import RecipeError
from laconic.core.task import to_device
from laconic.methods.base import Context, Method, Outcome
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import selection
from laconic.solvers.finite import refuse_broken
from laconic.solvers.layers import folding
from laconic.solvers.quantization import orthogonal, ranges, rotation, rotation_search
from laconic.solvers.quantization.rotatable import Turn
from laconic.solvers.quantization.rotation_search import Batch, Grids, Probe, distance
from laconic.statistics.batches import Batches, count, flat_inputs

_MOST_NOTES = 40


class QuantizeRotate(Method):
    """Options of `quantize.rotate`. Sites are names of groups.

    Attributes:
        judge: keep only rotations that bring the outputs of the quantised network nearer to the
            network's own.
        steps: learning steps; 0 keeps the Hadamard matrices.
        angle: radians that a matrix turns at most in the first step.
        loss: what is learned on and judged by: "output", the distance of the outputs, or "task",
            the task's loss on its training data.
        bits: of the weights that are judged.
        activation_bits: of the activations that are judged; None: they stay float.
        first_last: bits of the first and the last weight that are judged; None: like the others.
        weight_range: how the judged weights' ranges are chosen.
        samples: calibration samples.
        kept: resolved: groups whose rotations are kept, instead of judging.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 4, "steps": 1}

    judge: bool = True
    steps: int = Field(default=0, ge=0)
    angle: float = Field(default=0.2, gt=0, lt=3)
    loss: Literal["output", "task"] = "output"
    bits: int = Field(default=4, ge=2, le=16)
    activation_bits: int | None = Field(default=8, ge=2, le=16)
    first_last: int | None = Field(default=8, ge=2, le=16)
    weight_range: ranges.Rule = "mse"
    samples: int = Field(default=64, ge=1)
    kept: tuple[str, ...] | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """The same function, axes rotated; equal up to float rounding in eval mode.

        Raises:
            RecipeError: sites that match nothing, or only groups that cannot change.
            DataError: no calibration data, or NaN or infinite values; names the batch.
        """
        opened, notes = _opened(program, context)
        names = selection.chosen(groups(opened), sites)
        figures: dict[str, Any] = {}
        if self.kept is None:
            names, told = self._worthwhile(opened, names, context, notes)
            figures |= told
        else:
            names = self._resolved_names(names)
        made, _ = _opened(program, context)
        prepared = rotation.prepare(made, names)
        notes += prepared.notes
        by = self._first(prepared.turns.values(), context)
        if self.steps and by:
            probe = self._probe(made, prepared.turns)
            batches = list(self._batches(made, context))
            by, figures["learned"] = rotation_search.learn(
                probe, by, batches, self.steps, self.angle, context.progress
            )
        rotation.turn(made, prepared.turns.values(), by)
        made.recompile()
        return Outcome(
            program=made if by else program.clone(),
            resolved={**self.model_dump(mode="json", exclude_defaults=True), "kept": sorted(by)},
            notes=notes[:_MOST_NOTES],
            figures={**figures, "rotated": sorted(by)},
        )

    def _worthwhile(
        self, program: Program, names: Sequence[str], context: Context, notes: list[str]
    ) -> tuple[list[str], dict[str, Any]]:
        """The groups that can be rotated and, with `judge`, gain by it; `program` is changed."""
        prepared = rotation.prepare(program, names)
        notes += [f"{name} keeps its angle: {why}" for name, why in prepared.refused.items()]
        if not prepared.turns:
            notes.append("nothing to rotate: no axis is written and read by linear operators only")
        if not self.judge or not prepared.turns:
            return list(prepared.turns), {}
        by = self._first(prepared.turns.values(), context)
        probe = self._probe(program, prepared.turns)
        batches = list(self._batches(program, context))
        kept, told = rotation_search.helpful(probe, by, batches, context.progress)
        if not kept:
            notes.append(f"no rotation lowers the error at {self.bits} bits: none is kept")
        return list(kept), {"judged": told}

    def _probe(self, program: Program, turns: Mapping[str, Turn]) -> Probe:
        return Probe(
            program,
            turns,
            Grids(self.bits, self.activation_bits, self.first_last, self.weight_range),
        )

    def _resolved_names(self, names: Sequence[str]) -> list[str]:
        """Raises RecipeError: a kept group is not there."""
        assert self.kept is not None
        missing = [name for name in self.kept if name not in names]
        if missing:
            raise RecipeError(
                f"no group {missing[0]}",
                where="quantize.rotate kept",
                hint="resolved groups belong to the very program they were judged on; "
                "leave 'kept' out to judge again",
            )
        return list(self.kept)

    def _first(self, turns: Iterable[Turn], context: Context) -> dict[str, Tensor]:
        """Hadamard matrices, the same for a group whatever others there are."""
        made: dict[str, Tensor] = {}
        for turn in turns:
            seed = context.seed + zlib.crc32(turn.group.name.encode())
            matrix = orthogonal.hadamard(turn.group.size, torch.Generator().manual_seed(seed))
            matrix = orthogonal.keeping_ones(matrix) if turn.keeps_ones else matrix
            made[turn.group.name] = matrix.to(context.device)
        return made

    def _batches(self, program: Program, context: Context) -> Iterator[Batch]:
        """Inputs and what to judge their outputs by."""
        task = context.task
        if self.loss == "output":
            compare = distance(task)
            for inputs in Batches(program, task, self.samples, context.device, size=16):
                with torch.no_grad():
                    wanted = task.logits(program.signature.arrange(program.run_flat(*inputs)))
                yield (
                    inputs,
                    lambda outputs, wanted=wanted: compare(
                        task.logits(program.signature.arrange(tuple(outputs))), wanted
                    ),
                )
            return
        seen = 0
        for number, batch in enumerate(task.batches("train")):
            inputs, targets = to_device(task.split(batch), context.device)
            flat = flat_inputs(program, inputs, f"training batch {number}")
            yield (
                flat,
                lambda outputs, targets=targets: task.loss(
                    program.signature.arrange(tuple(outputs)), targets
                ),
            )
            seen += count(program, flat)
            if seen >= self.samples:
                return


def _opened(program: Program, context: Context) -> tuple[Program, list[str]]:
    """A copy on the device, batch norm folded, and notes about that."""
    refuse_broken(program)
    made = program.clone().to(context.device)
    folded = folding.fold_batch_norms(made, forwards=False)
    made.propagate()
    return made, list(folded.notes)
