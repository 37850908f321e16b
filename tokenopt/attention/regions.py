"""Regions that are given at run time: what lies in different ones does not see each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenopt.attention.layout import Layout
from tokenopt.attention.pattern import Lowered, Pattern


@dataclass(frozen=True, repr=False)
class Regions(Pattern):
    """Tokens of different regions do not see each other; an input of the program says which region each lies in.

    The input ``regions_HxW``, int64 [B, H * W], holds a number for every token on the grid. 0 is no region: such
    tokens, and those off the grid, see and are seen by all. Where all are 0, it is dense attention. Nothing is saved:
    the mask is known at run time only.

    Source: He et al., Improving Multi-Subject Consistency with Isolation and Reposition Attention, arXiv:2411.19261
        (isolation; attention to a reference is not part of it).
    """

    subset: ClassVar[bool] = True

    def lower(self, layout: Layout) -> Lowered:
        name = f"regions_{'x'.join(map(str, layout.grid))}"
        given = {"regions": (name, (layout.count,), torch.int64)}
        return Lowered("region_attention", {}, {"start": layout.start}, 1.0, 1.0, 1.0, inputs=given)

    def whole(self, layout: Layout, lowered: Lowered) -> Lowered:
        """The same: where no region is given, all is seen."""
        return lowered
