"""Recipes that give attention a pattern, each with its paper."""

from __future__ import annotations

from tokenopt.attention import AttentionRecipe, Neighborhood

NAT = AttentionRecipe(
    name="nat",
    summary="each query sees the window of 7 around it, shifted inward at borders",
    paper="Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv:2204.07143",
    pattern=Neighborhood(7),
)
