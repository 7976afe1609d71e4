"""Low-rank adapters (LoRA, Hu et al. 2022): a weight W stays as it is, and B A, of rank r, is trained and added to it.

The weight that a layer computes with is W + alpha / r B A, as one tensor. The weight of a convolution is a matrix with a row
per output channel. B starts at zero, so that training starts from the network as it is; A is drawn as PyTorch draws a linear
layer.

This is a parametrization of PyTorch, so every kernel reads the sum where it reads `weight`. The library peft replaces `forward`
of a layer instead. Of the 267 linear layers and convolutions of the default CCELLA, peft 0.21.2 has no effect on 22 (`to_q` and
`out_proj` of the cross-attention, whose weights a kernel reads), and refuses 84 of the 87 convolutions, as our classes have
other arguments than PyTorch's; it cannot call the attention of the adapter either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

_ORIGINAL = re.compile(r"\.parametrizations\.(\w+)\.original$")
_FACTOR = re.compile(r"\.parametrizations\.(\w+)\.0\.lora_[AB]$")


class LowRankUpdate(nn.Module):
    """W -> W + scale * B A.

    Args:
        weight: W, of any shape; its first axis are the outputs.
        rank: r.
        scale: the factor of the product.

    Attributes:
        lora_A: (r, inputs), with the inputs of all taps.
        lora_B: (outputs, r).
    """

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        self.lora_B = nn.Parameter(weight.new_zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, in the shape and the memory format of the weight."""
        return updated(weight, self.lora_A, self.lora_B, self.scale)


def updated(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, in one pass over W, which is read in the order in which it is in memory."""
    if weight.is_contiguous():
        return torch.addmm(weight.flatten(1), lora_b, lora_a, alpha=scale).view_as(weight)
    rows, columns = (each.view(-1, *weight.shape[1:]).movedim(1, -1) for each in (weight, lora_a))  # channels-last
    return torch.addmm(rows.flatten(1), lora_b, columns.flatten(1), alpha=scale).view_as(rows).movedim(-1, 1)


def add_factors(model: nn.Module, rank: int, alpha: float, is_chosen: Callable[[str], bool]) -> int:
    """Give factors to the weights of linear layers and convolutions, and of attention from its queries, keys and values.

    Args:
        model: its weights are frozen already.
        rank: r.
        alpha: the product is multiplied by alpha / rank.
        is_chosen: whether the weight with a name gets factors.

    Returns:
        The number of weights that have got factors.
    """
    found = []
    for layer, module in model.named_modules():
        weight = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        has_matrix = isinstance(module, (nn.Linear, nn.Conv3d, nn.MultiheadAttention))
        if has_matrix and is_chosen(f"{layer}.{weight}"):
            found.append((module, weight))
    for module, weight in found:
        update = LowRankUpdate(getattr(module, weight), rank, alpha / rank)
        register_parametrization(module, weight, update)
    return len(found)


def plain_name(name: str) -> str:
    """The name of a parameter in the model without factors, which the parametrization changes."""
    return _ORIGINAL.sub(r".\1", name)


def merge_factors(frozen: Mapping[str, Tensor], trained: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the model without factors, which computes the same.

    Args:
        frozen: the weights that are not trained, by their names in that model.
        trained: factors, and weights that are trained as a whole.
        scale: alpha / rank.
    """
    merged = {**frozen, **{name: tensor for name, tensor in trained.items() if not _FACTOR.search(name)}}
    for name, lora_a in trained.items():
        if name.endswith(".lora_A"):
            weight = _FACTOR.sub(r".\1", name)
            lora_b = trained[name.removesuffix("lora_A") + "lora_B"]
            merged[weight] = updated(frozen[weight], lora_a, lora_b, scale)
    return merged


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without factors that computes the same; the model's own if it has none.

    No module is called: with ZeRO 3 that would be a collective operation.
    """
    state = model.state_dict()
    scale = next((module.scale for module in model.modules() if isinstance(module, LowRankUpdate)), None)
    if scale is None:
        return state
    frozen = {plain_name(name): tensor for name, tensor in state.items() if not _FACTOR.search(name)}
    return merge_factors(frozen, {name: tensor for name, tensor in state.items() if _FACTOR.search(name)}, scale)
