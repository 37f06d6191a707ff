"""A diffusers attention processor for plain attention: softmax(q k^T / sqrt(d)) v over a run's frozen and adapted layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainers.adapters.layer import answer_together
from trainers.frozen import FrozenLayer, SharedRows
from trainers.fused import attend


class Attend:
    """By plain products where a head has at most `products` scores, else by PyTorch's kernel."""

    def __init__(self, products: int) -> None:
        self._products = products

    def __call__(
        self, attention: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """hidden_states (B, n, C), encoder_hidden_states (B, m, W) -> (B, n, C)."""
        if encoder_hidden_states is None:
            parts = answer_together((attention.to_q, attention.to_k, attention.to_v), hidden_states)
        else:
            parts = [attention.to_q(hidden_states)]
            parts += answer_together((attention.to_k, attention.to_v), encoder_hidden_states)
        answer = attend(parts, attention.heads, parts[0].shape[1] * parts[-1].shape[1] <= self._products)
        for layer in attention.to_out:
            answer = layer(answer)
        return answer


def attends_plainly(module: Any) -> bool:
    """Whether it is diffusers' Attention with nothing beside softmax(q k^T) v and its projections."""
    if type(module).__name__ != "Attention":
        return False
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim", "residual_connection")
    return not any(getattr(module, extra, None) for extra in extras) and bool(module.rescale_output_factor == 1.0)


def side_by_side(attention: Any) -> list[str]:
    """Names of the projections that read the same states: query, key and value, or key and value of a text."""
    names = ["to_k", "to_v"] if attention.is_cross_attention else ["to_q", "to_k", "to_v"]
    layers = [getattr(attention, name) for name in names]
    alike = all(isinstance(layer, nn.Linear) and layer.bias is None for layer in layers)
    return names if alike and len({layer.in_features for layer in layers}) == 1 else []


def share_rows(attention: Any, names: list[str], keep: Any) -> None:
    """Puts the weights of the named projections one above the other, in one layer that `keep(Linear)` makes."""
    layers = [getattr(attention, name) for name in names]
    with torch.device("meta"):
        joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False)
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    whole: FrozenLayer = keep(joined)
    start = 0
    for name, layer in zip(names, layers, strict=True):
        setattr(attention, name, SharedRows(layer, whole, start))
        start += layer.out_features
