"""Hand-patched token reduction in plain eager PyTorch: the truth that rewritten graphs are compared with.

Every function here runs a real model block by block and reduces its tokens as the papers say. Nothing is imported from
tokenopt, so that an error there cannot hide here.

Conventions, where the papers leave a choice:

* Tokens are matched by position in the whole sequence: even positions are sources, odd ones are destinations. Protected
  tokens (class, distillation, registers, detection) are counted in the alternation, but neither merge nor receive.
* The order after a merge is: protected prefix, unmerged even tokens ascending, odd tokens ascending, protected suffix.
  A merge of 0 tokens changes nothing.
* Ties go to the lowest position. Matching is in float32, on the mean over heads of the keys as attention sees them
  (after a key norm and RoPE).
* Position terms of a merged token (RoPE row, bias row and column, mask entry) are those of its destination; those of
  EViT's extra token are those of the best token it is made from.
* The tokens a model returns, or pools under a mask, are first restored: every original token gets the value of the
  token that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import perturb

# -- token streams -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A stream of tokens and what each one stands for.

    Shapes: x [B, N, C]; size [B, N], how many original tokens each is the mean of; position int64 [B, N], the original
    position each one represents; home int64 [B, N0], the token that holds each original one (-1: dropped).
    """

    x: Tensor
    size: Tensor
    position: Tensor
    home: Tensor
    prefix: int = 0
    suffix: int = 0

    @property
    def merged(self) -> bool:
        return self.x.shape[1] != self.home.shape[1]

    def restored(self) -> Tensor:
        """Every original token with the value of the token that holds it."""
        assert (self.home >= 0).all(), "dropped tokens have no value"
        return take(self.x, self.home)


def stream(x: Tensor, prefix: int = 0, suffix: int = 0) -> Tokens:
    """The unreduced stream: every token stands for itself."""
    position = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return Tokens(x, torch.ones(x.shape[:2], device=x.device), position, position, prefix, suffix)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of ``values`` [B, N, ...] at ``index`` [B, M], per sample."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


# -- ToMe: Bolya et al., Token Merging, arXiv:2210.09461 ---------------------------------------------------------------


