"""Methods after one another: ordered pairs on one small model that both have work to do on.

Here: all pairs of what makes a network smaller, and every method before and after a few that stand
for the rest. All pairs on all of the zoo are `benchmarks/composition.py`.
"""

import functools

import pytest

from laconic.core.errors import LaconicError
from laconic.methods.base import method_names
from laconic.testing import contracts

MODELS = ["no_bias", "plain_cnn", "fused_split"]
"""The quickest first. A method that has work on none of them is tried on the first that it takes."""


SMALLER = ("prune", "simplify", "share", "factorize")
STANDING_FOR_ALL = (
    "prune.channels",
    "simplify.fold",
    "share.cluster",
    "quantize.static",
    "distill.logits",
)


def partners(first):
    """The methods that follow `first` here."""
    everything = method_names()
    if first in STANDING_FOR_ALL:
        return everything
    wanted = SMALLER if first.startswith(SMALLER) else ()
    return [name for name in everything if name in STANDING_FOR_ALL or name.startswith(wanted)]


@functools.cache
def alone(method, model):
    """The method on the model, or None where it refuses it in words."""
    try:
        return contracts.case(method, model)
    except LaconicError:
        return None


@functools.cache
def works_on(method):
    """The models that the method does something to; where there are none, those that it takes."""
    takes = [model for model in MODELS[:2] if alone(method, model)]
    works = [model for model in takes if contracts.does_something(alone(method, model))]
    if (
        not works
        and alone(method, MODELS[2])
        and contracts.does_something(alone(method, MODELS[2]))
    ):
        works = MODELS[2:]
    return works or takes


def shared_model(first, second):
    """The first model that suits both; if none does, the one that suits the second."""
    here = works_on(first)
    return next((m for m in here if m in works_on(second)), (works_on(second) or MODELS)[0])


def wrong_with(first, second):
    """What a pair breaks, or nothing. Every third pair is replayed as well."""
    held = alone(first, shared_model(first, second))
    if held is None:
        return None
    stage = "apply"
    turn = method_names().index(first) + method_names().index(second)
    try:
        both = contracts.followed_by(held, second)
        for check in contracts.PAIR_CHECKS:
            stage = check.__name__
            if check is not contracts.replay_is_exact or turn % 3 == 0:
                check(both)
    except Exception as error:  # noqa: BLE001 - every pair is to be told of, not the first only
        return f"{second}: {stage}: {type(error).__name__}: {str(error)[:300]}"
    return None


@pytest.mark.parametrize("first", method_names())
def test_every_method_follows(first):
    found = [wrong_with(first, second) for second in partners(first)]
    assert not [reason for reason in found if reason], f"after {first}"


def test_every_pair_is_run_on_something():
    """No method is refused by all the models, so no pair is passed over in silence."""
    assert all(works_on(method) for method in method_names())
