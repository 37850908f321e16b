"""Recipes that give attention a pattern, each with its paper."""

from __future__ import annotations

from tokenopt.attention import (
    Agent,
    AttentionRecipe,
    Global,
    Neighborhood,
    Paro,
    Permuted,
    PooledKV,
    Predicted,
    Radial,
    Routed,
    Sorted,
    on,
)

NAT = AttentionRecipe(
    name="nat",
    summary="each query sees the window of 7 around it, shifted inward at borders",
    paper="Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv:2204.07143",
    pattern=Neighborhood(7),
)

DINAT = AttentionRecipe(
    name="dinat",
    summary="windows of 7, dilated by 2 in every second layer",
    paper="Hassani and Shi, Dilated Neighborhood Attention Transformer, 2022, arXiv:2209.15001",
    pattern={"::2": Neighborhood(7), "1::2": Neighborhood(7, dilation=2)},
)

GNA = AttentionRecipe(
    name="gna",
    summary="windows of 8 that 4 x 4 queries share: fewer pairs outside a window are computed",
    paper="Hassani et al., Generalized Neighborhood Attention, 2025, arXiv:2504.16922",
    pattern=Neighborhood(8, stride=4),
)

HALO = AttentionRecipe(
    name="halo",
    summary="blocks of 8 see themselves and a halo of 3, with zero keys beyond the border",
    paper="Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv:2103.12731",
    pattern=Neighborhood(14, stride=8, border="zero"),
)

SWIN = AttentionRecipe(
    name="swin",
    summary="windows of 7 that do not overlap, shifted by 3 in every second layer",
    paper="Liu et al., Swin Transformer, ICCV 2021, arXiv:2103.14030",
    pattern={"::2": Neighborhood(7, stride=7), "1::2": Permuted(Neighborhood(7, stride=7), roll=3)},
)

STA = AttentionRecipe(
    name="sta",
    summary="tiles of 4 frames x 8 x 8 see the 3 x 3 x 3 tiles around them",
    paper="Zhang et al., Fast Video Generation with Sliding Tile Attention, ICML 2025, arXiv:2502.04507",
    pattern=Neighborhood((12, 24, 24), stride=(4, 8, 8)),
)

RADIAL = AttentionRecipe(
    name="radial",
    summary="a window in space that is halved whenever the distance in time doubles, and the first frame",
    paper="Li et al., Radial Attention, NeurIPS 2025, arXiv:2506.19852",
    pattern=Radial(),
)

STREAMING = AttentionRecipe(
    name="streaming",
    summary="each token sees the first 4 and the last 1024",
    paper="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv:2309.17453",
    pattern=Neighborhood(1024, causal=True, border="truncate") | Global(first=4),
)

AGENT = AttentionRecipe(
    name="agent",
    summary="7 x 7 agents pooled from the queries stand between queries and keys, as AgentSD does it without training",
    paper="Han et al., Agent Attention, ECCV 2024, arXiv:2312.08874",
    pattern=Agent(7, power=0.3, shortcut=0.075),
)

TRANSNEXT = AttentionRecipe(
    name="transnext",
    summary="the window of 3 around each query and keys pooled by 4, in one softmax",
    paper="Shi, TransNeXt: Robust Foveal Visual Perception for Vision Transformers, CVPR 2024, arXiv:2311.17132",
    pattern=PooledKV(4, near=Neighborhood(3, border="truncate")),
)

PT_DIT = AttentionRecipe(
    name="pt-dit",
    summary="the means of 4 x 4 windows and the own window, which is shifted in every second layer",
    paper="Wang et al., Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer, ICLR 2025, arXiv:2409.04005",
    pattern={
        "::2": PooledKV(4, near=Neighborhood(4, stride=4)),
        "1::2": PooledKV(4, near=Permuted(Neighborhood(4, stride=4), roll=2)),
    },
)

YOPO = AttentionRecipe(
    name="yopo",
    summary="patches see each other within 2 rows and columns only; all other tokens see and are seen as before",
    paper="Zhang et al., Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See, arXiv:2410.06169",
    pattern=on("patch", "patch", Neighborhood(5, border="truncate")),
)

PARO = AttentionRecipe(
    name="paro",
    summary="each head sees the 30 % of blocks of 64 that hold most attention on the data, in its own order of axes",
    paper="Zhao et al., PAROAttention, 2025, arXiv:2506.16054",
    pattern=Paro(),
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
