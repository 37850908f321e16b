"""Attention patterns: what each query may see, on a grid, whatever kernel computes it."""

from tokenopt.attention.layout import Layout, Tokens
from tokenopt.attention.learned import Predicted, Sorted
from tokenopt.attention.lowrank import Agent, PooledKV
from tokenopt.attention.masks import (
    Band,
    BlockMap,
    Concentric,
    Diagonal,
    Full,
    Global,
    Neighborhood,
    Nothing,
    Radial,
    Stripe,
)
from tokenopt.attention.paro import Paro
from tokenopt.attention.pattern import Mask, On, Pattern, PerHead, Permuted, on, parse, per_head, permuted
from tokenopt.attention.recipe import AttentionRecipe
from tokenopt.attention.regions import Regions
from tokenopt.attention.routed import Routed

__all__ = [
    "Agent", "AttentionRecipe", "Band", "BlockMap", "Concentric", "Diagonal", "Full", "Global", "Layout", "Mask",
    "Neighborhood", "Nothing", "On", "Paro", "Pattern", "PerHead", "Permuted", "PooledKV", "Predicted", "Radial",
    "Regions", "Routed", "Sorted", "Stripe", "Tokens", "on", "parse", "per_head", "permuted",
]  # fmt: skip
