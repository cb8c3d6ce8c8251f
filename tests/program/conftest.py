"""Programs of the zoo, the same for all tests of this folder (nothing here changes them)."""

import functools

import pytest

from laconic.testing import zoo


@pytest.fixture(scope="session")
def zoo_program():
    """`zoo_program(name)`: the captured model `name` of the zoo."""
    return functools.cache(zoo.captured)
