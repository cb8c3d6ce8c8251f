"""Drop the rows of embedding tables that the task's data never look up.

Idea: a vocabulary made for everything is mostly unused by one task. The ids that the data look up
are counted; their rows stay, the others go. The Program itself does the renaming: an index table
(old id → new row) stands before the lookup, so its inputs stay what they were. Ids that were never
seen get the row of `fallback` (the unknown or padding id, if you name it), else one row with the
mean of all that went. An output layer that shares the table (tied embeddings) computes the kept
words only; the logits of the others are the constant `absent`, which a softmax turns into 0.

Papers: vocabulary trimming (Abdaoui et al. 2020, "Load What You Need: Smaller Versions of
Multilingual BERT"; Ushio et al. 2023, "Efficient Multilingual Language Model Compression through
Vocabulary Trimming").

Helps: fine-tuned and multilingual models, where the table is most of the file: each row that goes
is `width` numbers less; a tied output layer also gets faster. Does not help: a lookup costs no
time, so without tied outputs only bytes fall. What was never seen is not understood any more: give
data that cover the words to come, not only a sample of them. A language model can no longer write
a word that went. Position and segment tables, which are not looked up by the ids of an input, stay.

Cost: one pass over the data, of the ids alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from laconic.core.errors import DataError, RecipeError
from laconic.core.progress import Progress
from laconic.core.task import Task
from laconic.methods.base import Context, Method, Outcome
from laconic.program.equations import operator_name
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.statistics.batches import check_inputs, flat_inputs

Split = Literal["train", "calibration", "validation"]
aten = torch.ops.aten
_MOVES = {
    "to", "_to_copy", "view", "reshape", "flatten", "unsqueeze", "squeeze", "slice", "expand",
    "clone", "contiguous", "alias", "transpose", "permute",
}  # fmt: skip


class PruneEmbeddings(Method):
    """Options of `prune.embeddings`.

    Attributes:
        splits: the data whose ids stay: those of the task's splits that are there. The test split
            is not among them: what it looks up has to be foreseen by the others.
        fallback: id whose row stands for every id that went; it stays. None makes a row with the
            mean of those that went.
        absent: logit that a tied output layer gives the words that went.
        keep: table → ids whose rows stay, in place of the data (a replay has it).
    """

    splits: tuple[Split, ...] = Field(default=("train", "calibration", "validation"), min_length=1)
    fallback: int | None = Field(default=None, ge=0)
    absent: float = -10_000.0
    keep: dict[str, list[int]] | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Shrink the tables; function is the same on every id that was seen.

        Raises:
            RecipeError: sites match no table, a fallback beyond a table, or kept ids that do not
                fit it.
            DataError: no data in the chosen splits, or data that do not fit.
        """
        made = program.clone()
        made.propagate()
        found = _tables(made)
        notes: list[str] = []
        if self.keep is None:
            names = sites.choose(found)
            keep = self._seen(made, [found[name] for name in names], context, notes)
        else:
            keep = {name: _checked(ids, name, found) for name, ids in self.keep.items()}
        rows: dict[str, list[int]] = {}
        before = _bytes(made)
        for name, kept in keep.items():
            kept = self._with_fallback(found[name], kept)
            if _shrink(made, found[name], kept, self.fallback, self.absent, notes):
                rows[name] = kept.tolist()
        made.graph.eliminate_dead_code()
        made.drop_unused()
        made.recompile()
        made.propagate()
        gone = {n: found[n].size - len(ids) for n, ids in rows.items()}
        notes += [
            f"{name}: {count} of {found[name].size} rows went" for name, count in gone.items()
        ]
        if not found:
            notes.append("no table of this program is looked up by the ids of an input")
        resolved = self.model_dump(mode="json", exclude_defaults=True) | {"keep": rows}
        return Outcome(
            program=made,
            resolved=resolved,
            changes={name: {0: torch.tensor(ids)} for name, ids in rows.items()},
            notes=notes,
            figures={"rows_removed": gone, "bytes": [before, _bytes(made)]},
        )

    def _seen(
        self, program: Program, tables: Sequence["_Table"], context: Context, notes: list[str]
    ) -> dict[str, Tensor]:
        """Table name → ascending ids that the data look up."""
        usable: list[_Table] = []
        for table in tables:
            if table.obstacles:
                notes.append(f"{table.name} stays whole: {'; '.join(table.obstacles)}")
            else:
                usable.append(table)
        if not usable:
            return {}
        seen = {table.name: torch.zeros(table.size, dtype=torch.bool) for table in usable}
        nodes = [(table, node) for table in usable for node in table.lookups]
        ids_of = _ids_only(program, [node for _, node in nodes])
        for flat in self._batches(program, context.task, context.progress):
            with torch.no_grad():
                found = ids_of.run_flat(*(tensor.cpu() for tensor in flat))
            for (table, _), ids in zip(nodes, found, strict=True):
                seen[table.name][_in_range(ids, table)] = True
        return {name: mask.nonzero().flatten() for name, mask in seen.items()}

    def _batches(
        self, program: Program, task: Task, progress: Progress
    ) -> Iterable[tuple[Tensor, ...]]:
        there = [split for split in self.splits if getattr(task, split) is not None]
        with progress.task("ids", None) as bar:
            for split in there or self.splits[:1]:  # without any data the task says so
                number = -1
                for number, batch in enumerate(task.batches(split)):
                    where = f"{split} batch {number}"
                    flat = flat_inputs(program, task.split(batch)[0], where)
                    check_inputs(program, flat, where)
                    yield flat
                    bar.advance(1, split)
                if number < 0:  # a generator that is used up would cost every row
                    raise DataError(
                        f"the {split} data are empty",
                        where=task.name,
                        hint="a loader has to give batches every time it is gone through, "
                        "so give a list or a DataLoader, not a generator",
                    )

    def _with_fallback(self, table: "_Table", kept: Tensor) -> Tensor:
        if self.fallback is None:
            return kept
        if self.fallback >= table.size:
            raise RecipeError(
                f"fallback {self.fallback} is not a row: there are {table.size}",
                where=table.name,
                hint="give the unknown or padding id of this vocabulary, or select other sites",
            )
        return torch.cat([kept, torch.tensor([self.fallback])]).unique()


