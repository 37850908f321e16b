"""Recipes that reduce tokens, each with its paper and its defaults."""

from __future__ import annotations

from tokenopt.tokens.recipe import TokenRecipe

_EVEN = {"keep": 0.7, "layers": [3, 6, 9]}

# -- merging inside the encoder ----------------------------------------------------------------------------------------

TOME = TokenRecipe(
    name="tome",
    summary="merges the r most similar tokens of each layer, weighted by size, with proportional attention",
    paper="Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461",
    select="bipartite",
    fuse="weighted",
    proportional=True,
    schedule={"r": 13},
)

PITOME = TokenRecipe(
    name="pitome",
    summary="merges tokens that are like many others and protects those that stand alone",
    paper="Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv:2405.16148",
    select="bipartite_energy",
    fuse="weighted",
    proportional=True,
    schedule={"r": 13},
)

DYMU = TokenRecipe(
    name="dymu",
    summary="merges as tome, as many tokens per layer as calibrated similarity thresholds give on average",
    paper="Wang et al., DyMU: Dynamic Merging and Virtual Unmerging, arXiv:2504.17040",
    select="bipartite",
    fuse="weighted",
    proportional=True,
    schedule={"r": 16},
)

# -- merging inside attention ------------------------------------------------------------------------------------------

TOMESD = TokenRecipe(
    name="tomesd",
    summary="merges tokens of 2 x 2 cells inside self-attention and restores them behind it",
    paper="Bolya and Hoffman, Token Merging for Fast Stable Diffusion, CVPRW 2023, arXiv:2303.17604",
    select="bipartite_grid",
    fuse="mean",
    place="attention{downsample=1}",
    schedule={"keep": 0.5},
)

AGENTSD = TokenRecipe(
    name="agentsd",
    summary="tomesd with cells of 4 x 4, for the first 40 % of the diffusion steps",
    paper="Han et al., Agent Attention, ECCV 2024, arXiv:2312.08874 (AgentSD's merge schedule)",
    select="bipartite_grid{cell=4}",
    fuse="mean",
    place="attention{downsample=1}",
    schedule={"keep": 0.6},
)

AGENTSD_LATE = TokenRecipe(
    name="agentsd-late",
    summary="tomesd at half the tokens, for the diffusion steps behind those of agentsd",
    paper="Han et al., Agent Attention, ECCV 2024, arXiv:2312.08874 (AgentSD's merge schedule)",
    select="bipartite_grid",
    fuse="mean",
    place="attention{downsample=1}",
    schedule={"keep": 0.5},
)

FASTVGGT = TokenRecipe(
    name="fastvggt",
    summary="merges the tokens of later frames into the first frame and grid cells, inside attention over all frames",
    paper="Shen et al., FastVGGT: Training-Free Acceleration of Visual Geometry Transformer, arXiv:2509.02560",
    select="bipartite_frames",
    fuse="mean",
    place="attention{of=qkv}",
    schedule={"keep": 0.1},
)

SUPERTOKEN = TokenRecipe(
    name="supertoken",
    summary="shares tokens softly among the cells of a coarser grid, attends there, and spreads the result",
    paper="Huang et al., Vision Transformer with Super Token Sampling, CVPR 2023, arXiv:2211.11167",
    select="super_tokens",
    fuse="mix",
    place="attention",
    schedule={"keep": 0.25},
)

# -- over a range of blocks --------------------------------------------------------------------------------------------

SEMANTIC_TOKEN = TokenRecipe(
    name="semantic-token",
    summary="runs a range of blocks on a few pooled, refined tokens and recovers all tokens behind it",
    paper="Chang et al., Making Vision Transformers Efficient from A Token Sparsification View, arXiv:2303.08685",
    select="super_tokens{local=false}",
    fuse="mix",
    place="range",
    schedule={"keep": 0.1},
)

DTOP = TokenRecipe(
    name="dtop",
    summary="tokens whose prediction is settled stop, and keep what they had; the least confident go on",
    paper="Tang et al., Dynamic Token Pruning in Plain Vision Transformers, ICCV 2023, arXiv:2308.01045",
    score="learned{target=confidence}",
    select="topk",
    restore="canvas",
    place="block",
    schedule={"keep": 0.7, "layers": [0.5, 0.67]},
)

# -- dropping inside the encoder ---------------------------------------------------------------------------------------

EVIT = TokenRecipe(
    name="evit",
    summary="keeps the tokens that the class token attends to in three layers and packs the others into one",
    paper="Liang et al., Not All Patches Are What You Need, ICLR 2022, arXiv:2202.07800",
    score="cls_row",
    select="topk",
    fuse="pack",
    schedule=_EVEN,
)

DEPENDENCY = TokenRecipe(
    name="dependency",
    summary="tokens that send little to others are merged into the kept tokens most like them",
    paper="Ding et al., Visual Dependency Transformers, CVPR 2023, arXiv:2304.03282 (the lite form, without gates)",
    score="sent_mass",
    select="topk",
    fuse="mean",
    schedule=_EVEN,
)

ROLLOUT = TokenRecipe(
    name="rollout",
    summary="keeps the tokens that reach the class token through all layers up to the middle",
    paper="Zhu et al., Dual Cross-Attention Learning, CVPR 2022, arXiv:2205.02151",
    score="rollout",
    select="topk",
    schedule={"keep": 0.5, "layers": [0.5]},
)

