"""What the README says is what there is: its Python runs, its recipe is valid, its verbs exist."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from laconic.cli import app
from laconic.core.recipe import Recipe
from laconic.methods.base import method_of

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_recipe_is_valid():
    (block,) = _blocks("yaml")
    recipe = Recipe.of(yaml.safe_load(block))
    assert [method_of(step, "README").name() for step in recipe] == [
        "prune.channels",
        "distill.logits",
        "quantize.static",
    ]


def test_every_verb_is_there_and_explains_itself():
    verbs = set(re.findall(r"^laconic (\w+)", README, flags=re.MULTILINE))
    assert verbs >= {"compress", "inspect", "measure", "export", "run", "resume", "report"}
    for verb in verbs:
        shown = CliRunner().invoke(app, [verb, "--help"])
        assert shown.exit_code == 0, verb


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_ten_lines_run(tmp_path, monkeypatch, generator, short_turns):
    """On a small network that learns which of two halves of a vector is larger."""
    monkeypatch.chdir(tmp_path)
    x = torch.randn(1_400, 16, generator=generator)
    y = (x[:, :8].sum(1) > x[:, 8:].sum(1)).long()
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:400]), y[:400]).backward()
        optimizer.step()

    def loader(first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(x[first:last].split(100), y[first:last].split(100), strict=True))

    (block,) = _blocks("python")
    block = block.replace('minimize="latency"', 'minimize="size"')  # microseconds gain nothing
    names = {
        "model": model.eval(),
        "train_loader": loader(0, 400),
        "validation_loader": loader(400, 1_200),
        "test_loader": loader(1_200, 1_400),
    }
    exec(compile(block, "README.md", "exec"), names)
    kept = {path.name for path in (tmp_path / "artifacts").iterdir()}
    assert kept >= {"model.laconic", "model.onnx", "report.html", "result.json", "recipe.yaml"}
    result = names["result"]
    assert result.verdict
    inputs = x[:5]
    assert names["small"](inputs).shape == model(inputs).shape
