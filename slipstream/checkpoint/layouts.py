"""A model file's WEIGHTS table at work: where each of our weights comes from, and how to give it back.

The table (schema/weights.py) is data; here are the two directions. Both work a tensor at a time.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.errors import CorruptFile
from slipstream.schema.weights import Layout, Rows, Stacked, WeightTable

Shape = tuple[int, ...]
Shapes = dict[str, Shape]  # of our weights


@dataclass(frozen=True)
class Recipe:
    """A tensor made from tensors of the other side: read the sources, then make."""

    sources: tuple[str, ...]
    source_shape: Shape  # of each source
    make: Callable[[list[Tensor]], Tensor]
    takes_rows: bool = False  # whole rows, or stacks of them, whatever is in them: it serves packed parts too

    @property
    def is_the_same(self) -> bool:
        """The tensor of the other side, as it is."""
        return self.make is _only


def renamed(source: str, shape: Shape) -> Recipe:
    """The same tensor under another name."""
    return Recipe((source,), shape, _only, takes_rows=True)


def from_hugging_face(
    table: WeightTable, config: Any, shapes: Shapes, found: Iterable[str], where: str
) -> tuple[dict[str, Recipe], list[str]]:
    """A recipe for each of our weights that `found` has the sources of, and the names that no key of the table fits.

    Raises CorruptFile where two of theirs are the same of ours, or where ours has no place for one.
    """
    rules = [(pattern(key), layout) for key, layout in table.items()]
    recipes: dict[str, Recipe] = {}
    stacks: dict[str, dict[int, str]] = defaultdict(dict)
    left_over = []
    for name in found:
        match, layout = next(((m, layout) for rule, layout in rules if (m := rule.fullmatch(name))), (None, None))
        if match is None or layout is None:
            left_over.append(name)
            continue
        if isinstance(layout, Stacked):
            expert = int(match["e"])
            ours = _fill(layout.name, match.groupdict())
            if expert in stacks[ours]:
                raise CorruptFile(f"{where} holds both {stacks[ours][expert]} and {name}, which are the same weight.")
            stacks[ours][expert] = name
            continue
        for ours, recipe in _recipes(name, layout, match.groupdict(), config, shapes):
            if ours in recipes:
                raise CorruptFile(
                    f"{where} holds both {recipes[ours].sources[0]} and {name}, which are the same weight."
                )
            recipes[ours] = recipe
    return recipes | {ours: _stack(ours, experts, shapes, where) for ours, experts in stacks.items()}, left_over


def to_hugging_face(table: WeightTable, config: Any, shapes: Shapes) -> dict[str, Recipe]:
    """A recipe for each tensor of theirs, in the order of our weights. Raises KeyError for a name that is not ours."""
    recipes: dict[str, Recipe] = {}
    for ours, shape in shapes.items():
        key, layout, values = _key_of(table, ours)
        if isinstance(layout, str):
            recipes[_fill(key, values)] = renamed(ours, shape)
        elif isinstance(layout, Stacked):
            for expert in range(shape[0]):
                name = _fill(key, values | {"e": str(expert)})
                recipes[name] = Recipe((ours,), shape, _expert(expert), takes_rows=True)
        else:
            names = tuple(_fill(name, values) for name in layout.names)
            join = _joiner(layout, config)
            recipe = Recipe(names, shape, join, takes_rows=not layout.is_transposed)
            recipes.setdefault(_fill(key, values), recipe)
    return recipes


def theirs_shape(recipe: Recipe, shapes: Shapes) -> Shape:
    """The shape that a recipe of to_hugging_face makes."""
    with torch.device("meta"):
        return tuple(recipe.make([torch.empty(shapes[name]) for name in recipe.sources]).shape)


def pattern(name: str) -> re.Pattern[str]:
    """model.layers.{i}.mlp.{p}_proj.weight → a regular expression with the groups i (a number) and p (a word).

    {rest} stands for any end of a name.
    """
    text = re.escape(name)
    for letter, meaning in (("i", r"\d{1,5}"), ("e", r"\d{1,5}"), ("p", r"[a-z]{1,32}"), ("rest", r"[\w.]{1,200}")):
        text = text.replace(rf"\{{{letter}\}}", f"(?P<{letter}>{meaning})")
    return re.compile(text, re.ASCII)


def _fill(template: str, values: Mapping[str, str]) -> str:
    return template.format(**values)


def _key_of(table: WeightTable, ours: str) -> tuple[str, Layout, dict[str, str]]:
    for key, layout in table.items():
        for template in _our_names(layout):
            match = pattern(template).fullmatch(ours)
            if match:
                return key, layout, match.groupdict()
    raise KeyError(ours)


def _our_names(layout: Layout) -> tuple[str, ...]:
    return (layout,) if isinstance(layout, str) else layout.names if isinstance(layout, Rows) else (layout.name,)


def _expert(index: int) -> Callable[[list[Tensor]], Tensor]:
    return lambda parts: parts[0][index]


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _recipes(
    name: str, layout: str | Rows, values: Mapping[str, str], config: Any, shapes: Shapes
) -> Iterator[tuple[str, Recipe]]:
    """Ours that one tensor of theirs holds. A name that is not among `shapes` is kept: the caller refuses it."""
    if isinstance(layout, str):
        ours = _fill(layout, values)
        yield ours, renamed(name, shapes.get(ours, ()))
        return
    names = [_fill(each, values) for each in layout.names]
    if not all(each in shapes for each in names):
        for each in names:
            yield each, renamed(name, ())
        return
    counts = [shapes[each][layout.dim] for each in names]
    whole = list(shapes[names[0]])
    whole[layout.dim] = sum(counts)
    if layout.is_transposed:
        whole[-2:] = whole[:-3:-1]
    num_groups = getattr(config, layout.groups) if layout.groups else 1
    start = 0
    for each, count in zip(names, counts, strict=True):
        take = _taker(layout, num_groups, start // num_groups, count // num_groups)
        takes_rows = layout.dim == 0 and not layout.is_transposed
        yield each, Recipe((name,), tuple(whole), take, takes_rows)
        start += count


def _taker(layout: Rows, num_groups: int, start: int, count: int) -> Callable[[list[Tensor]], Tensor]:
    dim = layout.dim

    def take(parts: list[Tensor]) -> Tensor:
        theirs = parts[0].mT if layout.is_transposed else parts[0]
        return theirs.unflatten(dim, (num_groups, -1)).narrow(dim + 1, start, count).flatten(dim, dim + 1)

    return take


def _joiner(layout: Rows, config: Any) -> Callable[[list[Tensor]], Tensor]:
    num_groups, dim = getattr(config, layout.groups) if layout.groups else 1, layout.dim

    def join(parts: list[Tensor]) -> Tensor:
        theirs = torch.cat([part.unflatten(dim, (num_groups, -1)) for part in parts], dim + 1).flatten(dim, dim + 1)
        return theirs.mT.contiguous() if layout.is_transposed else theirs

    return join


def _stack(ours: str, experts: dict[int, str], shapes: Shapes, where: str) -> Recipe:
    if ours not in shapes:
        return Recipe(tuple(experts.values()), (), torch.stack)
    missing = [expert for expert in range(shapes[ours][0]) if expert not in experts]
    if missing:
        example = next(iter(experts.values()))
        raise CorruptFile(f"{where} lacks expert {missing[0]} of {shapes[ours][0]} for {ours}; there is {example}.")
    if len(experts) > shapes[ours][0]:
        extra = experts[max(experts)]
        raise CorruptFile(f"{where}: {extra} is of an expert too many; the config has {shapes[ours][0]}.")
    names = tuple(experts[expert] for expert in sorted(experts))
    return Recipe(names, shapes[ours][1:], torch.stack, takes_rows=True)