@dataclass
class _Table:
    """A stored table of rows that ids of an input pick.

    Attributes:
        name, size: of the tensor, and its rows.
        lookups, heads: `embedding` nodes, and `linear` nodes whose weight it is.
        obstacles: what else reads it, in words.
    """

    name: str
    size: int
    lookups: list[fx.Node] = field(default_factory=list[fx.Node])
    heads: list[fx.Node] = field(default_factory=list[fx.Node])
    obstacles: list[str] = field(default_factory=list[str])


def _tables(program: Program) -> dict[str, _Table]:
    """Tables that are looked up by the ids of an input, in graph order, whoever else reads them."""
    found: dict[str, _Table] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        name = program.aliases.get(str(node.target), str(node.target))
        shape = program.tensor(name).shape
        table = found.setdefault(name, _Table(name, shape[0] if shape else 0))
        for user in node.users:
            _read(table, node, user)
    return {name: t for name, t in found.items() if any(map(_by_ids, t.lookups))}


def _read(table: _Table, node: fx.Node, user: fx.Node) -> None:
    """Note how `user` reads a table."""
    inputs: Any = user.args
    if _is_lookup(user) and inputs[0] is node:
        table.lookups.append(user)
        if not _by_ids(user):
            table.obstacles.append(f"{user.name} picks rows by numbers that are no input")
    elif user.target is aten.linear.default and inputs[1] is node and inputs[0] is not node:
        table.heads.append(user)
        bias = inputs[2] if len(inputs) > 2 else None
        if isinstance(bias, fx.Node) and (bias.op != "get_attr" or len(bias.users) > 1):
            table.obstacles.append(f"{user.name} shares its table and adds a bias of others")
    else:
        form = str(user.target).startswith("laconic")
        early = ": do this step before the one that wrote it in another form" if form else ""
        table.lookups += [inner for inner in user.users if form and _is_lookup(inner)]
        table.obstacles.append(f"{user.name} ({operator_name(user)}) reads it too{early}")


def _is_lookup(node: fx.Node) -> bool:
    return node.target is aten.embedding.default


def _in_range(ids: Tensor, table: _Table) -> Tensor:
    """Ids that the table has rows for.

    Raises:
        DataError: it has not.
    """
    ids = ids.flatten().long()
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= table.size):
        raise DataError(
            f"the data look up rows {int(ids.min())} to {int(ids.max())}, there are {table.size}",
            where=table.name,
        )
    return ids


def _by_ids(lookup: fx.Node) -> bool:
    """Whether the numbers come from an input and were only moved about."""
    node: Any = lookup.args[1]
    while isinstance(node, fx.Node) and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name.split("::")[1] not in _MOVES:
            return False
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _checked(ids: Sequence[int], name: str, found: dict[str, _Table]) -> Tensor:
    """The ids of a replay.

    Raises:
        RecipeError: there is no such table, it has other readers, or ids do not fit.
    """
    known = Sites.of(name).choose(list(found)) if found else []
    if not known or found[name].obstacles:
        raise RecipeError("no table of that name can be shrunk here", where=name)
    kept = torch.tensor(ids, dtype=torch.int64).unique()
    if not len(kept) or int(kept[0]) < 0 or int(kept[-1]) >= found[name].size:
        raise RecipeError(
            f"ids to keep are to lie from 0 to {found[name].size - 1}, at least one", where=name
        )
    return kept


