"""A zoo of real architectures, small and with random weights, for coverage and regression runs.

Every entry builds one model of a public library with few blocks and small inputs, perturbs its weights (so that zero
heads and layer scales hide nothing), and says how many attention computations one forward holds. That number is stated
from the configuration and checked by counting in eager mode: nothing of the compiler takes part.

    python -m benchmarks.zoo [PART-OF-NAME ...]     builds, counts and captures the entries, and prints a table
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may download

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        build: makes the model in eval mode and its example inputs (positional or by name), batch 2.
        attentions: attention computations in one forward, of every kind: windows, cross, channel, linear ones too.
        family: what is special about it, for grouping a table.
        plain_encoder: one stream of tokens through blocks of global attention: it must be reducible.
        dynamic: whether the batch dimension can stay dynamic in a capture.
        extra_softmaxes: softmaxes in eager mode beyond one per attention; negative for attention without a softmax.
    """

    build: Callable[[], tuple[nn.Module, Inputs]]
    attentions: int
    family: str
    plain_encoder: bool = False
    dynamic: bool = True
    extra_softmaxes: int = 0


ZOO: dict[str, Entry] = {}
"""Name -> entry; names start with the library."""


def perturb(model: nn.Module, scale: float = 0.02, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter, in place, and puts the model in eval mode.

    Heads, biases, layer scales and bias tables that start at zero would otherwise hide errors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ids(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def images(size: int, channels: int = 3) -> Tensor:
    return randn(2, channels, size, size)


def padded(length: int) -> Tensor:
    """A padding mask [2, length]: the second row ends early."""
    return (torch.arange(length) < torch.tensor([[length], [length - length // 3]])).long()


def settle(model: nn.Module, inputs: Inputs) -> None:
    """Gives batch norms statistics of random inputs: through default ones the signal of random weights fades."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    if norms:
        call(model, pytree.tree_map(lambda x: randn(16, *x.shape[1:]), inputs))
        model.eval()


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """The model on its inputs."""
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def add(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], Inputs],
    attentions: int,
    family: str,
    **fields: Any,
) -> None:
    """Registers an entry whose model is ``make()``, perturbed enough for its attention to be far from uniform."""

    def build() -> tuple[nn.Module, Inputs]:
        torch.manual_seed(0)
        model, example = perturb(make(), scale=0.1), inputs()
        settle(model, example)
        return model, example

    assert name not in ZOO, name
    ZOO[name] = Entry(build, attentions, family, **fields)


# -- timm ------------------------------------------------------------------------------------------------------------


def timm(name: str, attentions: int, family: str, size: int = 64, *, label: str = "", **options: Any) -> None:
    """A timm model by its name or ``module.Class``; options that are no field of Entry go to its constructor."""
    fields = {k: options.pop(k) for k in ("plain_encoder", "dynamic", "extra_softmaxes") if k in options}

    def make() -> nn.Module:
        import timm

        module, _, cls = name.rpartition(".")
        if module:
            return getattr(importlib.import_module(f"timm.models.{module}"), cls)(num_classes=10, **options)
        return timm.create_model(name, num_classes=10, **options)

    add(f"timm/{label or name}", make, lambda: (images(size),), attentions, family, **fields)


def plain_timm(name: str, label: str = "", attentions: int = 3, **options: Any) -> None:
    """A plain vision transformer of timm: 3 blocks, 48 wide, 8 x 8 patches."""
    timm(name, attentions, "plain", label=label, **({"plain_encoder": True} | VIT | options))


def _mvit() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=24), (64, 64), num_classes=10)


# fmt: off
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}

plain_timm("vit_tiny_patch16_224")
plain_timm("deit_tiny_distilled_patch16_224")
plain_timm("deit3_small_patch16_224")
plain_timm("vit_base_patch16_clip_224")
plain_timm("vit_base_patch16_siglip_224", attentions=4)  # and a pool with one learned query
plain_timm("vit_small_patch14_dinov2")
plain_timm("vit_small_patch14_reg4_dinov2")
plain_timm("vit_base_patch16_reg4_gap_256")
plain_timm("vit_medium_patch16_gap_256")  # no class token, mean pooling
plain_timm("vit_tiny_patch16_224", "vit_qk_norm", qk_norm=True)
plain_timm("vit_small_patch14_dinov2", "dinov2_dynamic_size", dynamic_img_size=True)
plain_timm("vit_tiny_patch16_224", "vit_patch_drop", patch_drop_rate=0.5)
plain_timm("vit_small_patch16_dinov3")
plain_timm("eva02_tiny_patch14_224")
plain_timm("vit_betwixt_patch16_rope_reg4_gap_256")
plain_timm("vit_small_patch16_rope_mixed_224")
plain_timm("beit_base_patch16_224")
plain_timm("vit_relpos_small_patch16_224")
plain_timm("naflexvit_base_patch16_gap", img_size=None)

timm("vit_small_patch16_18x2_224", 6, "parallel", **VIT)  # two attentions side by side in every block
timm("samvit_base_patch16_224", 3, "window", **VIT, window_size=4, global_attn_indexes=(2,))
timm("swin_tiny_patch4_window7_224", 5, "window", 112, img_size=112, depths=(2, 2, 1), embed_dim=24,
     num_heads=(1, 2, 4))
timm("swinv2_tiny_window8_256", 5, "window", img_size=64, window_size=4, depths=(2, 2, 1), embed_dim=24,
     num_heads=(1, 2, 4))
timm("maxvit_pico_rw_256", 4, "window", img_size=64, depths=(1, 1), embed_dim=(32, 64))  # a window and a grid per block
timm("tiny_vit_5m_224", 4, "window", depths=(1, 1, 2, 1))  # none in the first stage
timm("gcvit.GlobalContextVit", 5, "window", img_size=64, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
timm("pvt_v2_b0", 4, "pyramid", depths=(1, 1, 1, 1))
timm("twins_pcpvt_small", 4, "pyramid", img_size=64, depths=(1, 1, 1, 1))
timm("twins_svt_small", 6, "pyramid", img_size=64, depths=(1, 1, 2, 2), embed_dims=(16, 32, 64, 64),
     num_heads=(1, 2, 4, 4), wss=(4, 4, 2, 2))
add("timm/mvitv2.MultiScaleVit", _mvit, lambda: (images(64),), 5, "pyramid")
timm("hiera_tiny_224", 5, "pyramid", img_size=64, stages=(1, 1, 2, 1), embed_dim=24)
timm("levit_128s", 6, "pyramid", img_size=64, depth=(1, 2, 1))  # and one in each of the two reductions
timm("coatnet_0_rw_224", 2, "conv", img_size=64, depths=(1, 1, 1, 1), embed_dim=(16, 32, 64, 64), stem_width=16)
timm("nextvit_small", 3, "conv", depths=(1, 1, 5, 1))  # the last block of all stages but the first
timm("mobilevit_xxs", 9, "conv")  # 2 + 4 + 3
timm("crossvit_tiny_240", 5, "cross", 240, depth=[[1, 2, 0]], embed_dim=[24, 48])  # 1 + 2, one cross for each branch
timm("cait_xxs24_224", 5, "class attention", img_size=64, embed_dim=48, depth=3)  # 3 talking heads, 2 class attentions
timm("xcit_tiny_12_p16_224", 5, "channel", img_size=64, embed_dim=48, depth=3)  # 3 over channels, 2 class attentions
timm("davit_tiny", 6, "channel", 56, depths=(1, 1, 1), embed_dims=(24, 48, 96), num_heads=(1, 2, 4))  # 3 over channels
timm("convit_tiny", 3, "gated", img_size=64, depth=3, local_up_to_layer=2, extra_softmaxes=2)  # 2 gate two softmaxes
timm("volo.VOLO", 7, "outlook", img_size=64, layers=(2, 1, 1, 1), embed_dims=(48, 96, 96, 96), num_heads=(3, 6, 6, 6))
timm("efficientvit_msra.EfficientVitMsra", 12, "cascaded", img_size=64, depth=(1, 1, 1))  # 4 heads one after another
timm("efficientvit_mit.EfficientVit", 2, "linear", widths=(8, 16, 32, 64, 128), depths=(1, 1, 1, 1, 1), head_dim=16,
     head_widths=(64, 48), extra_softmaxes=-2)
timm("focalnet.FocalNet", 0, "no attention", depths=(1, 1, 1, 1), embed_dim=16)
# fmt: on


# -- torchvision and torch -------------------------------------------------------------------------------------------


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 8, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=10)


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [1, 2], [4, 4], num_classes=10)


class _SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` on one tensor."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(48, 3, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, need_weights=self.need_weights)


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


# fmt: off
PLAIN: dict[str, Any] = {"family": "plain", "plain_encoder": True}

add("torchvision/vit_b_16", _torchvision_vit, lambda: (images(64),), 3, **PLAIN)
add("torchvision/swin_t", _torchvision_swin, lambda: (images(64),), 4, "window")
add("torch/TransformerEncoder[pre-norm]", lambda: _encoder(True), lambda: (randn(2, 50, 48),), 3, **PLAIN)
add("torch/TransformerEncoder[post-norm]", lambda: _encoder(False), lambda: (randn(2, 50, 48),), 3, **PLAIN)
add("torch/MultiheadAttention", lambda: _SelfAttention(False), lambda: (randn(2, 50, 48),), 1, "layer")
add("torch/MultiheadAttention[weights]", lambda: _SelfAttention(True), lambda: (randn(2, 50, 48),), 1, "layer")
add("torch/Transformer", lambda: nn.Transformer(48, 3, 2, 2, 96, batch_first=True),
    lambda: (randn(2, 30, 48), randn(2, 7, 48)), 6, "cross")  # 2, and 2 self and 2 cross in the decoder
# fmt: on


# -- transformers ----------------------------------------------------------------------------------------------------


def hf(
    model: str | Callable[[Any, Any], nn.Module],
    config: Callable[[Any], Any],
    inputs: Callable[[], Inputs],
    attentions: int,
    family: str,
    *,
    eager: bool = False,
    label: str = "",
    **fields: Any,
) -> None:
    """A transformers model by class name or ``make(transformers, config)``; ``eager`` adds one without SDPA."""

    def make(implementation: str | None) -> nn.Module:
        import transformers

        made = config(transformers)
        if implementation:
            made._attn_implementation = implementation
        return model(transformers, made) if callable(model) else getattr(transformers, model)(made)

    name = f"hf/{label or str(model).removesuffix('Model')}"
    add(name, lambda: make(None), inputs, attentions, family, **fields)
    if eager:
        add(f"{name}[eager]", lambda: make("eager"), inputs, attentions, family, **fields)


def pixels(size: int = 32) -> Inputs:
    return {"pixel_values": images(size)}


def video() -> Inputs:
    return {"pixel_values": randn(2, 4, 3, 16, 16)}


def text(length: int = 20) -> Inputs:
    return {"input_ids": ids(60, 2, length), "attention_mask": padded(length)}


def without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in names}


class _MeanPooled(nn.Module):
    """A text encoder and the mean of its real tokens, as in sentence embedding models."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).expand(hidden.size()).float()
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)


def _sentence_encoder(t: Any, config: Any) -> nn.Module:
    return _MeanPooled(t.BertModel(config, add_pooling_layer=False))


def _multimodal(before: int, patches: int, after: int) -> Inputs:
    """A prompt with an image in it, whose tokens have id 59."""
    tokens = ids(58, 2, before + patches + after)
    tokens[:, before : before + patches] = 59
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": images(32)}


def _paligemma_inputs() -> Inputs:
    return _multimodal(0, 64, 8) | {"token_type_ids": (torch.arange(72) >= 64).long().repeat(2, 1)}


# fmt: off
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
IMAGE = SMALL | {"image_size": 32, "patch_size": 4}
FRAME = IMAGE | {"image_size": 16}
DINO = without(IMAGE, "intermediate_size") | {"mlp_ratio": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = SMALL | SPECIAL | {"vocab_size": 60, "max_position_embeddings": 64}
DECODER = TEXT | {"num_hidden_layers": 2, "max_position_embeddings": 128, "use_cache": False}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4]}
WINDOWS = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
NECK = {"neck_hidden_sizes": [8, 16, 24, 24], "fusion_hidden_size": 16}

# images
hf("ViTModel", lambda t: t.ViTConfig(**IMAGE), pixels, 3, **PLAIN, eager=True)
hf("DeiTModel", lambda t: t.DeiTConfig(**IMAGE), pixels, 3, **PLAIN)
hf("CLIPVisionModel", lambda t: t.CLIPVisionConfig(**IMAGE), pixels, 3, **PLAIN, eager=True)
hf("SiglipVisionModel", lambda t: t.SiglipVisionConfig(**IMAGE), pixels, 4, **PLAIN, eager=True)  # and a pool
hf("Dinov2Model", lambda t: t.Dinov2Config(**DINO), pixels, 3, **PLAIN)
hf("Dinov2WithRegistersModel", lambda t: t.Dinov2WithRegistersConfig(**DINO), pixels, 3, **PLAIN, eager=True)
hf("DINOv3ViTModel", lambda t: t.DINOv3ViTConfig(**IMAGE, num_register_tokens=4), pixels, 3, **PLAIN, eager=True)
hf("BeitModel", lambda t: t.BeitConfig(**IMAGE, use_relative_position_bias=True), pixels, 3, **PLAIN, eager=True)
hf("IJepaModel", lambda t: t.IJepaConfig(**IMAGE), pixels, 3, **PLAIN)
hf("InternVLVisionModel", lambda t: t.InternVLVisionConfig(**IMAGE | {"image_size": [32, 32], "patch_size": [4, 4]}),
   pixels, 3, **PLAIN)
hf("YolosForObjectDetection", lambda t: t.YolosConfig(**IMAGE | {"image_size": [32, 32]}, num_detection_tokens=5),
   pixels, 3, **PLAIN, eager=True)
hf("DPTForDepthEstimation", lambda t: t.DPTConfig(**IMAGE | {"num_hidden_layers": 4}, **NECK,
       backbone_out_indices=[0, 1, 2, 3], reassemble_factors=[4, 2, 1, 0.5]),
   pixels, 4, "dense", plain_encoder=True)
hf("DepthAnythingForDepthEstimation", lambda t: t.DepthAnythingConfig(
       backbone_config=t.Dinov2Config(**DINO | {"num_hidden_layers": 4, "image_size": 28, "patch_size": 14},
           out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False),
       **NECK, reassemble_hidden_size=48, head_hidden_size=8, patch_size=14),
   lambda: pixels(56), 4, "dense", plain_encoder=True)
hf("ViTMAEModel", lambda t: t.ViTMAEConfig(**IMAGE), lambda: pixels() | {"noise": torch.rand(2, 64)}, 3, "masked")
hf("SegformerForSemanticSegmentation", lambda t: t.SegformerConfig(**STAGES, decoder_hidden_size=16),
   lambda: pixels(64), 4, "pyramid")
hf("PvtV2ForImageClassification", lambda t: t.PvtV2Config(**STAGES, image_size=64), lambda: pixels(64), 4, "pyramid")
hf("HieraModel", lambda t: t.HieraConfig(image_size=[64, 64], embed_dim=24, depths=[1, 1, 2, 1]), lambda: pixels(64),
   5, "pyramid")
hf("SwinModel", lambda t: t.SwinConfig(**WINDOWS), lambda: pixels(64), 4, "window")
hf("Swinv2Model", lambda t: t.Swinv2Config(**WINDOWS), lambda: pixels(64), 4, "window")
hf("SamVisionModel", lambda t: t.SamVisionConfig(**IMAGE | {"image_size": 64}, mlp_dim=96, window_size=7,
       output_channels=16, global_attn_indexes=[2]),
   lambda: pixels(64), 3, "window", eager=True)
hf("MobileViTModel", lambda t: t.MobileViTConfig(image_size=64, hidden_sizes=[24, 32, 40], num_attention_heads=4,
       neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 80]),
   lambda: pixels(64), 9, "conv")  # 2 + 4 + 3
hf("DetrForObjectDetection", lambda t: t.DetrConfig(use_timm_backbone=False, backbone_config=t.ResNetConfig(
       embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]), d_model=48, num_queries=7,
       encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=96, decoder_layers=2, decoder_attention_heads=3,
       decoder_ffn_dim=96),
   lambda: pixels(64), 6, "detector")  # 2, and 2 self and 2 cross in the decoder

# videos and sounds
hf("VideoMAEModel", lambda t: t.VideoMAEConfig(**FRAME, num_frames=4), video, 3, **PLAIN, eager=True)
hf("VivitModel", lambda t: t.VivitConfig(**without(FRAME, "patch_size"), num_frames=4, tubelet_size=[2, 4, 4]), video,
   3, **PLAIN)
hf("TimesformerModel", lambda t: t.TimesformerConfig(**FRAME, num_frames=4), video, 6, "factorised")  # time and space
hf("VJEPA2Model", lambda t: t.VJEPA2Config(**without(IMAGE, "image_size", "intermediate_size"), crop_size=16,
       frames_per_clip=4, tubelet_size=2, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1,
       pred_num_mask_tokens=1),
   lambda: {"pixel_values_videos": randn(2, 4, 3, 16, 16)}, 4, "predictor")  # 3 in the encoder
hf("WhisperForAudioClassification", lambda t: t.WhisperConfig(d_model=48, encoder_layers=3, encoder_attention_heads=3,
       encoder_ffn_dim=96, num_mel_bins=8, max_source_positions=20, pad_token_id=0),
   lambda: {"input_features": randn(2, 8, 40)}, 3, **PLAIN)
hf("ASTModel", lambda t: t.ASTConfig(**without(IMAGE, "image_size"), frequency_stride=4, time_stride=4, max_length=32,
       num_mel_bins=16),
   lambda: {"input_values": randn(2, 32, 16)}, 3, **PLAIN)

# texts
hf("BertModel", lambda t: t.BertConfig(**TEXT), text, 3, **PLAIN, eager=True)
hf(_sentence_encoder, lambda t: t.BertConfig(**TEXT), text, 3, **PLAIN, label="SentenceEncoder")
hf("RobertaModel", lambda t: t.RobertaConfig(**TEXT), text, 3, **PLAIN)
hf("DistilBertModel", lambda t: t.DistilBertConfig(vocab_size=60, dim=48, n_layers=3, n_heads=3, hidden_dim=96), text,
   3, **PLAIN)
hf("MPNetModel", lambda t: t.MPNetConfig(**TEXT), text, 3, **PLAIN)
hf("T5EncoderModel", lambda t: t.T5Config(vocab_size=60, d_model=48, d_kv=16, d_ff=96, num_layers=3, num_heads=3),
   text, 3, **PLAIN)
hf("ModernBertModel", lambda t: t.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2, local_attention=8), text,
   3, "window")
hf("CLIPTextModel", lambda t: t.CLIPTextConfig(**TEXT), text, 3, "causal")
hf("GPT2Model", lambda t: t.GPT2Config(**SPECIAL, vocab_size=60, n_embd=48, n_layer=3, n_head=3, use_cache=False), text,
   3, "causal")
hf("LlamaModel", lambda t: t.LlamaConfig(**TEXT, num_key_value_heads=1, use_cache=False), text, 3, "causal")

# images and texts
hf("CLIPModel", lambda t: t.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16),
   lambda: text() | pixels(), 6, "two towers")
