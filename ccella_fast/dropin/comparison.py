"""A model's outputs and gradients for an example, before and after its modules were replaced."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ccella_fast.dropin.layers import computes
from ccella_fast.dropin.replacement import map_tensors
from ccella_fast.errors import ConfigError

Example = tuple[Sequence[Any], Mapping[str, Any]]  # the arguments of the model by position and by name
_ALLOWED = {"outputs": 1e-5, "gradients": 1e-4}  # in fp32; see `_differences` for the units
_SMALLEST = 1e-3  # of the largest gradient, below which a gradient is not compared with its own size


class Values(NamedTuple):
    """What a model computes for an example.

    Attributes:
        outputs: all tensors that it returns.
        gradients: of a random weighting of the outputs with respect to each parameter; empty if they are not wanted.
    """

    outputs: list[Tensor]
    gradients: list[Tensor]


def compute(model: nn.Module, example: Example, *, gradients: bool) -> Values:
    """The values of an example. Random numbers are the same in each call, and buffers are left as they were."""
    args, kwargs = example
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {each.device for each in model.parameters() if each.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.set_grad_enabled(gradients):
            torch.manual_seed(0)
            outputs = [each for each in tensors_in(model(*args, **kwargs)) if each.is_floating_point()]
            if not outputs:
                why = "with the example, the model returns no tensor of floating-point numbers, so nothing can be compared"
                fix = "give a network that returns its prediction, or leave out example"
                raise ConfigError(why, field="example", fix=fix)
            found = _gradients(model, outputs) if gradients else []
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return Values([each.detach().clone() for each in outputs], found)


def _gradients(model: nn.Module, outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
    total = torch.stack([(each * weight).sum() for each, weight in zip(outputs, weights, strict=True)]).sum()
    parameters = [each for each in model.parameters() if each.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [torch.zeros_like(p) if each is None else each for p, each in zip(parameters, found, strict=True)]


class ValueComparison(NamedTuple):
    """How far the values after a change are from those before.

    Attributes:
        is_right: whether the values after the change are as right as those before.
        differences: of outputs and gradients, see `compare`.
        errors: in comparison with float64, the error after the change divided by that before; empty if not needed or not known.
        phrase: the same in words, the subject of a sentence.
    """

    is_right: bool
    differences: dict[str, float]
    errors: dict[str, float]
    phrase: str


def compare(before: Values, after: Values, make_truth: Callable[[], Values]) -> ValueComparison:
    """Compare the values of an example before and after a change.

    In fp32 outputs may differ by 1e-5 of their standard deviation, gradients by 1e-4 of their largest value. Beyond that, and
    in other dtypes, the error of `after`, as a root mean square over all values, may be twice that of `before`.

    make_truth: computes the values in float64.
    """
    differences = _differences(before, after)
    units = {"outputs": "of their standard deviation", "gradients": "of their largest value"}
    phrase = " and ".join(f"{name} differ by {value:.1e} {units[name]}" for name, value in differences.items())
    is_fp32 = all(each.dtype == torch.float32 for each in before.outputs)
    if is_fp32 and all(value <= _ALLOWED[name] for name, value in differences.items()):
        return ValueComparison(True, differences, {}, phrase)
    try:
        truth = make_truth()
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        phrase = f"{phrase}, which cannot be judged because the model does not compute in float64 ({why}),"
        return ValueComparison(False, differences, {}, phrase)
    old, new = (_errors(truth, each) for each in (before, after))
    is_right = all(new[name] <= 2 * old[name] for name in differences)
    errors = {name: new[name] / max(old[name], 1e-300) for name in differences}
    ratios = ", ".join(f"{value:.2g}" for value in errors.values())
    phrase = f"{phrase} (and have {ratios} times their errors in comparison with float64)"
    return ValueComparison(is_right, differences, errors, phrase)


def in_float64(model: nn.Module, example: Example, *, gradients: bool) -> Values:
    """The values of an example computed by a copy of the model in float64, also where its code casts to fp32."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    args, kwargs = (map_tensors(wide, each) for each in (tuple(example[0]), dict(example[1])))
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if computes(module) == "norm":  # also in the backward pass of an activation checkpoint, which no mode enters
            module.forward = functools.partial(nn.GroupNorm.forward, module)  # type: ignore[arg-type]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _CastsToFloat64(dtype, default):
            return compute(model, (args, kwargs), gradients=gradients)
    finally:
        torch.set_default_dtype(default)


class _CastsToFloat64(TorchFunctionMode):
    """Replaces casts to other floating-point dtypes by casts to float64; noise is what a model in `dtype` draws."""

    def __init__(self, dtype: torch.dtype, default: torch.dtype):
        super().__init__()
        self.dtype, self.default = dtype, default

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.randn, torch.rand):
            return function(*args, **({"dtype": self.default} | kwargs)).double()
        if function in (torch.randn_like, torch.rand_like):
            return function(args[0].to(self.dtype), *args[1:], **kwargs).double()
        if function in (Tensor.float, Tensor.bfloat16, Tensor.half):
            return args[0].double()
        return function(*map(_wider, args), **{name: _wider(value) for name, value in kwargs.items()})


def _wider(value: Any) -> Any:
    narrow = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if narrow else value


def _differences(before: Values, after: Values) -> dict[str, float]:
    """The largest differences, in the units that `compare` states.

    A gradient below a thousandth of the largest one of the model is compared with that thousandth.
    """
    deviations = [max(float(each.double().std(correction=0)), 1e-300) for each in before.outputs]
    apart = [_largest(a - b) for a, b in _pairs(after.outputs, before.outputs)]
    outputs = [value / deviation for value, deviation in zip(apart, deviations, strict=True)]
    found = {"outputs": max(outputs)}
    if before.gradients:
        sizes = [_largest(each) for each in before.gradients]
        smallest = max(_SMALLEST * max(sizes), 1e-300)
        apart = [_largest(a - b) for a, b in _pairs(after.gradients, before.gradients)]
        found["gradients"] = max(value / max(size, smallest) for value, size in zip(apart, sizes, strict=True))
    return found


def _errors(truth: Values, found: Values) -> dict[str, float]:
    def distance(true: list[Tensor], values: list[Tensor]) -> float:
        squares = [(a.double() - b).square().sum() for a, b in _pairs(values, true)]
        return float(torch.stack(squares).sum().sqrt())

    return {
        "outputs": distance(truth.outputs, found.outputs),
        "gradients": distance(truth.gradients, found.gradients) if truth.gradients else 0.0,
    }


def _largest(tensor: Tensor) -> float:
    value = float(tensor.abs().max()) if tensor.numel() else 0.0
    return value if value == value else float("inf")


def _pairs(first: list[Tensor], second: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(first, second, strict=True)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
