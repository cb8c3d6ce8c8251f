"""TPE and NSGA-II through Optuna, an optional package."""

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from laconic.core.errors import MissingExtra
from laconic.solvers.search.search_space import Member
from laconic.solvers.search.strategies import Random, Strategy, Within

_ASKED = 20  # proposals over the budget that are turned down before one is repaired
_SEEDS = 10  # random members within the budget that it begins with
_POPULATION = 16
_LOW = -1e9  # told of a member over the budget, which nobody scores


class Optuna(Strategy):
    """A study of one categorical parameter for each knob, asked and told."""

    def __init__(
        self, within: Within, sampler: Literal["tpe", "nsga2"], objectives: int, seed: int
    ) -> None:
        """Begin a study.

        Args:
            within: members within the budget; proposals over it are told to be so at once.
            sampler: "tpe" for one objective, "nsga2" for several.
            objectives: how many values are told.
            seed: of the sampler.

        Raises:
            MissingExtra: Optuna is not installed.
        """
        self._optuna = optuna = _imported()
        self._within, self._objectives = within, objectives
        self._generator = torch.Generator().manual_seed(seed)
        space = within.space
        self._distributions = {
            knob.name: optuna.distributions.IntDistribution(0, len(knob.choices) - 1)
            for knob in space.knobs
        }
        with _quiet(optuna):
            self._study = optuna.create_study(
                sampler=self._sampler(sampler, seed), directions=["maximize"] * objectives
            )
            first = Random(within, self._generator)
            for _ in range(_SEEDS if sampler == "tpe" else _POPULATION):
                pairs = zip(space.knobs, space.genes(first.ask()), strict=True)
                self._study.enqueue_trial({knob.name: gene for knob, gene in pairs})
        self._trial: Any = None

    def _sampler(self, name: str, seed: int) -> Any:
        samplers = self._optuna.samplers
        if name == "tpe":
            return samplers.TPESampler(
                seed=seed, n_startup_trials=_SEEDS, constraints_func=_over, multivariate=True
            )
        return samplers.NSGAIISampler(
            seed=seed, population_size=_POPULATION, constraints_func=_over
        )

    def ask(self) -> Member:
        """What the sampler proposes, if it is within the budget."""
        space, member = self._within.space, self._within.space.least()
        with _quiet(self._optuna):
            for _ in range(_ASKED):
                trial = self._study.ask(self._distributions)
                member = space.member([trial.params[knob.name] for knob in space.knobs])
                over = self._within.excess(member)
                trial.set_user_attr("over", over)
                if over <= 0:
                    self._trial = trial
                    return member
                self._study.tell(trial, [_LOW * (1 + over)] * self._objectives)
        self._trial = None
        return self._within.repaired(member, self._generator)

    def tell(self, member: Member, values: Sequence[float]) -> None:
        """The values of what was asked for."""
        with _quiet(self._optuna):
            if self._trial is not None:
                self._study.tell(self._trial, list(values))
                return
            pairs = zip(self._within.space.knobs, self._within.space.genes(member), strict=True)
            made = self._optuna.trial.create_trial(
                params={knob.name: gene for knob, gene in pairs},
                distributions=self._distributions,
                values=list(values),
                user_attrs={"over": 0.0},
                system_attrs={"constraints": (0.0,)},
            )
            self._study.add_trial(made)


def _over(trial: Any) -> tuple[float]:
    return (trial.user_attrs.get("over", 0.0),)


def _imported() -> Any:
    try:
        import optuna  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra(
            "TPE and NSGA-II need Optuna, which is not installed",
            where="nas.search strategy",
            hint="pip install 'laconic[search]', or take strategy: evolution",
        ) from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Generator[None]:
    """Optuna keeps its log, and its warnings about young features, to itself in a `with` block."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
