"""Integers where they pay: quantisation is taken away wherever it makes the network no faster.

Idea: integers save time in a layer and cost time at its borders, where floats become integers and
back. What is left of the gain depends on the machine, the runtime, its float precision (bf16 where
the CPU has it) and the neighbours, so it is measured: the whole network with all quantisation, with
none, without that of each piece, and without that of several, as a knapsack over saved milliseconds
and harm proposes. Of what was measured the least harmful network is kept that is as fast as the
fastest one, or not more than `slower` slower. Nodes that nothing gains from are gone, activations
there are floats again; weights keep their rounded values, which their biases or their training were
fitted to. Which floats is one choice for the whole network: runtimes take bf16 or float32 for a
file, not for an operator.

Papers: Dong et al. 2019, "HAWQ" (arXiv 1905.03696) for sensitivities and budgets; Wang et al. 2019,
"HAQ" (arXiv 1811.08886) for measured latency in place of operation counts.

Helps: behind `quantize.static` or `quantize.train`, where floats are fast: CPUs with bf16 tiles run
many vision transformers faster in bf16 than in integers, and small layers anywhere. Does not:
files, which get larger where integers go; machines on which nothing else may be measured meanwhile
(a busy machine gives wrong tables).

Cost: as many exports and measurements as there are pieces, a few seconds each; half a pass over
`samples` for each piece.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from laconic.core.errors import RecipeError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import integer_front
from laconic.solvers.quantization.integer_units import Unit, units, without
from laconic.solvers.search.stopwatch import Stopwatch, Timer
from laconic.solvers.sensitivity import output_errors
from laconic.statistics.batches import Batches


class QuantizeWhere(Method):
    """Options of `quantize.where`. Sites are names of the operators that pieces begin with.

    Attributes:
        pieces: most pieces that the quantised operators are looked at as; neighbours go together.
        slower: part of the latency that may be given away for less harm.
        tries: choices of several pieces that are timed.
        batch: samples at once while timing.
        samples: calibration samples.
        floats: resolved: names of the quantisation nodes that go, instead of measuring.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 4, "pieces": 1, "tries": 1}

    pieces: int = Field(default=16, ge=1)
    slower: float = Field(default=0.0, ge=0)
    tries: int = Field(default=5, ge=1)
    batch: int = Field(default=1, ge=1)
    samples: int = Field(default=32, ge=1)
    floats: tuple[str, ...] | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Take quantisation nodes away; which ones stands in the resolved option `floats`.

        Raises:
            RecipeError: sites that match nothing; resolved nodes that are not there.
            ExportError, MissingExtra: the context's runtime cannot run the network.
            DataError: no calibration data, or data that do not fit.
        """
        frozen = is_frozen(program)
        work = (thaw(program) if frozen else program.clone()).to(context.device)
        work.propagate()
        found = units(work, self.pieces)
        if not found:
            note = "nothing to choose from: no operator has quantisation nodes on a uniform grid"
            return Outcome(program=program.clone(), notes=[note])
        names = set(sites.choose([unit.name for unit in found]))
        pieces = [unit for unit in found if unit.name in names]
        figures: dict[str, Any] = {}
        gone = self.floats
        if gone is None:
            timer = Stopwatch(
                context.runtime, context.threads, context.progress, precision=None, batch=self.batch
            )
            gone, figures = self._measured(work, pieces, timer, context)
        missing = set(gone) - {node.name for node in work.graph.nodes}
        if missing:
            raise RecipeError(
                f"no node {min(missing)}",
                where="quantize.where floats",
                hint="resolved nodes belong to the very program they were measured on; "
                "leave 'floats' out to measure again",
            )
        made = without(work, gone)
        return Outcome(
            program=freeze(made) if frozen else made,
            resolved={**self.model_dump(mode="json", exclude_defaults=True), "floats": list(gone)},
            notes=_notes(pieces, gone),
            figures=figures,
        )

    def _measured(
        self, work: Program, pieces: Sequence[Unit], timer: Timer, context: Context
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Names of the nodes that should go, and the table."""
        nodes = {node.name: node for node in work.graph.nodes}
        changes = {str(i): [nodes[n] for n in unit.nodes] for i, unit in enumerate(pieces)}
        batches = list(Batches(work, context.task, self.samples, context.device, size=16))
        errors = output_errors(work, changes, batches, context.progress)
        harms = [errors[str(i)] for i in range(len(pieces))]
        found = integer_front.measure(work, pieces, harms, timer, self.tries)
        chosen = found.choose(self.slower)
        gone = [name for i in sorted(chosen.floats) for name in pieces[i].nodes]
        figures = {
            **found.figures(pieces, harms),
            "chosen_milliseconds": round(chosen.part * found.milliseconds, 4),
        }
        return tuple(gone), figures


def _notes(pieces: Sequence[Unit], gone: Sequence[str]) -> list[str]:
    """Which pieces are floats."""
    left = [unit.name for unit in pieces if set(unit.nodes) <= set(gone)]
    notes = [f"{name}: floats are as fast or faster" for name in left]
    if len(left) == len(pieces):
        notes.append("integers pay nowhere in this runtime: no quantisation is left")
    return notes
