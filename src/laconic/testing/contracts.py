"""What every method keeps to, checked on any model: bind a new method by naming it, nothing else.

    for check in contracts.METHOD_CHECKS:
        check(case("prune.channels", "plain_cnn"))

The checks are equalities; a third party's method can be put through them the same way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from laconic import storage
from laconic.core.errors import RecipeError
from laconic.core.recipe import Recipe, Step
from laconic.core.task import Task, first_tensor
from laconic.methods.base import Context, Method, Outcome, method_class, method_of
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.testing import zoo


@dataclass(frozen=True)
class Case:
    """A method on a model: the Program before, the outcome, and how to do it again."""

    method: Method
    program: Program
    outcome: Outcome
    context: Context
    before: Mapping[str, Tensor] = field(repr=False)
    code: str = field(repr=False)


def case(method: str, model: str, **options: Any) -> Case:
    """Run a method, with its `quick` options, on a model of the zoo."""
    program = zoo.captured(model)
    made = method_class(method)
    chosen = made(**{**made.quick, **options})
    context = Context(task=own_outputs(program), original=program.clone(), seed=1)
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    code = str(program.graph)
    outcome = chosen.apply(program, Sites(), context)
    return Case(chosen, program, outcome, context, before, code)


def followed_by(held: Case, method: str, **options: Any) -> Case:
    """Another method, with its `quick` options, on what a method made."""
    made = method_class(method)
    chosen = made(**{**made.quick, **options})
    program = held.outcome.program
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    code = str(program.graph)
    outcome = chosen.apply(program, Sites(), held.context)
    return Case(chosen, program, outcome, held.context, before, code)


def does_something(held: Case) -> bool:
    """Whether the outcome is anything but the input: another graph, or another tensor."""
    made = held.outcome.program
    if str(made.graph) != held.code:
        return True
    now = made.state_dict()
    same = (name in held.before and torch.equal(now[name], held.before[name]) for name in now)
    return set(now) != set(held.before) or not all(same)


def own_outputs(program: Program, batches: int = 4, seed: int = 0) -> Task:
    """A task whose targets are the program's own outputs on inputs like its example.

    Float inputs are drawn anew with the example's mean and spread, others are its rows shuffled.
    The score of a sample is minus its squared error, so the original scores 0.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(program.signature.arguments)

    def draw(example: Tensor) -> Tensor:
        if not example.is_floating_point():
            return example[torch.randperm(len(example), generator=generator)]
        noise = torch.randn(example.shape, generator=generator)
        return example.mean() + noise * example.std().clamp(min=0.1)

    data: list[tuple[dict[str, Any], Tensor]] = []
    for _ in range(batches):
        flat = [draw(tensor) for tensor in program.example]
        inputs = {name: _nest(program, name, flat) for name in names}
        with torch.no_grad():
            data.append((inputs, first_tensor(program(**inputs)).detach()))

    def error(outputs: Any, targets: Tensor) -> Tensor:
        return (first_tensor(outputs) - targets).pow(2).flatten(1).mean(1)

    return Task(
        loss=lambda outputs, targets: error(outputs, targets).mean(),
        metric=lambda outputs, targets: -error(outputs, targets),
        train=data,
        validation=data[:1],
    )


def _nest(program: Program, name: str, flat: list[Tensor]) -> Any:
    structure = program.signature.arguments[name]
    if "tensor" in structure:
        return flat[structure["tensor"]]
    return tuple(flat[item["tensor"]] for item in structure.get("tuple", ()))


def outputs(program: Program, like: Program | None = None) -> tuple[Tensor, ...]:
    """What a program gives for its own example, or for the example of `like`."""
    with torch.no_grad():
        return program.run_flat(*(like or program).example)


# The checks ---------------------------------------------------------------------------------


def input_is_untouched(held: Case) -> None:
    """The input Program keeps its graph, its tensors and its mode, bit for bit."""
    assert str(held.program.graph) == held.code
    now = held.program.state_dict()
    assert set(now) == set(held.before)
    for name, tensor in now.items():
        assert torch.equal(tensor, held.before[name]), name
    assert not held.program.training


def output_is_ready(held: Case) -> None:
    """The new Program is in eval mode and gives finite outputs of the same shapes and dtypes."""
    made = held.outcome.program
    assert not made.training
    for old, new in zip(outputs(held.program), outputs(made), strict=True):
        assert new.shape == old.shape and new.dtype == old.dtype
        assert not new.is_floating_point() or bool(torch.isfinite(new).all())


def replay_is_exact(held: Case) -> None:
    """The resolved options survive YAML and give the same Program, bit for bit."""
    text = yaml.safe_dump({"method": held.method.name(), **_plain(held.outcome.resolved)})
    again = method_of(Step.from_plain(yaml.safe_load(text), "replay"), "replay")
    repeated = again.apply(held.program, Sites(), held.context)
    first, second = held.outcome.program.state_dict(), repeated.program.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for one, two in zip(outputs(held.outcome.program), outputs(repeated.program), strict=True):
        assert torch.equal(one, two)


def survives_storage(held: Case) -> None:
    """Saved and loaded, the Program gives the same outputs bit for bit."""
    from tempfile import TemporaryDirectory  # noqa: PLC0415

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.laconic"
        storage.save(held.outcome.program, path)
        loaded = storage.load(path)
    made = held.outcome.program
    for one, two in zip(outputs(made), outputs(loaded, like=made), strict=True):
        assert torch.equal(one, two)


def trains_on(held: Case) -> None:
    """The new Program still takes gradients in all its float parameters that reach an output."""
    made = held.outcome.program.clone().train()
    parameters = [p for p in made.parameters() if p.requires_grad]
    if not parameters:
        return  # everything was frozen into integers
    total = sum(o.square().mean() for o in made.run_flat(*made.example) if o.is_floating_point())
    assert isinstance(total, Tensor)
    total.backward()
    graded = [p.grad for p in parameters if p.grad is not None]
    assert graded
    assert all(bool(torch.isfinite(g).all()) for g in graded)


def step_round_trips(held: Case) -> None:
    """As a step of a recipe, in YAML and back, it is the same method."""
    step = held.method.step()
    plain = yaml.safe_load(Recipe(steps=(step,)).to_yaml())["steps"]
    (again,) = Recipe.of(plain)
    assert method_of(again, "step 1") == held.method


def unknown_options_are_refused(held: Case) -> None:
    """A mistyped option names the method's options."""
    try:
        method_of(Step(method=held.method.name(), options={"no_such_option": 1}), "step 1")
    except RecipeError as error:
        assert "no_such_option" in str(error)
    else:
        raise AssertionError("an unknown option was taken")


def sites_that_match_nothing_are_refused(held: Case) -> None:
    """A pattern that matches nothing is an error that leaves the Program alone, or is noted."""
    try:
        outcome = held.method.apply(held.program, Sites(("no.such.site",)), held.context)
    except RecipeError as error:
        assert "no.such.site" in str(error)
    else:
        for one, two in zip(outputs(held.program), outputs(outcome.program), strict=True):
            assert torch.equal(one, two) or held.method.trains
    input_is_untouched(held)


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


PAIR_CHECKS: tuple[Callable[[Case], None], ...] = (
    input_is_untouched,
    output_is_ready,
    replay_is_exact,
    survives_storage,
    trains_on,
)
METHOD_CHECKS: tuple[Callable[[Case], None], ...] = (
    *PAIR_CHECKS,
    step_round_trips,
    unknown_options_are_refused,
    sites_that_match_nothing_are_refused,
)
