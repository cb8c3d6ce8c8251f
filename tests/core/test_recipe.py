import pytest

from laconic.core.errors import RecipeError
from laconic.core.recipe import Recipe, Step


def test_yaml_and_python_are_the_same_thing(tmp_path):
    recipe = Recipe.of(
        [
            {"method": "prune.channels", "sites": "layer3.*", "ratio": 0.5},
            Step(method="quantize.static", options={"bits": 8}),
        ],
        name="two steps",
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    again = Recipe.read(path)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_a_bare_list_is_a_recipe_named_after_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- {method: simplify.fold}\n")
    recipe = Recipe.read(path)
    assert recipe.name == "mine"
    assert [step.method for step in recipe] == ["simplify.fold"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- {sites: x}", "step 1: found the keys ['sites'], expected 'method'"),
        ("- 3", "step 1: found int, expected a mapping"),
        ("steps: 3", "expected a list of steps"),
        ("stepz: []", "unknown key 'stepz'"),
        ("{", "is not YAML"),
    ],
)
def test_errors_name_the_place(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.read(path)
    assert says in str(caught.value)


def test_a_missing_file_is_said_plainly(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(tmp_path / "none.yaml")