def _ids_only(program: Program, lookups: Sequence[fx.Node]) -> Program:
    """A program that gives the ids of some lookups and computes nothing else."""
    made = program.clone()
    nodes = {node.name: node for node in made.graph.nodes}
    output: Any = made.output_node
    output.args = (tuple(nodes[lookup.name].args[1] for lookup in lookups),)
    made.graph.eliminate_dead_code()
    made.drop_unused()
    made.recompile()
    return made.to(torch.device("cpu"))


# surgery --------------------------------------------------------------------------------------


def _shrink(
    program: Program,
    table: _Table,
    kept: Tensor,
    fallback: int | None,
    absent: float,
    notes: list[str],
) -> bool:
    """Replace the table and redirect its readers; False, and a note, where no byte is saved."""
    weight = program.tensor(table.name).detach()
    gone = torch.ones(table.size, dtype=torch.bool)
    gone[kept] = False
    rows = weight[kept.to(weight.device)]
    place = int((kept == fallback).nonzero()) if fallback is not None else len(kept)
    if fallback is None and bool(gone.any()):
        mean = weight[gone.to(weight.device)].double().mean(0, keepdim=True)
        rows = torch.cat([rows, mean.to(weight.dtype)])
    renamed = torch.full((table.size,), place, dtype=torch.int32)
    renamed[kept] = torch.arange(len(kept), dtype=torch.int32)
    indices = (1 + bool(table.heads)) * renamed.numel() * renamed.element_size()
    row = weight[:1].numel() * weight.element_size()
    if (table.size - len(rows)) * row <= indices:
        notes.append(f"{table.name} stays whole: {len(kept)} of {table.size} rows are looked up")
        return False
    program.set_tensor(table.name, rows.contiguous())
    stored = program.add_tensor(f"{table.name}_rows", renamed.to(weight.device))
    for lookup in table.lookups:
        _redirect(program, lookup, stored, renamed, gone)
    for head in table.heads:
        _scatter(program, head, table.size, kept, len(rows), absent)
    return True


def _redirect(
    program: Program, lookup: fx.Node, stored: str, renamed: Tensor, gone: Tensor
) -> None:
    """Look the new row up in the index table first."""
    graph, ids = program.graph, lookup.args[1]
    with graph.inserting_before(lookup):
        index = graph.get_attr(stored)
        rows = graph.call_function(aten.index.Tensor, (index, [ids]))
    index.meta = {"origin": lookup.meta.get("origin", "")}
    rows.meta = dict(index.meta)
    lookup.update_arg(1, rows)
    if len(lookup.args) > 2 and isinstance(lookup.args[2], int) and lookup.args[2] >= 0:
        padding = lookup.args[2]  # the row that gets no gradient
        lookup.update_arg(2, -1 if bool(gone[padding]) else int(renamed[padding]))


def _scatter(
    program: Program, head: fx.Node, size: int, kept: Tensor, rows: int, absent: float
) -> None:
    """Compute the kept words' logits and put them back to where they were."""
    inputs: Any = head.args
    device = program.tensor(str(inputs[1].target)).device
    if len(inputs) > 2 and inputs[2] is not None:
        bias = program.tensor(str(inputs[2].target)).detach()
        none = bias.new_zeros(rows - len(kept))  # the mean row's logit, which nothing reads
        program.set_tensor(str(inputs[2].target), torch.cat([bias[kept.to(device)], none]))
    columns = torch.full((size,), rows, dtype=torch.int32)  # the one behind the last is constant
    columns[kept] = torch.arange(len(kept), dtype=torch.int32)
    name = program.add_tensor(f"{inputs[1].target}_columns", columns.to(device))
    graph = program.graph
    with graph.inserting_after(head):
        index = graph.get_attr(name)
    with graph.inserting_after(index):
        padded = graph.call_function(aten.pad.default, (head, [0, 1], "constant", absent))
    with graph.inserting_after(padded):
        full = graph.call_function(aten.index_select.default, (padded, -1, index))
    for made in (index, padded, full):
        made.meta = {"origin": head.meta.get("origin", "")}
    head.replace_all_uses_with(full, delete_user_cb=lambda user: user is not padded)


def _bytes(program: Program) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in program.tensors())