TOKENCUT = TokenRecipe(
    name="tokencut",
    summary="keeps the foreground of a normalised cut of the keys",
    paper="Wang et al., TokenCut, TPAMI 2023, arXiv:2209.00383",
    score="ncut",
    select="topk",
    schedule={"keep": 0.5, "layers": [0.75]},
)

TRANSITION = TokenRecipe(
    name="transition",
    summary="keeps the tokens that attention and MLP changed most up to the middle",
    paper="Li et al., TransPrune, arXiv:2507.20630",
    score="transition",
    select="topk",
    place="block",
    schedule={"keep": 0.5, "layers": [0.5]},
)

BLANK_PATCH = TokenRecipe(
    name="blank-patch",
    summary="drops the patches of least pixel variance before the first block",
    paper="Lyu et al., PixelWorld, arXiv:2501.19339",
    score="pixels",
    select="topk",
    place="block",
    schedule={"keep": 0.7, "layers": [0]},
)

TRAJECTORY = TokenRecipe(
    name="trajectory",
    summary="the tokens of each given segment become their mean before the first block",
    paper="Zheng et al., One Trajectory, One Token, ICCV 2025, arXiv:2505.23617",
    select="external",
    fuse="mix",
    place="block",
    schedule={"keep": 0.25, "layers": [0]},
)

# -- at the encoder's output -------------------------------------------------------------------------------------------


def _output(name: str, summary: str, paper: str, keep: float = 0.25, **parts: object) -> TokenRecipe:
    return TokenRecipe(name, summary, paper, restore="none", place="output", schedule={"keep": keep}, **parts)


FASTERVLM = _output(
    "fastervlm",
    "keeps the encoder's output features that the class token attends to at one layer, in raster order",
    "Zhang et al., [CLS] Attention is All You Need for Training-Free Visual Token Pruning, arXiv:2412.01818v1",
    score="cls_row",
    select="topk",
)

VTC_CLS = _output(
    "vtc-cls",
    "keeps the output features that the class token attends to, summed over the second half of the layers",
    "Wang et al., [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, arXiv:2412.05819",
    score="accumulated{since=0.5}",
    select="topk",
)

HIPRUNE = _output(
    "hiprune",
    "keeps anchors of a middle layer with their neighbours, and registers of the last layer",
    "Liu et al., HiPrune, arXiv:2508.00553",
    score="anchored",
    select="topk",
)

FOPRU = _output(
    "fopru",
    "keeps the output features that receive most attention; --set select=rows keeps whole rows",
    "Jiang et al., FoPru: Focal Pruning for Efficient Large Vision-Language Models, arXiv:2411.14164",
    score="received",
    select="topk",
)

TODRE = _output(
    "todre",
    "keeps output features by max-sum diversity, from the one that the class token attends to most",
    "Li et al., ToDRE, arXiv:2505.18757 (stage 1 of v2; select.spread=min is v1)",
    keep=0.1,
    score="cls_row{otherwise=received}",
    select="farthest{spread=sum}",
)

DIVPRUNE = _output(
    "divprune",
    "keeps output features by max-min diversity",
    "Alvar et al., DivPrune, CVPR 2025, arXiv:2503.02175",
    keep=0.1,
    select="farthest",
)

CDPRUNER = _output(
    "cdpruner",
    "keeps the output features of greatest determinant; --set score=text conditions them on a text",
    "Zhang et al., Beyond Attention or Similarity: CDPruner, arXiv:2506.10967",
    keep=0.1,
    select="dpp",
)

VISPRUNER = _output(
    "vispruner",
    "keeps output features half by class attention, half by having no near-duplicate",
    "Zhang et al., Beyond Text-Visual Attention: VisPruner, ICCV 2025, arXiv:2412.01818v2",
    score="cls_row",
    select="diverse",
)

VISIONZIP = _output(
    "visionzip",
    "keeps the dominant output features by class attention and merges the others into a few contextual ones",
    "Yang et al., VisionZip, CVPR 2025, arXiv:2412.04467",
    score="cls_row",
    select="contextual",
    fuse="mean",
)

PRUMERGE = _output(
    "prumerge",
    "keeps output features by class attention, each with the weighted sum of its most similar removed ones",
    "Shang et al., LLaVA-PruMerge, ICCV 2025, arXiv:2403.15388",
    score="cls_row",
    select="topk",
    fuse="neighbours",
)

VFLOWOPT = _output(
    "vflowopt",
    "keeps the output features that attention sinks look at and recycles the others cell by cell",
    "Yang et al., VFlowOpt, ICCV 2025, arXiv:2508.05211 (stage 1)",
    score="sink_rows",
    select="cells",
    fuse="score_mean",
)

POOL = _output(
    "pool",
    "pools the output features to a coarser grid",
    "Hu et al., TokenFLEX, arXiv:2504.03154",
    select="pool",
    fuse="mix",
)

# -- baselines ---------------------------------------------------------------------------------------------------------

RANDOM = TokenRecipe(
    name="random",
    summary="drops random positions, the same for every input: the baseline to beat",
    paper="baseline",
    score="random",
    select="topk",
    schedule={"r": 13},
)

UNIFORM_GRID = TokenRecipe(
    name="uniform-grid",
    summary="keeps an even sub-grid of positions from the first layer on: the other baseline to beat",
    paper="baseline",
    score="uniform_grid",
    select="topk",
    place="block",
    schedule={"keep": 0.5, "layers": [0]},
)
