"""sparsify-attention: attention computes a pattern instead of softmax over all keys, where that pays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import tokenopt.ops  # noqa: F401  (registers the operations)
from tokenopt import recipes
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.sites import AttentionSite, Segment, find_sites, with_grid
from tokenopt.analysis.terms import Factor
from tokenopt.attention.layout import Layout
from tokenopt.attention.pattern import Lowered, Mask, Pattern, Refused
from tokenopt.attention.recipe import AttentionRecipe, site_numbers
from tokenopt.attention.tiles import absent_keys, additive, reference_mask
from tokenopt.errors import Refusal, UsageError
from tokenopt.graph import GraphEditor
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Edit, Program

MIN_SPEEDUP = 1.1
_FORMS = ("tiles", "identity", "dense")


@dataclass(frozen=True)
class SparsifyAttention(Pass):
    """Gives the attentions of a recipe their patterns; each is refused where it would not be faster.

    Rewrite:  tokenopt.attention(q, k, v)  ->  tokenopt.neighborhood_attention(q, k, v, tables)

    Attributes:
        pattern: text of a pattern, or a pattern.
        recipe: name, file, mapping or value of a recipe, instead of a pattern.
        sites: which attentions a pattern is for: all, numbers or a slice.
        grid: of the tokens, where the graph does not show it.
        min_speedup: of one attention, by the cost model; 0 takes every site. By default the recipe's, or 1.1.
        form: "tiles"; "identity" computes the same tiles with all keys, and "dense" masks dense attention, by what the
            content chooses where the pattern depends on it: what the other two are checked against.
    """

    pattern: Any = None
    recipe: Any = None
    sites: str = "all"
    grid: Any = None
    min_speedup: float | None = None
    form: str = "tiles"
    name: ClassVar[str] = "sparsify-attention"

    def resolved(self) -> AttentionRecipe:
        """The recipe with all that the pass says in it.

        Raises:
            UsageError: for what is no pattern or attention recipe.
        """
        if (self.pattern is None) == (self.recipe is None):
            raise UsageError("sparsify-attention needs a pattern or a recipe", hint="pattern=Neighborhood(7)")
        if self.form not in _FORMS:
            raise UsageError(f"there is no form {self.form!r}", hint=f"one of {', '.join(_FORMS)}")
        if self.pattern is not None:
            least = MIN_SPEEDUP if self.min_speedup is None else self.min_speedup
            return AttentionRecipe(str(self.pattern), "", "", self.pattern, str(self.sites), self.grid, least)
        recipe = recipes.get(self.recipe)
        if not isinstance(recipe, AttentionRecipe):
            raise UsageError(f"recipe {recipe} reduces tokens", hint="use the pass reduce-tokens")
        least = next(s for s in (self.min_speedup, recipe.min_speedup, MIN_SPEEDUP) if s is not None)
        given = {"sites": None if self.sites == "all" else self.sites, "grid": self.grid, "min_speedup": least}
        return recipe.with_settings({key: value for key, value in given.items() if value is not None})

    def identity(self) -> SparsifyAttention:
        """The same tiles, each with all keys: equals dense attention, where the pattern is a subset of its softmax."""
        return replace(self, form="identity")

    def plan(self, program: Program) -> list[Choice]:
        """What the pass would do at each attention, in order, without doing it."""
        recipe = self.resolved()
        sites = numbered_sites(program)
        if recipe.grid is not None:
            sites = with_grid(sites, recipe.grid)
        for where in recipe.pattern:
            if sites and not site_numbers(where, len(sites)):
                why = f"there are {len(sites)} attentions, numbered from 0"
                raise UsageError(f"no attention has the number {where}", why=why, hint="all, 0,2,-1 or ::2")
        chosen = ((s, recipe.pattern_at(i, len(sites))) for i, s in enumerate(sites))
        return [_choice(site, p, recipe.min_speedup) for site, p in chosen if p is not None]

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        editor = _Sparsifier(program, self.form)
        for choice in self.plan(program):
            if choice.refusal is not None:
                result.refusals.append(choice.refusal)
                continue
            editor.apply(choice)
            result.edits.append(Edit(self.spec, choice.site.id))
        if result.edits:
            editor.finish()
        return result


@dataclass(frozen=True)
class Choice:
    """What is done at one attention: a pattern, and its operation on the layout there; or why it is refused."""

    site: AttentionSite
    pattern: Pattern
    layout: Layout | None
    lowered: Lowered | None
    refusal: Refusal | None = None

    def to_dict(self) -> dict[str, Any]:
        """A row of a report: ``site, pattern, op, subset, grid, tokens, keys, ideal, tile, predicted, refusal``.

        ``keys`` is how many keys a query sees, on average.
        """
        row: dict[str, Any] = {"site": self.site.id, "pattern": repr(self.pattern), "subset": self.pattern.subset}
        row |= {"tokens": self.site.queries, "grid": list(self.layout.grid) if self.layout else None}
        found = self.lowered
        row |= {name: getattr(found, name) if found else None for name in ("op", "ideal", "tile", "predicted")}
        row["keys"] = round(self.layout.dense / self.layout.total / found.ideal, 1) if found else None
        return row | {"refusal": self.refusal.to_dict() if self.refusal else None}


def _choice(site: AttentionSite, pattern: Pattern, min_speedup: float) -> Choice:
    layout = lowered = None
    try:
        layout = layout_of(site)
        lowered = _lowered(pattern, layout)
        if lowered.tiles is None and (missing := _missing(lowered, site)):
            raise Refused(f"the attention has {missing}, and this pattern takes none", "a window takes one")
        if lowered.predicted < min_speedup:
            why = f"{lowered.predicted:.2f}x is predicted for this attention, and {min_speedup:g}x asked for"
            hint = "a smaller window or a larger input; --min-speedup 0 takes it all the same"
            raise Refused(f"{why} (ideal {lowered.ideal:.2f}x, tiles {lowered.tile:.2f}x)", hint)
    except Refused as refused:
        return Choice(site, pattern, layout, lowered, Refusal(site.id, f"{pattern}: {refused.why}", refused.hint))
    return Choice(site, pattern, layout, lowered)


@lru_cache(maxsize=64)
def _shared(pattern: Pattern, layout: Layout) -> Lowered:
    """Layers that are alike share their tables."""
    return pattern.lower(layout)


def _lowered(pattern: Pattern, layout: Layout) -> Lowered:
    """What is read from a file is read again."""
    return pattern.lower(layout) if getattr(pattern, "weights", None) else _shared(pattern, layout)


@lru_cache(maxsize=8)
def _whole(pattern: Pattern, layout: Layout) -> Lowered:
    return pattern.whole(layout, _lowered(pattern, layout))


def _missing(lowered: Lowered, site: AttentionSite) -> str:
    """What an attention has that the operation does not take."""
    takes = {a.name for a in getattr(torch.ops.tokenopt, lowered.op).default._schema.arguments}
    if site.causal and "causal" not in takes:
        return "a causal mask"
    if len(site.node.args) > 4 and site.node.args[4] is not None and "key_bias" not in takes:
        return "sizes of merged tokens"
    return "a mask or a bias" if _bias(site) is not None and "bias" not in takes else ""


def _bias(site: AttentionSite) -> fx.Node | None:
    return site.node.args[3] if len(site.node.args) > 3 else None


def numbered_sites(program: Program) -> list[AttentionSite]:
    """The attentions that recipes of patterns count, in order."""
    return [s for s in find_sites(propagate(program))[0] if s.known]


def layout_of(site: AttentionSite) -> Layout:
    """The tokens of an attention, and the grid that most of them lie on.

    Raises:
        Refused: if it is not self-attention of one sequence.
    """
    if site.refusal is not None:
        raise Refused(site.refusal.why, site.refusal.hint)
    if site.axis is None or site.kind == "cross" or site.queries != site.keys:
        raise Refused("queries and keys are not the same tokens", "patterns are for self-attention")
    if len(site.node.meta["val"].shape) != 4:
        raise Refused("its operands have more dimensions than batch and heads", "flatten the others into the batch")
    if site.axis.length != site.queries:
        raise Refused(f"its {site.queries} tokens are not those of one axis", "give each sequence an attention")
    segment = _main(site)
    if segment.special:
        raise Refused(f"{len(segment.special)} special tokens lie between the others", "keep them in front")
    grid = segment.grid if segment.grid and len(segment.grid) < 4 else (segment.length,)
    if segment.grid is None and not _in_order(segment):
        why = f"its {segment.length} tokens are not in the order of a grid"
        raise Refused(why, "before reductions; or grid=[h, w], if they are")
    segments = tuple((s.name, s.start, s.length) for s in site.axis.segments)
    skips = bool(site.node.kwargs.get("is_causal"))
    return Layout(site.queries, segment.start, grid, segments, site.heads, site.head_dim, site.causal, skips)


def _in_order(segment: Segment) -> bool:
    """Whether tokens without a grid are a sequence as it was given: not what a reduction left, nor windows."""
    (first, *others) = segment.terms or (None,)
    return not others and isinstance(first, Factor) and not str(first.origin.target).startswith("tokenopt")


def _main(site: AttentionSite) -> Segment:
    return site.axis.reducible or max(site.axis.segments, key=lambda s: s.length)


class _Sparsifier(GraphEditor):
    """Replaces attentions; what is equal among them is computed and stored once."""

    def __init__(self, program: Program, form: str) -> None:
        super().__init__(program)
        self.form = form
        self._constants: list[tuple[Tensor, fx.Node]] = []

    def apply(self, choice: Choice) -> None:
        node, pattern, layout, lowered = choice.site.node, choice.pattern, choice.layout, choice.lowered
        query, key, value, bias, key_bias = (*node.args, None, None)[:5]
        scale = node.kwargs.get("scale")
        if isinstance(pattern, Mask) and self.form == "dense":
            new = self._dense(node, pattern, layout, query, key, value, bias, key_bias, scale)
        elif lowered.dense and self.form == "dense":
            called = replace(lowered, op=lowered.dense)
            mask = self._call(node, called, query, key, value, bias, key_bias, scale)
            attention = torch.ops.tokenopt.attention.default
            new = self.insert(mask, attention, query, key, value, mask, like=node, scale=scale)
        else:
            called = _whole(pattern, layout) if pattern.subset and self.form == "identity" else lowered
            new = self._call(node, called, query, key, value, bias, key_bias, scale)
        self.replace(node, new)

    def _call(
        self, node: fx.Node, lowered: Lowered, query: fx.Node, key: fx.Node, value: fx.Node, bias: fx.Node | None,
        key_bias: fx.Node | None, scale: float | None,
    ) -> fx.Node:  # fmt: skip
        op = lowered.op
        dtype = query.meta["val"].dtype
        tensors: dict[str, Any] = {
            name: self.shared(name, t.to(dtype) if t.dtype.is_floating_point else t)
            for name, t in lowered.tensors.items()
        }
        tensors |= {name: self.input(*given) for name, given in lowered.inputs.items()}
        settings = dict(lowered.settings)
        if bias is not None and lowered.tiles is None:
            if not (settings.get("causal") and self._only_causal(bias)):
                tensors["bias"] = bias
        elif bias is not None:  # a bias is the attention's own: kernels that read the grid in place take none
            op, settings = "tiled_attention", {}
            tensors |= self._biased(node, lowered, bias, tensors)
        if key_bias is not None:
            tensors["key_bias"] = key_bias
        target = getattr(torch.ops.tokenopt, op).default
        names = [a.name for a in target._schema.arguments if not a.kwarg_only][3:]
        args = [tensors.get(name) for name in names]
        while args and args[-1] is None:
            args.pop()
        return self.insert(node.prev, target, query, key, value, *args, like=node, scale=scale, **settings)

    def _only_causal(self, bias: fx.Node) -> bool:
        """Whether a mask hides what comes after a query, and nothing else, for all samples."""
        while bias.target in (torch.ops.aten.expand.default, torch.ops.aten.unsqueeze.default):
            bias = bias.args[0]
        value = self.program.constant(bias)
        if value is None:
            return False
        past = torch.ones(value.shape[-2:], dtype=torch.bool).tril()
        if value.dtype is torch.bool:
            return bool((value == past).all())
        return bool((value[..., past] == 0).all()) and bool((value[..., ~past] < -1e4).all())

    def _biased(self, node: fx.Node, lowered: Lowered, bias: fx.Node, tensors: dict[str, Any]) -> dict[str, fx.Node]:
        """Mask of the tiles and of the rows with the attention's bias in it."""
        dtype = node.args[0].meta["val"].dtype
        known, tables = self.program.constant(bias), lowered.tiles
        tile_bias = torch.ops.tokenopt.tile_bias.default
        where = {"mask": (tables.queries, tables.keys)}
        if len(tables.rows):
            everything = torch.arange(tables.layout.total)[None, None]
            where["row_mask"] = (tables.rows[None, None], everything)
        found = {}
        for name, (queries, keys) in where.items():
            mask = lowered.tensors.get(name)
            if known is not None:
                part = tile_bias(known, queries, keys).to(dtype)
                part = part.squeeze(2) if name == "row_mask" else part
                found[name] = self.shared(name, part if mask is None else part + mask.to(dtype))
                continue
            part = self.insert(node.prev, tile_bias, bias, *(self.shared(f"{name}_{i}", t)
                               for i, t in (("queries", queries), ("keys", keys))), like=node)  # fmt: skip
            if part.meta["val"].dtype != dtype:
                part = self.insert(part, torch.ops.aten._to_copy.default, part, dtype=dtype)
            if name == "row_mask":
                part = self.insert(part, torch.ops.aten.squeeze.dim, part, 2)
            found[name] = part if mask is None else self.insert(
                part, torch.ops.aten.add.Tensor, part, tensors[name])  # fmt: skip
        return found

    def _dense(
        self, node: fx.Node, pattern: Mask, layout: Layout, query: fx.Node, key: fx.Node, value: fx.Node,
        bias: fx.Node | None, key_bias: fx.Node | None, scale: float | None,
    ) -> fx.Node:  # fmt: skip
        """Dense attention, masked by the pattern's own words."""
        after, dtype = node.prev, query.meta["val"].dtype
        seen, absent = additive(reference_mask(pattern, layout)), absent_keys(pattern, layout)
        if absent is not None:  # one key more, zero, for all that are beyond the border
            seen = torch.cat([seen.expand(len(absent), -1, -1), absent.log()[..., None]], -1)
            key, value = (self._padded(x, 0, 0, 0, 1) for x in (key, value))
            key_bias = None if key_bias is None else self._padded(key_bias, 0, 1)
        mask = self.shared("pattern", seen[None].to(dtype))
        if bias is not None:
            if bias.meta["val"].dtype is torch.bool:
                everywhere = (torch.arange(layout.total)[None, None],) * 2
                bias = self.insert(after, torch.ops.tokenopt.tile_bias.default, bias,
                                   *(self.shared("all", t) for t in everywhere), like=node)  # fmt: skip
                bias = self.insert(bias, torch.ops.aten.squeeze.dim, bias, 2)
                bias = self.insert(bias, torch.ops.aten._to_copy.default, bias, dtype=dtype)
            after = after if bias is node.args[3] else bias
            if absent is not None and bias.meta["val"].shape[-1] > 1:
                after = bias = self._padded(bias, 0, 1)
            mask = self.insert(after, torch.ops.aten.add.Tensor, mask, bias, like=node)
        attention = torch.ops.tokenopt.attention.default
        return self.insert(node.prev, attention, query, key, value, mask, key_bias, like=node, scale=scale)

    def _padded(self, x: fx.Node, *pads: int) -> fx.Node:
        return self.insert(x, torch.ops.aten.constant_pad_nd.default, x, list(pads))

    def shared(self, name: str, value: Tensor) -> fx.Node:
        """A constant of the program; equal ones are one."""
        for known, node in self._constants:
            if known.dtype == value.dtype and known.shape == value.shape and torch.equal(known, value):
                return node
        node = self.constant(f"pattern_{name}" if name != "pattern" else name, value)
        self._constants.append((value, node))
        return node
