"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) with both conditions in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ccella_fast.errors import ConfigError


def guided(
    network: Callable[..., Tensor], condition: Any, null: Any, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser null + scale (conditional - null), which evaluates the network once for both conditions.

    Args:
        network: called with 2 B samples as `network(x, t, condition)`; as `network(x, t, *condition)` if the condition is a
            tuple or a list, and as `network(x, t, **condition)` if it is a dict.
        condition: a tensor, a tuple or list, or a dict. Each tensor in it has B rows, or one row for all samples. What is not a
            tensor must be equal in `null`.
        null: the null condition, of the same structure and shapes.
        scale: the guidance scale; at 1 only the condition is evaluated, with B samples.

    Returns:
        A function of (x, t) for {py:func}`ccella_fast.sample`.

    Raises:
        ConfigError: `condition` and `null` do not match.
    """
    condition_items, null_items = _items(condition), _items(null)
    if type(condition) is not type(null) or condition_items.keys() != null_items.keys():
        why = f"condition and null must have the same structure, got {_described(condition)} and {_described(null)}"
        fix = "give the null condition of the training in the form of the condition, such as a tensor of zeros"
        raise ConfigError(why, field="null", fix=fix)
    for name, value in condition_items.items():
        _check_pair(str(name), value, null_items[name])

    def evaluate(x: Tensor, t: Tensor, items: dict[Any, Any]) -> Tensor:
        if isinstance(condition, Mapping):
            return network(x, t, **items)
        return network(x, t, *items.values())

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            return evaluate(x, t, {name: _rows(value, len(x), name) for name, value in condition_items.items()})
        both = {
            name: torch.cat([_rows(value, len(x), name), _rows(null_items[name], len(x), name)])
            if isinstance(value, Tensor)
            else value
            for name, value in condition_items.items()
        }
        return guided_prediction(evaluate(torch.cat([x, x]), torch.cat([t, t]), both), scale)

    return denoiser


def guided_prediction(both: Tensor, scale: float) -> Tensor:
    """null + scale (conditional - null), in fp32 or fp64, from the predictions (2 B, ...), those of the condition first."""
    conditional, null = (both if both.dtype == torch.float64 else both.float()).chunk(2)
    return extrapolate(conditional, null, scale)


def extrapolate(better: Tensor, worse: Tensor, scale: float) -> Tensor:
    """worse + scale (better - worse), from two predictions."""
    return worse + scale * (better - worse)


def _items(condition: Any) -> dict[Any, Any]:
    """The parts of a condition by name or position."""
    if isinstance(condition, Mapping):
        return dict(condition)
    if isinstance(condition, (tuple, list)):
        return dict(enumerate(condition))
    return {0: condition}


def _described(condition: Any) -> str:
    if condition is None:
        return "None"
    parts = f" of {', '.join(map(str, condition))}" if isinstance(condition, Mapping) else ""
    parts = f" of {len(condition)}" if isinstance(condition, (tuple, list)) else parts
    return f"a {type(condition).__name__}{parts}"


def _rows(value: Any, count: int, name: Any) -> Any:
    """A tensor with one row per sample; other values as they are."""
    if not isinstance(value, Tensor) or len(value) == count:
        return value
    if len(value) != 1:
        why = f"the condition {name!r} must have one row, or one per sample, {count}; it has {len(value)}"
        raise ConfigError(why, field="condition", fix="give one row per sample")
    return value.expand(count, *value.shape[1:])


def _check_pair(name: str, value: Any, null: Any) -> None:
    if isinstance(value, Tensor) and isinstance(null, Tensor):
        if value.ndim and null.ndim and value.shape[1:] == null.shape[1:]:
            return
        got = f"{tuple(value.shape)} and {tuple(null.shape)}"
        why = f"condition and null must have the same shape after the batch dimension, got {got} in part {name}"
        raise ConfigError(why, field="null", fix="pad the null condition to the shape of the condition")
    if isinstance(value, Tensor) or isinstance(null, Tensor) or value != null:
        why = f"part {name} of condition and null must be two tensors, or equal, to be evaluated in one batch"
        raise ConfigError(why, field="null", fix="give both as tensors, or guide in two evaluations of your own")
