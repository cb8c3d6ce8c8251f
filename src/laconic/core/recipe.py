"""An ordered list of methods with the sites each applies to: Python or YAML, the same thing."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest


class Step(BaseModel):
    """One method, where it applies, and its options.

    In YAML the options stand beside the two keys:

        - {method: prune.channels, sites: "layer3.*", ratio: 0.3}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    sites: str | tuple[str, ...] = "*"
    options: dict[str, Any] = {}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any], where: str) -> "Step":
        """A step from a mapping whose other keys are the method's options."""
        rest = dict(data)
        method = rest.pop("method", None)
        if not isinstance(method, str):
            close = difflib.get_close_matches("method", [str(key) for key in rest], n=1)
            raise RecipeError(
                f"found the keys {sorted(map(str, rest))}, expected 'method'",
                where=where,
                hint=f"write 'method' instead of {close[0]!r}" if close else "name the method",
            )
        sites = rest.pop("sites", "*")
        return cls(
            method=method, sites=sites if isinstance(sites, str) else tuple(sites), options=rest
        )

    def to_plain(self) -> dict[str, Any]:
        """The mapping that `from_plain` reads."""
        sites = self.sites if isinstance(self.sites, str) else list(self.sites)
        return {"method": self.method, "sites": sites, **self.options}


class Recipe(BaseModel):
    """An ordered list of steps.

    `resolved` marks the recipe saved with a result: its steps hold what measurements had decided,
    so a replay measures nothing to decide and undoes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[Step, ...] = ()
    name: str = "recipe"
    resolved: bool = False

    def __iter__(self) -> Iterator[Step]:  # type: ignore[override]
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @classmethod
    def of(
        cls, steps: "Recipe | Sequence[Step | Mapping[str, Any]]", name: str = "recipe"
    ) -> "Recipe":
        """A recipe from a recipe, or from steps and plain mappings."""
        if isinstance(steps, Recipe):
            return steps
        made: list[Step] = []
        for number, step in enumerate(steps, 1):
            if isinstance(step, Step):
                made.append(step)
            elif isinstance(step, Mapping):
                made.append(Step.from_plain(step, f"step {number}"))
            else:
                raise RecipeError(
                    f"found {type(step).__name__}, expected a mapping with 'method'",
                    where=f"step {number}",
                )
        return cls(steps=tuple(made), name=name)

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file: a list of steps, or a mapping with `steps` and `name`.

        Raises:
            RecipeError: not readable, not YAML, or not a list of steps.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from error
        except yaml.YAMLError as error:
            raise RecipeError(f"is not YAML: {error}", where=str(path)) from error
        name, resolved = Path(path).stem, False
        if isinstance(data, Mapping):
            known = ("name", "steps", "resolved")
            for key in map(str, data):
                if key not in known:
                    raise RecipeError(
                        f"unknown key {key!r}", where=str(path), hint=nearest(key, known)
                    )
            name, resolved = str(data.get("name", name)), bool(data.get("resolved", False))
            data = data.get("steps")
        if not isinstance(data, list):
            raise RecipeError(
                f"found {type(data).__name__}, expected a list of steps", where=str(path)
            )
        return cls.of(data, name).model_copy(update={"resolved": resolved})

    def to_yaml(self) -> str:
        """The text that `read` reads."""
        plain: dict[str, Any] = {"name": self.name, "resolved": self.resolved}
        plain["steps"] = [step.to_plain() for step in self.steps]
        return yaml.safe_dump(plain, sort_keys=False, width=100, default_flow_style=None)
