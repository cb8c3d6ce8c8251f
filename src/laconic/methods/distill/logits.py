"""Recovery training: the Program learns to give what the original gives, or other teachers.

Idea: after pruning or quantising, the original model itself is the best source of targets. Its
outputs, softened by a temperature, say more about a sample than a label does, so unlabelled data
are enough (Hinton, Vinyals & Dean, arXiv 1503.02531). `loss: dkd` weighs what is said about the
classes that are not the target by itself (Zhao et al., arXiv 2203.08679). Inner values may be
compared too, where both graphs have them in the same shape (Romero et al., "FitNets", arXiv
1412.6550); they steady deep networks and embeddings, whose outputs alone say little;
`distill.features` compares them in more ways. Teachers may be other Programs than the original, and
several: their probabilities are averaged. Without data, inputs can be drawn from the teacher's
batch normalisation (Yin et al., "DeepInversion", arXiv 1912.08795).

When it helps: after any step that cost accuracy; a few passes over the training data bring most of
it back. Also from scratch, for a student of its own architecture. When it does not: with a handful
of samples (it overfits them, which the held-out divergence shows; least squares on calibration data
is better there), or where nothing was lost.

Cost: for every sample a training step of the Program plus one run of the original. Networks with
batch normalisation want batches of 64 or more. `minutes` bounds it.
"""

from typing import ClassVar

from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.teaching.learning import trainable
from laconic.solvers.teaching.synthetic_inputs import DataFree


class Logits(DataFree, Method):
    """Train towards outputs; see `DataFree`, `Learning` and `Plan` for the fields."""

    trains: ClassVar[bool] = True

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Train a copy; the input stays as it was.

        Raises:
            DataError: no training data, or data that do not fit.
            RecipeError: no batch normalisation to draw synthetic inputs from.
            TrainingError: the loss diverged at once, or outputs differ in shape.
        """
        student = (thaw(program) if is_frozen(program) else program.clone()).train()
        names = trainable(student, sites)
        if not names:
            return Outcome(program=program.clone(), notes=["there is no float parameter to train"])
        course, notes = self.course(student, context)
        learned = self.learn(program, student, names, course)
        made = freeze(student) if is_frozen(program) else student
        own = self.model_dump(mode="json", exclude_defaults=True)
        return Outcome(
            program=made,
            resolved={**own, **learned.resolved},
            notes=[*notes, *learned.notes],
            figures=learned.figures,
        )
