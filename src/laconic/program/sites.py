"""Where a method may act: names selected by glob, `"!…"` to exclude."""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest


@dataclass(frozen=True)
class Sites:
    """A selection of names: a name is in if a pattern matches it and no `!` pattern does.

    >>> Sites.of(["layer*", "!layer3*"]).choose(["layer1.conv", "layer3.conv", "fc"])
    ['layer1.conv']
    """

    patterns: tuple[str, ...] = ("*",)

    @classmethod
    def of(cls, patterns: "str | Sequence[str] | Sites") -> "Sites":
        """A selection from one glob or several."""
        if isinstance(patterns, Sites):
            return patterns
        return cls((patterns,) if isinstance(patterns, str) else tuple(patterns))

    def match(self, name: str) -> bool:
        """Whether `name` is selected."""
        wanted = [p for p in self.patterns if not p.startswith("!")] or ["*"]
        barred = [p[1:] for p in self.patterns if p.startswith("!")]
        return any(_fits(name, p) for p in wanted) and not any(_fits(name, p) for p in barred)

    def choose(self, names: Iterable[str]) -> list[str]:
        """The selected ones, in order.

        Raises:
            RecipeError: nothing matches although there are names; says the nearest ones.
        """
        known = list(names)
        chosen = [name for name in known if self.match(name)]
        if known and not chosen:
            pattern = next((p for p in self.patterns if not p.startswith("!")), "*")
            raise RecipeError(
                f"sites {list(self.patterns)} match nothing", hint=nearest(pattern, known)
            )
        return chosen


def _fits(name: str, pattern: str) -> bool:
    """A pattern fits a name or the module path above it: "layer3" takes "layer3.0.conv1.weight"."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")
