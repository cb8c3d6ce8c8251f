"""Remove work that does not depend on the input, without changing what the model computes.

Batch norm goes into the layer beside it; weights that are computed from trainable tensors (weight
norm, spectral norm, a mask) become what they are; operators whose inputs are all stored constants
are computed once; operators that give their input back (dropout in eval mode, additions of zero,
copies, views to the same shape) and results that nobody reads go away.

Paper: batch norm folding as in Jacob et al. 2018 (arXiv 1712.05877), section 3.2; the rest is what
every compiler does.

Helps: anything that runs the Program as it is (eager, training of a folded network), files (batch
norm has four vectors a layer), and every later step that looks at weights: a folded network is what
the runtimes run, and what prunes, shares or factorises weights needs them whole.
Does not: runtimes fold by themselves, so their latency stays. Before training that is to come:
a folded network has no batch statistics any more, its weights are trained as they are, and, with
`dropout`, there is no dropout.
Cost: milliseconds; no data.
"""

from typing import Any

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.layers import folding
from laconic.solvers.layers.computed_weights import fold_computed_weights
from laconic.solvers.layers.constants import drop_identities, fold_constants, operators


class Fold(Method):
    """Options of `simplify.fold`. Sites are names of weights: where batch norm may be folded.

    Attributes:
        batch_norm: fold batch norm into the layer behind or in front of it.
        weights: put weights together that are computed from trainable tensors which nobody else
            reads.
        constants: compute what depends on stored constants only. Trainable tensors are no
            constants.
        identities: remove operators that give their input back.
        dropout: remove dropout, which does nothing in eval mode.
    """

    batch_norm: bool = True
    weights: bool = True
    constants: bool = True
    identities: bool = True
    dropout: bool = True

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """The same function with fewer operators; equal up to float rounding in eval mode."""
        del context
        made = program.clone()
        made.propagate()
        before = operators(made)
        notes: list[str] = []
        figures: dict[str, Any] = {}
        if self.weights:
            figures["weights"] = fold_computed_weights(made)
            made.graph.eliminate_dead_code()
            notes += [f"{name}: was computed, is now a weight" for name in figures["weights"]]
        if self.batch_norm:
            found = folding.fold_batch_norms(made, allow=sites.match)
            notes += found.notes
            figures["batch_norms"] = len(found.folded)
        if self.identities or self.dropout:
            figures["identities"] = self._drop(made, notes)
        if self.constants:
            figures["constants"] = fold_constants(made)
        made.graph.eliminate_dead_code()
        made.drop_unused()
        made.propagate()
        made.recompile()
        figures["operators"] = [before, operators(made)]
        if before == operators(made):
            notes.append("nothing to fold: every operator depends on the input and does something")
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=notes,
            figures=figures,
        )

    def _drop(self, program: Program, notes: list[str]) -> int:
        dropped, dropouts = drop_identities(
            program, identities=self.identities, dropout=self.dropout
        )
        if dropouts:
            notes.append(f"{dropouts} dropout operators are gone: later training has none")
        return dropped
