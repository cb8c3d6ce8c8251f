"""Programs of the zoo, captured once for all tests of this folder (nothing here changes them)."""

import functools

import pytest

from laconic.program.capture import capture
from laconic.testing import zoo


@pytest.fixture(scope="session")
def zoo_program():
    """`zoo_program(name)`: the captured model `name` of the zoo."""
    return functools.cache(lambda name: capture(*zoo.make(name)))