hf("LlavaForConditionalGeneration", lambda t: t.LlavaConfig(vision_config=t.CLIPVisionConfig(**IMAGE),
       text_config=t.LlamaConfig(**DECODER), image_token_id=59, vision_feature_layer=-2),
   lambda: _multimodal(2, 64, 8), 5, "vlm", dynamic=False)  # 3 and 2, in all three
hf("PaliGemmaForConditionalGeneration", lambda t: t.PaliGemmaConfig(
       vision_config=t.SiglipVisionConfig(**IMAGE, vision_use_head=False),
       text_config=t.GemmaConfig(**DECODER, num_key_value_heads=1, head_dim=16), image_token_id=59, projection_dim=48),
   _paligemma_inputs, 5, "vlm")
hf("InternVLForConditionalGeneration", lambda t: t.InternVLConfig(
       vision_config=t.InternVLVisionConfig(**IMAGE | {"image_size": [32, 32], "patch_size": [4, 4]}),
       text_config=t.Qwen2Config(**DECODER, num_key_value_heads=3), image_token_id=59,
       downsample_ratio=0.5),
   lambda: _multimodal(2, 16, 8), 5, "vlm", dynamic=False)
# fmt: on


# -- diffusers -------------------------------------------------------------------------------------------------------


def diffusers(
    model: str | Callable[[Any], nn.Module],
    options: Mapping[str, Any],
    inputs: Callable[[], Inputs],
    attentions: int,
    *,
    label: str = "",
    **fields: Any,
) -> None:
    """A diffusers denoiser: a class name, or ``wrap`` around one of the class named by ``label``."""

    def make() -> nn.Module:
        import diffusers

        made = getattr(diffusers, label or str(model))(**options)
        return model(made) if callable(model) else made

    add(f"diffusers/{label or model}", make, inputs, attentions, "diffusion", **fields)


