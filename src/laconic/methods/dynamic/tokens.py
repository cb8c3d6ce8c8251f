"""Drop or merge the tokens of a transformer that say least, layer by layer, for each input anew.

Idea: images and padded texts have many tokens that say the same, or nothing. Behind the attention
of each chosen layer a fixed number of them goes, so that shapes stay fixed, every batch takes the
same time and every runtime runs it; which ones go is decided by the input. "merge": every second
token looks for the most similar other one (by the attention's keys), the most similar pairs become
their mean; a token weighs as much as the tokens it stands for, in means, in later merges and, with
`proportional`, in attention, so merging equal tokens changes nothing. "drop": those that the class
token looks at least go (where there is none, the mean of all queries); "fuse": they become one.
Class tokens stay. With a padding mask tokens of padding weigh nothing and go first. Sizes written
in the graph, pools and masks behind the layer follow.

Papers: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv 2210.09461); Liang et al.
2022, "EViT" (2202.07800). For texts without a class token the mean query is ours.

Helps: vision transformers and text encoders that give one vector per input, at once and without
training; a short recovery (`distill.logits`) brings most of the rest back.
Does not: models with an output for every token, causal attention behind the first chosen layer,
tables of positions within attention, grids and windows: these layers are refused, with the operator
that is in the way. Few tokens: choosing costs a matrix of a quarter of the attention's size and a
sort, for each layer; below a few dozen tokens that is more than it saves.

Cost: seconds; no data are needed.
"""

from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import Field, model_validator

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.dynamic import token_layers
from laconic.solvers.dynamic.token_following import Following, follow
from laconic.solvers.dynamic.token_merging import By, most


class Tokens(Method):
    """Options of `dynamic.tokens`. Sites are names of residual branches that hold attention.

    Attributes:
        by: what happens to the tokens that go: "merge", "drop" or "fuse".
        ratio: part of the tokens that arrive at a layer that goes there, class tokens not counted,
            rounded down; with "merge" at most half.
        r: how many go in each layer, in place of `ratio`.
        proportional: with "merge", attention counts a merged token as often as what it stands for.
        removed: layer → how many go there, in place of everything that decides (a replay has it).
    """

    by: By = "merge"
    ratio: float = Field(default=0.15, ge=0, lt=1)
    r: int | None = Field(default=None, ge=0)
    proportional: bool = True
    removed: dict[str, int] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.by == "merge" and self.ratio > 0.5:
            raise ValueError("merging takes at most half of the tokens of a layer: ratio <= 0.5")
        if self.r is not None and "ratio" in self.model_fields_set:
            raise ValueError("r takes the place of ratio: give one of them")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Put what chooses tokens behind the layers.

        Raises:
            RecipeError: sites match no layer, more tokens are to go than a layer has, or none of
                the chosen layers can lose any; says what is in the way.
        """
        del context
        work = program.clone()
        work.propagate()
        found = [layer.name for layer in token_layers.layers(work)]
        own = self.model_dump(mode="json", exclude_defaults=True)
        if not found:
            notes = ["no layer with self-attention on a stream [batch, tokens, channels]"]
            return Outcome(program=work, resolved={**own, "removed": {}}, notes=notes)
        names = sites.choose(found) if self.removed is None else _known(self.removed, found)
        if self.by != "merge":
            _need_queries(work, names)
        made, removed, notes = self._followed(program, names)
        before = cost(work).macs
        if removed:
            made.shrink(self.by, removed, self.proportional)
        return Outcome(
            program=made.program if removed else work,
            resolved={**own, "removed": removed},
            notes=notes,
            figures={
                "tokens": _counts(made.tokens, removed),
                "class_tokens": made.lead,
                "removed": removed,
                "macs": [before, cost(made.program if removed else work).macs],
            },
        )

    def _followed(
        self, program: Program, names: list[str]
    ) -> tuple[Following, dict[str, int], list[str]]:
        """Stand-ins behind the layers that lose something, how much each, and what was refused."""
        made, refused = follow(program, names)
        notes = [f"{layer}: keeps its tokens: {reason}" for layer, reason in refused.items()]
        if refused and (self.removed is not None or not made.stages):
            raise RecipeError(
                f"tokens cannot leave: {next(iter(refused.values()))}",
                where=next(iter(refused)),
                hint="choose later layers, or a model that gives one vector for each input",
            )
        removed = self._amounts(made)
        if len(removed) < len(made.stages):
            if self.removed is None:
                notes.append("layers that would lose less than one token keep them all")
            made, _ = follow(program, list(removed))
        return made, removed, notes

    def _amounts(self, made: Following) -> dict[str, int]:
        """Layer → how many tokens leave it; layers that lose none are left out."""
        tokens, found = made.tokens, dict[str, int]()
        for stage in made.stages:
            name = stage.layer.name
            possible = most(self.by, tokens, made.lead)
            if self.removed is not None:
                wanted = self.removed[name]
            elif self.r is not None:
                wanted = self.r
            else:
                wanted = min(int(self.ratio * (tokens - made.lead)), possible)
            if not 0 <= wanted <= possible:
                raise RecipeError(
                    f"{wanted} of {tokens} tokens are to go, at most {possible} can",
                    where=name,
                    hint="take fewer, or fewer layers",
                )
            if wanted:
                found[name] = wanted
                tokens -= wanted
        return found


def _counts(tokens: int, removed: Mapping[str, int]) -> list[int]:
    """Tokens at the start and behind every layer."""
    found = [tokens]
    for count in removed.values():
        found.append(found[-1] - count)
    return found


def _known(removed: Mapping[str, int], found: Sequence[str]) -> list[str]:
    for name in removed:
        if name not in found:
            raise RecipeError(
                f"no layer with attention is named {name!r}", hint=nearest(name, found)
            )
    return [name for name in found if name in removed]


def _need_queries(program: Program, names: Sequence[str]) -> None:
    """Refuse to judge by attention where its queries and keys are not to be seen."""
    for layer in token_layers.layers(program):
        if layer.name in names and (layer.queries is None or layer.keys is None):
            raise RecipeError(
                "its queries and keys [batch, heads, tokens, size] are not found",
                where=layer.name,
                hint='take by: "merge", which needs none',
            )
