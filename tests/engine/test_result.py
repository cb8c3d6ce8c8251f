import json
from dataclasses import replace

import pytest
import torch

from laconic.core.errors import StorageError, SurgeryError
from laconic.core.measurement import Measurement
from laconic.core.recipe import Recipe
from laconic.engine.result import Candidate, Result, StepRecord
from laconic.engine.writeback import write_back
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.surgery import cut


def result_of(program: Program) -> Result:
    drop = Measurement(name="drop", value=0.1, unit="%", low=-0.1, high=0.4, repeats=700)
    recipe = Recipe.of([{"method": "scale", "factor": 3.0}])
    return Result(
        program=program,
        recipe=recipe,
        changes={"0.weight": {0: torch.tensor([0, 2])}},
        measurements={"original": [drop], "compressed": [drop]},
        steps=[
            StepRecord(
                method="scale", sites=["*"], kept=True, seconds=1.0, before={}, after={},
                figures={"loss": float("nan")},
            )
        ],
        candidates=[
            Candidate(
                name="scaled", recipe=recipe, drop=drop, objective=drop, accepted=True,
                chosen=True, reason="fine", seconds=2.0,
            )
        ],
        verdict="done",
        refused=["nothing"],
        provenance={"seed": 0},
        deploy=("openvino", "bf16"),
        pages={"page.txt": lambda result, path: path.write_text(result.verdict)},
    )  # fmt: skip


def test_saved_and_read_is_itself(program, tmp_path):
    made = result_of(program)
    folder = made.save(tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.laconic", "model.onnx", "model.xml", "model.bin", "result.json", "recipe.yaml",
        "page.txt",
    }  # fmt: skip
    held = Result.read(folder)
    assert held.to_json() == made.to_json()
    assert held.original is None
    assert Recipe.read(folder / "recipe.yaml").steps == made.recipe.steps
    x = torch.randn(5, 4)
    assert torch.equal(held.program(x), program(x))
    assert json.loads((folder / "result.json").read_text())["steps"][0]["figures"]["loss"] is None


@pytest.mark.parametrize("limit", [500, 3000])
def test_a_failed_save_leaves_the_earlier_one_whole(program, tmp_path, full_disk, limit):
    folder = result_of(program).save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    held = Result.read(folder).program
    made = Result(program=held, recipe=Recipe(), provenance={"long": "x" * 5000})
    with full_disk(limit), pytest.raises(StorageError, match="earlier is untouched") as error:
        made.save(folder)
    assert ".saving" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_damaged_result_is_named(program, tmp_path):
    folder = result_of(program).save(tmp_path / "out")
    with pytest.raises(StorageError, match="result.json: cannot be read"):
        Result.read(tmp_path)
    (folder / "result.json").write_text('{"verdict": 1}')
    with pytest.raises(StorageError, match="is not a result of this version"):
        Result.read(folder)
    (folder / "result.json").write_text('{"verdict"')
    with pytest.raises(StorageError, match="is damaged"):
        Result.read(folder)


def test_values_are_written_back_into_the_users_model(program, model):
    trained = program.clone()
    with torch.no_grad():
        trained.unshare()
        trained.tensor("2.weight").mul_(2)
    x = torch.randn(5, 4)
    assert not torch.equal(model(x), trained(x))
    assert write_back(trained, model) == []
    assert torch.equal(model(x), trained(x))


def test_a_smaller_result_is_not_written_back(program, model):
    smaller, _ = cut(program, {groups(program)[0].name: [0, 1, 2]})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError, match=r"0.weight: has shape \(3, 4\)"):
        replace(result_of(smaller)).write_back(model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
