import pytest

from laconic.core import registry
from laconic.core.errors import RecipeError
from laconic.forms.base import Form
from laconic.forms.dense import Dense


def test_a_name_is_a_file():
    assert {"affine", "dense"} <= set(registry.names("laconic.forms"))
    assert registry.load("laconic.forms", "dense", Form) is Dense


def test_a_wrong_name_gets_the_nearest_right_one():
    with pytest.raises(RecipeError, match=r"did you mean 'affine'"):
        registry.load("laconic.forms", "afine", Form)