def bipartite_match(metric: Tensor, r: int, prefix: int = 0, suffix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Which ``r`` tokens merge into which (section 3, bipartite soft matching).

    Shapes: metric [B, N, D] -> sources [B, r'], destinations [B, r'], order [B, N - r'], all positions in the sequence;
    ``order`` lists the tokens that remain. ``r'`` is at most the number of unprotected sources.
    """
    batch, n, _ = metric.shape
    position = torch.arange(n, device=metric.device)
    free = (position >= prefix) & (position < n - suffix)
    even, odd = position[::2], position[1::2]
    r = min(r, int(free[even].sum())) if free[odd].any() else 0
    if r <= 0:
        return position[:0].expand(batch, 0), position[:0].expand(batch, 0), position.expand(batch, n)

    unit = F.normalize(metric.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    scores = scores.masked_fill(~free[even][:, None], -math.inf).masked_fill(~free[odd], -math.inf)
    best, nearest = scores.max(dim=-1)  # of equal values, max gives the first
    edges = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    sources, destinations = even[edges], odd[nearest.gather(1, edges)]

    gone = torch.zeros(batch, n, dtype=torch.bool, device=metric.device).scatter(1, sources, True)
    rank = torch.where(free, 1 + position % 2, torch.where(position < prefix, 0, 3)).expand(batch, -1)
    order = rank.masked_fill(gone, 4).argsort(dim=-1, stable=True)[:, : n - r]
    return sources, destinations, order


def merge(tokens: Tokens, keys: Tensor, r: int) -> Tokens:
    """Merges ``r`` tokens by the mean over heads of their keys [B, H, N, D]; values are averaged by size."""
    sources, destinations, order = bipartite_match(keys.mean(1), r, tokens.prefix, tokens.suffix)
    if not sources.shape[1]:
        return tokens
    batch, n, _ = tokens.x.shape
    into = torch.arange(n, device=order.device).repeat(batch, 1).scatter(1, sources, destinations)
    weight = tokens.size[..., None]
    total = torch.zeros_like(tokens.x).scatter_add(1, into[..., None].expand_as(tokens.x), tokens.x * weight)
    size = torch.zeros_like(tokens.size).scatter_add(1, into, tokens.size)
    after = torch.zeros_like(into).scatter(1, order, torch.arange(order.shape[1], device=order.device).repeat(batch, 1))
    return replace(
        tokens,
        x=take(total, order) / take(size, order)[..., None],
        size=take(size, order),
        position=take(tokens.position, order),
        home=take(after, take(into, tokens.home)),
    )


def log_size(tokens: Tokens) -> Tensor | None:
    """Proportional attention: what is added to the logits of every key, [B, 1, 1, N]; None while all sizes are 1."""
    return tokens.size.log()[:, None, None, :] if tokens.merged else None


def weighted_mean(tokens: Tokens, start: int) -> Tensor:
    """The mean over all original tokens from ``start`` on."""
    if not tokens.merged:
        return tokens.x[:, start:].mean(dim=1)
    size = tokens.size[:, start:, None]
    return (tokens.x[:, start:] * size).sum(dim=1) / size.sum(dim=1)


# -- EViT: Liang et al., Not All Patches are What You Need, arXiv:2202.07800 -------------------------------------------


def drop_inattentive(tokens: Tokens, score: Tensor, keep: float, fuse: bool) -> Tokens:
    """Keeps the ``ceil(keep * M)`` best of the M unprotected tokens; the rest goes, or becomes one token.

    Shapes: score [B, N]. The extra token is the sum of the dropped ones, weighted by their raw scores (section 3.2).
    """
    n = tokens.x.shape[1]
    patches = torch.arange(tokens.prefix, n - tokens.suffix, device=score.device)
    kept = math.ceil(keep * len(patches))
    if kept >= len(patches):
        return tokens
    ranked = patches[score[:, patches].argsort(dim=-1, descending=True, stable=True)]
    best, rest = ranked[:, :kept].sort(dim=-1).values, ranked[:, kept:]
    batch = len(score)
    head = torch.arange(tokens.prefix, device=score.device).expand(batch, -1)
    tail = torch.arange(n - tokens.suffix, n, device=score.device).expand(batch, -1)

    extra = (take(score, rest)[..., None] * take(tokens.x, rest)).sum(dim=1, keepdim=True)
    stands = [rest[:, :1]] if fuse else []  # whose position the extra token takes
    order = torch.cat([head, best, *stands, tail], dim=1)
    new = torch.full((batch, n), tokens.prefix + kept if fuse else -1, device=score.device)
    for row in range(batch):
        new[row, order[row]] = torch.arange(order.shape[1], device=score.device)
    return replace(
        tokens,
        x=torch.cat([take(tokens.x, head), take(tokens.x, best), *([extra] if fuse else []), take(tokens.x, tail)], 1),
        size=torch.ones_like(order, dtype=tokens.size.dtype),
        position=take(tokens.position, order),
        home=torch.where(tokens.home >= 0, take(new, tokens.home.clamp(min=0)), -1),
    )


# -- blocks, cut between attention and MLP -----------------------------------------------------------------------------


class Attended(NamedTuple):
    """The stream after attention and its residual, and what the scores of the methods are made from."""

    x: Tensor
    query: Tensor
    key: Tensor
    bias: Tensor | None
    scale: float

    def class_row(self) -> Tensor:
        """The attention of token 0 to every token, mean over heads: [B, N]."""
        logits = self.query[:, :, :1] @ self.key.mT * self.scale
        bias = 0 if self.bias is None else self.bias.expand(*self.query.shape[:3], -1)[:, :, :1]
        return (logits + bias).softmax(dim=-1).mean(dim=1)[:, 0]


class Layer(NamedTuple):
    """One block: ``attend(tokens, log size)``, then ``feed(tokens)``, the rest of the block."""

    attend: Callable[[Tokens, Tensor | None], Attended]
    feed: Callable[[Tokens], Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, heads joined: [B, H, N, D] -> [B, N, H * D]."""
    if bias is not None:
        bias = bias.expand(*query.shape[:2], query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale).transpose(1, 2).flatten(2)


def add(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms there are."""
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None


def heads(x: Tensor, count: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def identity(x: Tensor) -> Tensor:
    return x


def pre_norm(
    norm1: nn.Module,
    project: Callable[[Tensor, Tokens], tuple[Tensor, Tensor, Tensor]],
    output: Callable[[Tensor, Tensor], Tensor],
    norm2: nn.Module,
    mlp: nn.Module,
    *,
    scales: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = (identity, identity),
    bias: Callable[[Tokens], Tensor | None] = lambda tokens: None,
    added: Callable[[Tokens], Tensor | None] = lambda tokens: None,
) -> Layer:
    """``x += attention(norm1(x)); x += mlp(norm2(x))``, with layer scales, a bias on the logits, a last addend."""

    def attend(tokens: Tokens, key_bias: Tensor | None) -> Attended:
        normed = norm1(tokens.x)
        query, key, value = project(normed, tokens)
        total, scale = add(bias(tokens), key_bias), query.shape[-1] ** -0.5
        mixed = output(attention(query, key, value, total, scale), normed)
        return Attended(tokens.x + scales[0](mixed), query, key, total, scale)

    def feed(tokens: Tokens) -> Tensor:
        return add(tokens.x + scales[1](mlp(norm2(tokens.x))), added(tokens))

    return Layer(attend, feed)


def tome(
    tokens: Tokens, layers: Sequence[Layer], r: Sequence[int], prop_attn: bool = True, trace: list[Tokens] | None = None
) -> Tokens:
    """Runs the layers with ``r[i]`` tokens merged in layer i, between attention and MLP."""
    for layer, count in zip(layers, r, strict=True):
        attended = layer.attend(tokens, log_size(tokens) if prop_attn else None)
        tokens = merge(replace(tokens, x=attended.x), attended.key, count)
        tokens = replace(tokens, x=layer.feed(tokens))
        if trace is not None:
            trace.append(tokens)
    return tokens


# -- timm --------------------------------------------------------------------------------------------------------------


def timm_layers(model: nn.Module, tables: Sequence[Tensor] | None = None) -> list[Layer]:
    """The blocks of timm's VisionTransformer, Eva (``tables``: the RoPE table of every block) and Beit."""
    shared = model.rel_pos_bias() if getattr(model, "rel_pos_bias", None) is not None else None
    return [_timm_layer(block, tables[i] if tables else None, shared) for i, block in enumerate(model.blocks)]


def _timm_layer(block: nn.Module, table: Tensor | None, shared_bias: Tensor | None) -> Layer:
    attn = block.attn

    def project(x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        if attn.qkv is None:
            query, key, value = (heads(p(x), attn.num_heads) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        else:
            bias = attn.qkv.bias
            if getattr(attn, "q_bias", None) is not None:
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            joined = F.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))
            query, key, value = joined.permute(2, 0, 3, 1, 4)
        if hasattr(attn, "q_norm"):
            query, key = attn.q_norm(query), attn.k_norm(key)
        if table is not None:
            query, key = (_rotate(t, table, tokens, attn.rotate_half) for t in (query, key))
        return query, key, value

    def output(mixed: Tensor, normed: Tensor) -> Tensor:
        mixed = attn.norm(mixed) if hasattr(attn, "norm") else mixed
        if getattr(attn, "gate", None) is not None:
            mixed = mixed * attn.gate(normed).sigmoid()
        return attn.proj(mixed)

    def bias(tokens: Tokens) -> Tensor | None:
        own = getattr(attn, "relative_position_bias_table", None)
        matrix = add(None if own is None else attn._get_rel_pos_bias()[0], shared_bias)
        if matrix is None:
            return None
        rows, columns = tokens.position[:, :, None], tokens.position[:, None, :]
        return matrix[:, rows, columns].transpose(0, 1)

    def scale(index: int) -> Callable[[Tensor], Tensor]:
        if hasattr(block, f"ls{index}"):
            return getattr(block, f"ls{index}")
        gamma = getattr(block, f"gamma_{index}", None)
        return identity if gamma is None else lambda x: gamma * x

    return pre_norm(block.norm1, project, output, block.norm2, block.mlp, scales=(scale(1), scale(2)), bias=bias)


def _rotate(x: Tensor, table: Tensor, tokens: Tokens, half: bool) -> Tensor:
    """RoPE by the table's row of every token's position; the prefix has none.

    Shapes: x [B, H, N, D], table [M, 2 * D] or [H, M, 2 * D], sines then cosines.
    """
    if table.dim() == 2:
        table = table[None]
    rows = table[:, tokens.position[:, tokens.prefix :] - tokens.prefix].transpose(0, 1)
    sine, cosine = rows.chunk(2, dim=-1)
    head, tail = x[:, :, : tokens.prefix], x[:, :, tokens.prefix :]
    if half:
        left, right = tail.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
    else:
        turned = torch.stack([-tail[..., 1::2], tail[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([head, tail * cosine + turned * sine], dim=2)


def timm_embed(model: nn.Module, x: Tensor) -> tuple[Tokens, list[Layer]]:
    """The stream that enters the first block, and the blocks."""
    tables = None
    if hasattr(model, "_pos_embed"):
        x = model._pos_embed(model.patch_embed(x))
        if isinstance(x, tuple):  # Eva
            x, rope = x
            if rope is not None:  # a table per block and head, or one for all
                tables = list(rope) if rope.dim() == 4 else [rope] * len(model.blocks)
        x = model.norm_pre(x)
    else:  # Beit
        x = model.patch_embed(x)
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x if model.pos_embed is None else x + model.pos_embed
    return stream(x, prefix=model.num_prefix_tokens), timm_layers(model, tables)


def timm_head(model: nn.Module, tokens: Tokens, prop_attn: bool = True) -> Tensor:
    """Final norm, pooling (a mean is weighted by size, an attention pool is proportional) and classifier."""
    tokens = replace(tokens, x=model.norm(tokens.x))
    if getattr(model, "attn_pool", None) is not None:
        bias = log_size(tokens) if prop_attn else None
        start = 0 if getattr(model, "pool_include_prefix", False) else tokens.prefix
        pooled = model.attn_pool(tokens.x[:, start:], attn_mask=None if bias is None else bias[..., start:])
    elif hasattr(model, "head_dist"):
        return (model.head(tokens.x[:, 0]) + model.head_dist(tokens.x[:, 1])) / 2
    elif model.global_pool == "avg":
        pooled = weighted_mean(tokens, 0 if getattr(model, "pool_include_prefix", False) else tokens.prefix)
    else:
        assert model.global_pool == "token", model.global_pool
        pooled = tokens.x[:, 0]
    return model.head(model.fc_norm(pooled))


def tome_timm(
    model: nn.Module, x: Tensor, r: Sequence[int], prop_attn: bool = True, trace: list[Tokens] | None = None
) -> Tensor:
    """The logits of a timm VisionTransformer (DeiT, registers, mean or attention pooling), Eva or Beit under ToMe."""
    tokens, layers = timm_embed(model, x)
    return timm_head(model, tome(tokens, layers, r, prop_attn, trace), prop_attn)


def evit_timm(
    model: nn.Module, x: Tensor, keep: float, layers: Sequence[int], fuse: bool, trace: list[Tokens] | None = None
) -> Tensor:
    """The logits of a timm model with a class token, with inattentive tokens dropped or fused in the given blocks."""
    tokens, blocks = timm_embed(model, x)
    for index, block in enumerate(blocks):
        attended = block.attend(tokens, None)
        tokens = replace(tokens, x=attended.x)
        if index in layers:
            tokens = drop_inattentive(tokens, attended.class_row(), keep, fuse)
        tokens = replace(tokens, x=block.feed(tokens))
        if trace is not None:
            trace.append(tokens)
    return timm_head(model, tokens)


# -- transformers ------------------------------------------------------------------------------------------------------


def _three(query: nn.Module, key: nn.Module, value: nn.Module, count: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x, tokens: tuple(heads(p(x), count) for p in (query, key, value))


def _plain(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda mixed, normed: module(mixed)


def _returned(tokens: Tokens, short: bool) -> Tensor:
    return tokens.x if short else tokens.restored()


def tome_hf_vit(
    model: nn.Module,
    pixel_values: Tensor,
    r: Sequence[int],
    prop_attn: bool = True,
    short: bool = False,
    trace: list[Tokens] | None = None,
) -> list[Tensor]:
    """[last hidden state, pooled] of transformers' ViTModel or DeiTModel (class and distillation token) under ToMe.

    ``short`` returns the merged tokens instead of restoring the original ones.
    """
    layers = []
    for block in model.layers:
        a = block.attention
        project = _three(a.q_proj, a.k_proj, a.v_proj, a.num_attention_heads)
        layers.append(pre_norm(block.layernorm_before, project, _plain(a.o_proj), block.layernorm_after, block.mlp))
    prefix = 2 if hasattr(model.embeddings, "distillation_token") else 1
    tokens = tome(stream(model.embeddings(pixel_values), prefix), layers, r, prop_attn, trace)
    tokens = replace(tokens, x=model.layernorm(tokens.x))
    return [_returned(tokens, short), *([model.pooler(tokens.x)] if model.pooler is not None else [])]


def tome_hf_dinov2(
    model: nn.Module,
    pixel_values: Tensor,
    r: Sequence[int],
    prop_attn: bool = True,
    short: bool = False,
    trace: list[Tokens] | None = None,
) -> list[Tensor]:
    """[last hidden state, pooled] of transformers' Dinov2Model or Dinov2WithRegistersModel under ToMe."""
    layers = []
    for block in model.encoder.layer:
        a = block.attention
        project = _three(a.q_proj, a.k_proj, a.v_proj, a.num_attention_heads)
        scales = (block.layer_scale1, block.layer_scale2)
        layers.append(pre_norm(block.norm1, project, _plain(a.o_proj), block.norm2, block.mlp, scales=scales))
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    tokens = tome(stream(model.embeddings(pixel_values), prefix), layers, r, prop_attn, trace)
    tokens = replace(tokens, x=model.layernorm(tokens.x))
    return [_returned(tokens, short), tokens.x[:, 0]]


def _clip_layers(encoder: nn.Module) -> list[Layer]:
    layers = []
    for block in encoder.layers:
        a = block.self_attn
        project = _three(a.q_proj, a.k_proj, a.v_proj, a.num_heads)
        layers.append(pre_norm(block.layer_norm1, project, _plain(a.out_proj), block.layer_norm2, block.mlp))
    return layers


def tome_hf_clip(
    model: nn.Module,
    pixel_values: Tensor,
    r: Sequence[int],
    prop_attn: bool = True,
    short: bool = False,
    trace: list[Tokens] | None = None,
) -> list[Tensor]:
    """[last hidden state, pooled] of transformers' CLIPVisionModel under ToMe."""
    x = model.pre_layrnorm(model.embeddings(pixel_values))
    tokens = tome(stream(x, prefix=1), _clip_layers(model.encoder), r, prop_attn, trace)
    return [_returned(tokens, short), model.post_layernorm(tokens.x[:, 0])]


def tome_hf_siglip(
    model: nn.Module,
    pixel_values: Tensor,
    r: Sequence[int],
    prop_attn: bool = True,
    short: bool = False,
    trace: list[Tokens] | None = None,
) -> list[Tensor]:
    """[last hidden state, pooled] of transformers' SiglipVisionModel (no class token, attention pooling) under ToMe."""
    tokens = tome(stream(model.embeddings(pixel_values)), _clip_layers(model.encoder), r, prop_attn, trace)
    tokens = replace(tokens, x=model.post_layernorm(tokens.x))
    head = model.head
    probe = head.probe.expand(len(tokens.x), -1, -1)
    pool = head.attention
    weights, biases = pool.in_proj_weight.chunk(3), pool.in_proj_bias.chunk(3)
    query, key, value = (
        heads(F.linear(x, w, b), pool.num_heads)
        for x, w, b in zip((probe, tokens.x, tokens.x), weights, biases, strict=True)
    )
    bias = log_size(tokens) if prop_attn else None
    pooled = pool.out_proj(attention(query, key, value, bias, query.shape[-1] ** -0.5))
    pooled = pooled + head.mlp(head.layernorm(pooled))
    return [_returned(tokens, short), pooled[:, 0]]


def tome_hf_yolos(
    model: nn.Module,
    pixel_values: Tensor,
    r: Sequence[int],
    prop_attn: bool = True,
    short: bool = False,
    trace: list[Tokens] | None = None,
) -> list[Tensor]:
    """[logits, boxes, last hidden state] of YolosForObjectDetection under ToMe.

    Its detection tokens are a protected suffix; the position terms it adds after every block follow the tokens.
    """
    vit, count = model.vit, model.config.num_detection_tokens
    middle = None
    if model.config.use_mid_position_embeddings:
        middle = vit.encoder.interpolation(tuple(pixel_values.shape[-2:]))
    layers = []
    for i, block in enumerate(vit.encoder.layer):
        a = block.attention.attention
        rows = middle[i][0] if middle is not None and i < len(vit.encoder.layer) - 1 else None
        layers.append(
            pre_norm(
                block.layernorm_before,
                _three(a.query, a.key, a.value, a.num_attention_heads),
                _plain(block.attention.output.dense),
                block.layernorm_after,
                nn.Sequential(block.intermediate, block.output.dense),
                added=lambda tokens, rows=rows: None if rows is None else rows[tokens.position],
            )
        )
    tokens = tome(stream(vit.embeddings(pixel_values), 1, count), layers, r, prop_attn, trace)
    tokens = replace(tokens, x=vit.layernorm(tokens.x))
    found = tokens.x[:, -count:]
    return [model.class_labels_classifier(found), model.bbox_predictor(found).sigmoid(), _returned(tokens, short)]


def tome_bert(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    r: Sequence[int],
    prop_attn: bool = True,
    short: bool = False,
    trace: list[Tokens] | None = None,
    after_norm: bool = False,
) -> list[Tensor]:
    """[last hidden state, pooled] of transformers' BertModel, with a padding mask [B, N], under ToMe.

    The first token is protected where a pooler reads it. Blocks are post-norm: tokens merge right after the attention's
    residual sum, or with ``after_norm`` after the norm that follows it.
    """
    keep = attention_mask.bool()
    layers = [_bert_layer(block, keep, after_norm) for block in model.encoder.layer]
    tokens = stream(model.embeddings(input_ids), prefix=0 if model.pooler is None else 1)
    tokens = tome(tokens, layers, r, prop_attn, trace)
    return [_returned(tokens, short), *([model.pooler(tokens.x)] if model.pooler is not None else [])]


def _bert_layer(block: nn.Module, keep: Tensor, after_norm: bool) -> Layer:
    a, joined = block.attention.self, block.attention.output

    def attend(tokens: Tokens, key_bias: Tensor | None) -> Attended:
        query, key, value = (heads(p(tokens.x), a.num_attention_heads) for p in (a.query, a.key, a.value))
        bias = take(keep, tokens.position)[:, None, None, :]
        if key_bias is not None:
            bias = key_bias.masked_fill(~bias, -math.inf)
        scale = query.shape[-1] ** -0.5
        x = joined.dense(attention(query, key, value, bias, scale)) + tokens.x
        return Attended(joined.LayerNorm(x) if after_norm else x, query, key, bias, scale)

    def feed(tokens: Tokens) -> Tensor:
        x = tokens.x if after_norm else joined.LayerNorm(tokens.x)
        return block.output(block.intermediate(x), x)

    return Layer(attend, feed)


class SentenceEncoder(nn.Module):
    """A BertModel without pooler, a mean over the real tokens, and a unit norm: what MiniLM sentence models are."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return masked_mean(hidden, attention_mask)


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The unit vector of the mean of the tokens whose mask is 1."""
    mask = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9), dim=-1)


def tome_sentence(
    model: SentenceEncoder,
    input_ids: Tensor,
    attention_mask: Tensor,
    r: Sequence[int],
    prop_attn: bool = True,
    trace: list[Tokens] | None = None,
    after_norm: bool = False,
) -> Tensor:
    """The sentence embedding under ToMe; a merged token counts once for every real token it holds."""
    hidden = tome_bert(model.bert, input_ids, attention_mask, r, prop_attn, trace=trace, after_norm=after_norm)[0]
    return masked_mean(hidden, attention_mask)


# -- FasterVLM: Zhang et al., arXiv:2412.01818 -------------------------------------------------------------------------


def fastervlm_clip(model: nn.Module, pixel_values: Tensor, keep: float, layer: int) -> Tensor:
    """The patch features of a CLIPVisionModel's output that the class token attends to most in ``layer``.

    Shapes: [B, ceil(keep * P), C], in raster order; ``layer`` may count from the end.
    """
    tokens, score = stream(model.pre_layrnorm(model.embeddings(pixel_values)), prefix=1), None
    blocks = _clip_layers(model.encoder)
    for index, block in enumerate(blocks):
        attended = block.attend(tokens, None)
        if index == layer % len(blocks):
            score = attended.class_row()[:, 1:]
        tokens = replace(tokens, x=block.feed(replace(tokens, x=attended.x)))
    count = math.ceil(keep * score.shape[1])
    best = score.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(dim=-1).values
    return take(tokens.x[:, 1:], best)


# -- tiny models of the real classes -----------------------------------------------------------------------------------


def tiny_timm(name: str = "vit_tiny_patch16_224", scale: float = 0.1, **options: Any) -> nn.Module:
    """A timm model of 3 blocks, 48 wide, on 32 x 32 images: 64 patches."""
    import timm

    small = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
    torch.manual_seed(0)
    return perturb(timm.create_model(name, **(small | options)), scale)


TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "registers_mean": ("vit_base_patch16_reg4_gap_256", {}),
    "mean": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "rope_mean": ("vit_betwixt_patch16_rope_reg4_gap_256", {}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit_shared": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
}
"""Name of a tiny timm model -> the arguments of ``tiny_timm``."""


def _small(**options: Any) -> dict[str, Any]:
    size = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    return size | options


def tiny_hf(name: str, scale: float = 0.1, attn_implementation: str = "sdpa") -> nn.Module:
    """A transformers model of 3 layers: vit, deit, dinov2, dinov2_registers, clip, siglip, yolos, bert or minilm."""
    import transformers as hf

    image = _small(image_size=32, patch_size=4)
    text = _small(vocab_size=50, max_position_embeddings=40)
    dino = image | {"mlp_ratio": 2}
    dino.pop("intermediate_size")
    makers: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**image)),
        "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**image)),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**dino)),
        "dinov2_registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**dino)),
        "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**image)),
        "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**image)),
        "yolos": lambda: hf.YolosForObjectDetection(
            hf.YolosConfig(**image | {"image_size": [32, 32]}, num_detection_tokens=5, num_labels=4)
        ),
        "bert": lambda: hf.BertModel(hf.BertConfig(**text)),
        "minilm": lambda: SentenceEncoder(hf.BertModel(hf.BertConfig(**text), add_pooling_layer=False)),
    }
    torch.manual_seed(0)
    model = perturb(makers[name](), scale)
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation(attn_implementation)
    return model


def images(batch: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    """Random images [B, 3, size, size]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sentences(batch: int = 2, length: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random token ids [B, length] and their padding mask; every row has another number of real tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (batch, length), generator=generator)
    real = torch.arange(length) < torch.tensor([[length - 3 * (i % 4)] for i in range(batch)])
    return ids * real, real.long()
