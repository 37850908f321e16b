"""Recipes that give attention a pattern, each with its paper."""

from __future__ import annotations

from tokenopt.attention import AttentionRecipe, Neighborhood, Predicted, Routed, Sorted

NAT = AttentionRecipe(
    name="nat",
    summary="each query sees the window of 7 around it, shifted inward at borders",
    paper="Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv:2204.07143",
    pattern=Neighborhood(7),
)

BIFORMER = AttentionRecipe(
    name="biformer",
    summary="each region of 7 x 7 sees the 4 regions most like it, the same for all heads",
    paper="Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, arXiv:2303.08810",
    pattern=Routed(7, topk=4),
)

CATANET = AttentionRecipe(
    name="catanet",
    summary="tokens sorted by the nearest of 64 centres, that data gives, see their chunk of 64 and the next",
    paper="Liu et al., CATANet: Efficient Content-Aware Token Aggregation, CVPR 2025, arXiv:2503.06896",
    pattern=Sorted(64, chunk=64),
)

DHSA = AttentionRecipe(
    name="dhsa",
    summary="blocks of 128 tokens see themselves, the first 4 chunks of 32 and those most like them, 32 in all",
    paper="Xiong et al., Long-Context Modeling with Dynamic Hierarchical Sparse Attention, arXiv:2510.24606",
    pattern=Routed(128, topk=32, key_block=32, score="length", heads="mean", first=4, local=1, flat=True),
)

SPARGE = AttentionRecipe(
    name="sparge",
    summary="blocks of 128 tokens see the blocks of 64 that hold 90 % of the attention, as counted on data, per head",
    paper="Zhang et al., SpargeAttention, ICML 2025, arXiv:2502.18137",
    pattern=Routed(128, mass=0.9, key_block=64, heads="each", flat=True),
)

SPARSIFINER = AttentionRecipe(
    name="sparsifiner",
    summary="tiles of 4 x 4 see the quarter of the keys that a low-rank prediction, distilled on data, gives most to",
    paper="Wei et al., Sparsifiner: Learning Sparse Instance-Dependent Attention, CVPR 2023, arXiv:2303.13755",
    pattern=Predicted(32, keep=0.25, tile=4),
)

VSA = AttentionRecipe(
    name="vsa",
    summary="cubes of 4 frames x 4 x 4 see the 32 cubes most like them, each head its own",
    paper="Zhang et al., VSA: Faster Video Diffusion with Trainable Sparse Attention, NeurIPS 2025, arXiv:2505.13389",
    pattern=Routed((4, 4, 4), topk=32, heads="each"),
)