class _Flux(nn.Module):
    """Flux with its position ids, which have no batch dimension, as constants."""

    def __init__(self, flux: nn.Module) -> None:
        super().__init__()
        self.flux = flux
        side = torch.arange(8.0)
        self.register_buffer("image_ids", torch.cartesian_prod(torch.zeros(1), side, side))
        self.register_buffer("text_ids", torch.zeros(11, 3))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        states = (hidden_states, encoder_hidden_states, pooled, timestep)
        return self.flux(*states, img_ids=self.image_ids, txt_ids=self.text_ids, return_dict=False)[0]


def denoised(channels: int, words: int, **others: Tensor) -> Inputs:
    """A latent image, two steps and a prompt."""
    steps = torch.tensor([3, 7])
    return {
        "hidden_states": images(16, 4),
        "encoder_hidden_states": randn(2, words, channels),
        "timestep": steps,
    } | others


# fmt: off
HEADS = {"num_attention_heads": 3, "attention_head_dim": 16, "out_channels": 4}

diffusers("DiTTransformer2DModel", HEADS | {"num_layers": 3, "sample_size": 16, "num_embeds_ada_norm": 10},
          lambda: {"hidden_states": images(16, 4), "timestep": torch.tensor([3, 7]),
                   "class_labels": torch.tensor([1, 2])}, 3)
