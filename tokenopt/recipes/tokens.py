"""Recipes that reduce tokens, each with its paper and its defaults."""

from __future__ import annotations

from tokenopt.tokens.recipe import TokenRecipe

TOME = TokenRecipe(
    name="tome",
    summary="merges the r most similar tokens of each layer, weighted by size, with proportional attention",
    paper="Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461",
    score="mean_key",
    select="bipartite",
    fuse="weighted",
    proportional=True,
    schedule={"r": 13},
)

EVIT = TokenRecipe(
    name="evit",
    summary="keeps the tokens that the class token attends to in three layers and packs the others into one",
    paper="Liang et al., Not All Patches Are What You Need, ICLR 2022, arXiv:2202.07800",
    score="cls_row",
    select="topk",
    fuse="pack",
    schedule={"keep": 0.7, "layers": [3, 6, 9]},
)

FASTERVLM = TokenRecipe(
    name="fastervlm",
    summary="keeps the encoder's output features that the class token attends to at one layer, in raster order",
    paper="Zhang et al., [CLS] Attention is All You Need for Training-Free Visual Token Pruning, arXiv:2412.01818",
    score="cls_row",
    select="topk",
    fuse="drop",
    restore="none",
    place="boundary",
    schedule={"keep": 0.25},
)

RANDOM = TokenRecipe(
    name="random",
    summary="drops random positions, the same for every input: the baseline to beat",
    paper="baseline",
    score="random",
    select="topk",
    fuse="drop",
    schedule={"r": 13},
)
