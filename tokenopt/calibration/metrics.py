"""How far the outputs of a reduced model are from those of the dense one, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from tokenopt.errors import UsageError

Metric = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(outputs, outputs of the dense model) -> deviation of each sample [B], 0 where they are equal."""


def kl(output: Tensor, dense: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the dense model's class probabilities from those of the other, in nats."""
    p, q = dense.double().log_softmax(-1), output.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).flatten(1).mean(-1) if p.dim() > 2 else (p.exp() * (p - q)).sum(-1)


def cosine(output: Tensor, dense: Tensor) -> Tensor:
    """One minus the cosine of the features of a sample, mean over its tokens."""
    distance = 1 - torch.nn.functional.cosine_similarity(output.double(), dense.double(), dim=-1)
    return distance.flatten(1).mean(-1) if distance.dim() > 1 else distance


def last_token(output: Tensor, dense: Tensor) -> Tensor:
    """One minus the cosine of the last token's features, for decoders.

    Source: VFlowOpt, arXiv:2508.05211.
    """
    return cosine(output[:, -1], dense[:, -1])


def relative(output: Tensor, dense: Tensor) -> Tensor:
    """Norm of the difference over the norm of the dense output."""
    output, dense = output.double().flatten(1), dense.double().flatten(1)
    return (output - dense).norm(dim=-1) / dense.norm(dim=-1).clamp_min(1e-12)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl, "cosine": cosine, "last-token": last_token, "relative": relative
}  # fmt: skip


def metric_for(outputs: Sequence[Tensor], causal: bool) -> str:
    """The measure that suits what a model returns: scores of classes, a decoder's tokens, features, or a map."""
    first = next(t for t in outputs if t.dtype.is_floating_point)
    if causal and first.dim() == 3:
        return "last-token"
    if first.dim() == 2 and first.shape[-1] > 1:
        # features that are normed are no scores: their softmax says nothing
        norms = first.double().norm(dim=-1)
        return "cosine" if bool((norms - 1).abs().max() < 1e-3) else "kl"
    return "cosine" if first.dim() == 3 else "relative"


def get(name: str) -> Metric:
    """A measure by its name, or ``package.module:function`` of (outputs, dense outputs) -> [B].

    Raises:
        UsageError: if there is none.
    """
    if name in METRICS:
        measure = METRICS[name]

        def mean(outputs: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
            pairs = [(a, b) for a, b in zip(outputs, dense, strict=True) if b.dtype.is_floating_point and b.dim() > 1]
            return torch.stack([measure(a, b) for a, b in pairs]).mean(0)

        return mean
    module, colon, attribute = name.partition(":")
    hint = f"one of {', '.join(METRICS)}, or package.module:function"
    if not colon:
        raise UsageError(f"there is no metric {name!r}", hint=hint)
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the metric {name!r} cannot be loaded", why=str(error), hint=hint) from error
    if not callable(found):
        raise UsageError(f"the metric {name!r} is no function", hint=hint)
    return found


def correct(outputs: Sequence[Tensor], labels: Tensor) -> Tensor | None:
    """bool [B]: whether the class of greatest score is the label; None where outputs are no scores."""
    scores = next((t for t in outputs if t.dtype.is_floating_point and t.dim() == 2 and t.shape[1] > 1), None)
    return None if scores is None else scores.argmax(-1).cpu() == labels.cpu()