diffusers("PixArtTransformer2DModel", HEADS | {"num_layers": 2, "sample_size": 16, "cross_attention_dim": 48,
                                               "caption_channels": 24},
          lambda: denoised(24, 7, encoder_attention_mask=padded(7)), 4)  # self and cross in every block
diffusers("SD3Transformer2DModel", HEADS | {"sample_size": 16, "in_channels": 4, "num_layers": 3,
                                            "joint_attention_dim": 24, "caption_projection_dim": 48,
                                            "pooled_projection_dim": 16, "pos_embed_max_size": 16},
          lambda: denoised(24, 11, pooled_projections=randn(2, 16)), 3)
diffusers(_Flux, HEADS | {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24,
                          "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)},
          lambda: (randn(2, 64, 4), randn(2, 11, 24), randn(2, 16), torch.tensor([0.3, 0.7])), 4,
          label="FluxTransformer2DModel")
diffusers("WanTransformer3DModel", HEADS | {"in_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 64,
                                            "num_layers": 2, "rope_max_seq_len": 32},
          lambda: denoised(24, 7, hidden_states=randn(2, 4, 3, 16, 16)), 4)  # self and cross
diffusers("SanaTransformer2DModel", HEADS | {"in_channels": 4, "num_layers": 2, "num_cross_attention_heads": 3,
                                             "cross_attention_head_dim": 16, "cross_attention_dim": 48,
                                             "caption_channels": 24, "sample_size": 16, "patch_size": 1},
          lambda: denoised(24, 7), 4, extra_softmaxes=-2)  # self is linear, cross is not
diffusers("UNet2DConditionModel", {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1,
                                   "cross_attention_dim": 24, "attention_head_dim": 4, "norm_num_groups": 8,
                                   "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                                   "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
          lambda: {"sample": images(16, 4), "timestep": torch.tensor([3, 7]), "encoder_hidden_states": randn(2, 7, 24)},
          8, dynamic=False)  # 4 blocks of self and cross; its upsampling branches at batch 64
# fmt: on


# -- counting and checking -------------------------------------------------------------------------------------------


class _CountAttention(TorchDispatchMode):
    """Counts softmaxes and fused attentions where every operation ends, so that no spelling escapes."""

    NAMES = ("_softmax", "_safe_softmax", "_scaled_dot_product_")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in self.NAMES or name.startswith(self.NAMES[2])
        return func(*args, **(kwargs or {}))


def count_softmaxes(model: nn.Module, inputs: Inputs) -> int:
    """Softmaxes and fused attentions in one eager forward."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the attention inside one operation
    try:
        with _CountAttention() as counter:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.count


def _alive(output: Tensor) -> bool:
    """Whether an output is finite, and differs between the samples: else a comparison proves nothing."""
    first, second = output.chunk(2)
    return bool(output.isfinite().all()) and float((first - second).abs().max()) > 1e-3


def _difference(found: Any, expected: Any) -> float:
    """The largest absolute difference of two results."""
    from tokenopt.program import flatten_tensors

    pairs = zip(flatten_tensors(found), flatten_tensors(expected), strict=True)
    return max(float((f.double() - e.double()).abs().max()) for f, e in pairs)


def check(name: str) -> tuple[bool, str]:
    """Builds, counts and captures one entry: whether all is as stated, and a line of what was found."""
    from tokenopt.program import capture, flatten_tensors

    entry = ZOO[name]
    start = time.perf_counter()
    model, inputs = entry.build()
    expected = call(model, inputs)
    counted = count_softmaxes(model, inputs) - entry.extra_softmaxes
    built = time.perf_counter()
    program = capture(model, inputs, dynamic_batch=entry.dynamic)
    captured = time.perf_counter()
    error = _difference(call(program, inputs), expected)
    if entry.dynamic:
        args, kwargs = program.random_inputs(3, seed=1)
        with torch.no_grad():
            error = max(error, _difference(program(*args, **kwargs), model(*args, **kwargs)))
    alive = all(_alive(e) for e in flatten_tensors(expected) if e.is_floating_point())
    good = counted == entry.attentions and error < 1e-4 and alive
    line = f"{built - start:6.1f} {captured - built:8.1f} {len(program.graph.nodes):6d}"
    return good, f"{line} {counted:8d} {entry.attentions:6d} {error:9.1e}{'' if alive else '  constant output'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the entries whose name holds one of the arguments, or all."""
    parser = argparse.ArgumentParser(description="Build, count and capture the models of the zoo.")
    parser.add_argument("parts", nargs="*", help="parts of names; all entries without")
    parts = parser.parse_args(arguments).parts
    names = [n for n in ZOO if not parts or any(p in n for p in parts)]
    print(f"{'':47} {'build':>6} {'capture':>8} {'nodes':>6} {'counted':>8} {'stated':>6} {'error':>9}")
    failed = []
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                good, line = check(name)
        except Exception as error:  # the table goes on
            good, line = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not good:
            failed.append(name)
        print(f"{name:40} {'ok' if good else 'FAILED':6} {line}", flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} entries as stated")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
