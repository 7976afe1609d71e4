"""AdamW over flat buffers, for training without ZeRO: everything that follows the backward pass, in few passes over memory.

The fp32 master weights are one buffer, of which every parameter has a part; so are both moments, the moving average, the
gradients, and in bf16 the weights that the model computes with. A step is

1. while the backward pass runs, gradients are added to their fp32 buffer, and summed over the processes bucket by bucket;
2. the global norm of the gradients, the one number that is read back to the host: a step that is not finite is skipped;
3. clipping, AdamW, moving average and bf16 copy in one kernel (`kernels.adamw`).

The weights of `WideLinear` layers, more than half of the default model, have no gradient in memory but its two factors, which
are gathered from all processes. For the gradient G = sum of dy_b x_b^T over the samples b, the norm follows from two small
Gram matrices, |G|^2 = sum of (dy_b . dy_c) (x_b . x_c) over b and c, and the kernel forms the product.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccella_fast.kernels.adamw import AdamWStep, adamw_
from ccella_fast.models.wide_linear import WideLinear

# Elements of a bucket: on a GPU few launches; on a CPU gradients that are still in its cache, and whose memory is used again.
_BUCKET, _BUCKET_ON_CPU = 2**25, 2**20
MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGNMENT = 128  # elements: kernels read 16 bytes at a time, and the cache lines of a GPU have 128 bytes
_WIDTH = 1024  # elements of which the squares are added before their sums are: fp32 sums of millions would be inexact


class FlatAdamW(torch.optim.Optimizer):
    """AdamW for DeepSpeed's engine at stage 0, with the attributes that the engine and the loop read of DeepSpeed's own.

    Args:
        model: the model in fp32, whose parameters become views of the flat buffers.
        dtype: bf16 or fp32, in which the model is to compute.
        groups: the parameters that are trained, as groups of torch.optim, which may have an `lr` of their own; None for all.
        lr: learning rate.
        betas: decay of the moments.
        weight_decay: decoupled decay.
        max_norm: the norm to which gradients are clipped; 0 for no clipping.
        rows: samples of a step over all processes, the rank of a gradient's factors. Where it is not well below the rank of the
            weight, factors would save nothing, and are not used.
        sum_dtype: in which gradients are summed over the processes.
        bucket: elements that are summed together; None for a number that suits the device.
        overlap: sum buckets while the backward pass runs, not after it.
        eps: added to the denominator.

    Attributes:
        steps: number of updates; skipped steps do not count.
        overflow: whether the last step was skipped because the norm of the gradients was not finite.
        masters: fp32 weights; in fp32 the memory of the model's own.
        exp_avg: first moments, fp32.
        exp_avg_sq: second moments, fp32.
        average: moving average of the weights, fp32, which `step` updates with the decay that `average_decay` returns; or None.
        gradients: of all parameters but the wide layers' weights, fp32; complete after `finish_sums`.
        is_last_micro_step: returns whether the gradients are complete after this backward pass; set by `build_engine`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        groups: list[dict[str, Any]] | None = None,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        max_norm: float,
        rows: int,
        sum_dtype: torch.dtype,
        bucket: int | None = None,
        overlap: bool = True,
        eps: float = 1e-8,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups or [{"params": list(model.parameters())}], defaults)
        self.max_norm, self.sum_dtype, self.overlap = max_norm, sum_dtype, overlap
        self.steps, self.overflow, self._global_grad_norm = 0, False, 0.0
        self.average: Tensor | None = None
        self.average_decay: Callable[[], float] = lambda: 0.0
        self.is_last_micro_step: Callable[[], bool] = lambda: True
        self._wide = _factored_layers(model, rows)
        self._wide_weights = wide = [cast(nn.Parameter, layer.weight) for layer in self._wide]
        self._wide_groups = [self._group_of(weight) for weight in wide]
        # Those of a group lie together. The backward pass computes the gradients of the last layers first.
        grouped = [
            [parameter for parameter in reversed(group["params"]) if all(parameter is not weight for weight in wide)]
            for group in self.param_groups
        ]
        dense = [parameter for members in grouped for parameter in members]
        self._ranges: dict[nn.Parameter, slice] = {}
        dense_end = self._lay_out(dense, 0)
        end = self._lay_out(wide, dense_end)
        starts = [self._ranges[members[0]].start for members in grouped if members] + [dense_end]
        self._dense_parts = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
        self._dense_groups = [group for group, members in zip(self.param_groups, grouped, strict=True) if members]

        device = dense[0].device
        self.masters, self.exp_avg, self.exp_avg_sq = (torch.zeros(end, device=device) for _ in range(3))
        self._computed = self.masters if dtype == torch.float32 else torch.zeros(end, dtype=dtype, device=device)
        self.gradients = torch.zeros(dense_end, device=device)
        with torch.no_grad():
            for parameter, master in self.views(self.masters).items():
                master.copy_(parameter.to(dtype))  # as DeepSpeed does, so that a run starts alike with and without ZeRO
            self.copy_masters()
            for parameter, computed in self.views(self._computed).items():
                parameter.data = computed
            for parameter in model.parameters():
                if parameter not in self._ranges:  # it is not trained
                    parameter.data = parameter.to(dtype)
        for layer in self._wide:
            layer.factors = []
        size = bucket or (_BUCKET_ON_CPU if device.type == "cpu" else _BUCKET)
        self._buckets = self._make_buckets(dense, size)
        # A bucket with a parameter that is not in the loss is never complete: else autograd would add the gradients of the next
        # micro-step in the dtype of the model.
        model.register_forward_pre_hook(lambda *_: self._take_leftovers())
        self._started = 0  # buckets of which the sum has been started in this step

    def _group_of(self, weight: nn.Parameter) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(weight is member for member in group["params"]))

    def views(self, flat: Tensor) -> dict[nn.Parameter, Tensor]:
        """The part of each parameter in a flat buffer, with its shape and memory format."""
        return {parameter: self.view(flat, parameter) for parameter in self._ranges}

    def copy_masters(self) -> None:
        """Copy the master weights to the weights that the model computes with."""
        if self._computed is not self.masters:
            self._computed.copy_(self.masters)

    def _lay_out(self, parameters: list[nn.Parameter], start: int) -> int:
        """Assign parts from `start` to the parameters. Returns the end."""
        for parameter in parameters:
            self._ranges[parameter] = slice(start, start + parameter.numel())
            start = _round_up(start + parameter.numel(), _ALIGNMENT)
        return _round_up(start, _WIDTH)

    def view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """The part of the parameter in a flat buffer, with its shape and memory format."""
        return flat[self._ranges[parameter]].as_strided(parameter.shape, parameter.stride())

    def _make_buckets(self, dense: list[nn.Parameter], size: int) -> list[_Bucket]:
        """Divide the gradients into buckets of at least `size` elements, but the last, and add a hook to each parameter."""
        buckets: list[_Bucket] = []
        members: list[nn.Parameter] = []
        ends = [self._ranges[parameter].start for parameter in dense[1:]] + [len(self.gradients)]
        for parameter, end in zip(dense, ends, strict=True):
            members.append(parameter)
            start = self._ranges[members[0]].start
            if end - start >= size or parameter is dense[-1]:
                views = {member: self.view(self.gradients, member) for member in members}
                buckets.append(_Bucket(self.gradients[start:end], views))
                members = []
        for bucket in buckets:
            for parameter in bucket.views:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, bucket))
                if self._computed is self.masters:  # then gradients have the dtype of their buffer
                    parameter.gradient_memory = functools.partial(bucket.memory_of, parameter)  # type: ignore[attr-defined]
        return buckets

    def _on_gradient(self, bucket: _Bucket, parameter: Tensor) -> None:
        """Take the gradients of the bucket when the backward pass has computed the last of them."""
        bucket.missing.discard(parameter)
        if bucket.missing:
            return
        bucket.take_gradients()
        if self.overlap and self.is_last_micro_step():
            bucket.complete = True
            # In the same order on all processes, whatever the order in which buckets become complete.
            while self._started < len(self._buckets) and self._buckets[self._started].complete:
                self._buckets[self._started].start_sum(self.sum_dtype)
                self._started += 1

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Sum, clip and update, unless the norm of the gradients is not finite."""
        self.finish_sums()
        factors = self.gather_factors()
        world_size, total = _world_size(), self.norm(factors)
        if world_size > 1:
            dist.broadcast(total, 0)  # unlike CPUs may round it differently, and the weights would drift apart
        norm = float(total) / world_size
        self._global_grad_norm, self.overflow = norm, not math.isfinite(norm)
        if not self.overflow:
            clip = min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0
            self._update(factors, clip / world_size)

    def _take_leftovers(self) -> None:
        """Take the gradients that the hooks have left."""
        for bucket in self._buckets:
            if any(parameter.grad is not None for parameter in bucket.views):
                bucket.take_gradients()

    def finish_sums(self) -> None:
        """Take and sum what the hooks have left, and wait for all sums."""
        for bucket in self._buckets:
            bucket.take_gradients()
        for bucket in self._buckets[self._started :]:
            bucket.start_sum(self.sum_dtype)
        for bucket in self._buckets:
            bucket.finish_sum()
        self._started = 0

    def gather_factors(self) -> tuple[Tensor, Tensor] | None:
        """dy (layers, rows, O) and x (layers, rows, I), with the rows of all micro-steps and processes.

        None if no wide layer enters the loss.
        """
        pairs = [pair for layer in self._wide for pair in layer.factors or ()]
        if not pairs:
            return None
        sides = []
        for side in zip(*pairs, strict=True):  # the layers have the same shape, and are gathered together
            local = torch.stack(side).reshape(len(self._wide), -1, side[0].shape[-1])
            if _world_size() > 1:
                every = local.new_empty(_world_size() * local.shape[0], *local.shape[1:])
                dist.all_gather_into_tensor(every, local)
                local = every.unflatten(0, (_world_size(), -1)).transpose(0, 1).flatten(1, 2).contiguous()
            sides.append(local)
        for layer in self._wide:
            layer.factors = []
        return sides[0], sides[1]

    def norm(self, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        """The norm of the summed gradients."""
        square = torch.linalg.vector_norm(self.gradients.view(-1, _WIDTH), dim=1).square().sum()
        if factors is not None:
            dy, x = (side.float() for side in factors)
            square = square + ((dy @ dy.mT) * (x @ x.mT)).sum()
        return square.clamp(min=0.0).sqrt()  # rounding can make a sum that is zero negative; NaN stays NaN

    def _update(self, factors: tuple[Tensor, Tensor] | None, scale: float) -> None:
        """Update all weights with the gradients times `scale`."""
        self.steps += 1
        average_decay = self.average_decay()
        for part, group in zip(self._dense_parts, self._dense_groups, strict=True):
            self._update_part(part, self.gradients[part], self._numbers(group, scale, average_decay))
        for number, weight in enumerate(self._wide_weights):
            if factors is None:
                of_layer = weight.new_zeros(1, weight.shape[0]), weight.new_zeros(1, weight.shape[1])
            else:
                of_layer = factors[0][number], factors[1][number]
            group = self._wide_groups[number]
            self._update_part(self._ranges[weight], of_layer, self._numbers(group, scale, average_decay))

    def _numbers(self, group: dict[str, Any], scale: float, average_decay: float) -> AdamWStep:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        return AdamWStep(group["lr"], beta1, beta2, group["eps"], decay, self.steps, scale, average_decay)

    def _update_part(self, part: slice, gradient: Tensor | tuple[Tensor, Tensor], step: AdamWStep) -> None:
        adamw_(
            self.masters[part],
            self.exp_avg[part],
            self.exp_avg_sq[part],
            gradient,
            step,
            average=None if self.average is None else self.average[part],
            copy=None if self._computed is self.masters else self._computed[part],
        )


class _Bucket:
    """Gradients that are summed over the processes together.

    Args:
        flat: their part of the buffer of all gradients, fp32.
        views: the part of each parameter.

    Attributes:
        missing: parameters whose gradients the current backward pass has still to compute.
        complete: whether the gradients of all micro-steps have been added.
    """

    def __init__(self, flat: Tensor, views: dict[nn.Parameter, Tensor]):
        self.flat, self.views = flat, views
        self.missing, self.complete = set[Tensor](views), False
        self._empty = True  # the buffer still has the gradients of the step before
        self._lent = set[Tensor]()  # parameters of which the backward pass may have written the gradient to the buffer
        self._sum: tuple[Tensor, dist.Work] | None = None

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the gradients of the parameters to the buffer: add them, or replace those of the step before.

        A parameter that does not enter the loss has no gradient, which counts as zero, as with ZeRO.
        """
        given = [(view, parameter.grad) for parameter, view in self.views.items() if parameter.grad is not None]
        if given and self.complete:
            raise RuntimeError("a parameter got a gradient twice in one backward pass; its first one has been summed")
        if self._empty:
            for parameter, view in self.views.items():
                if parameter.grad is None:
                    view.zero_()
        pairs = [(view, gradient) for view, gradient in given if gradient.data_ptr() != view.data_ptr()]
        if pairs:
            views, gradients = map(list, zip(*pairs, strict=True))
            (torch._foreach_copy_ if self._empty else torch._foreach_add_)(views, gradients)
        for parameter in self.views:
            parameter.grad = None
        self.missing, self._empty, self._lent = set(self.views), False, set()

    def memory_of(self, parameter: Tensor) -> Tensor | None:
        """The part of the parameter, for a backward pass that computes its gradient there instead of in new memory.

        None if the gradients there are still needed, or if this backward pass has already asked.
        """
        if not self._empty or self.complete or parameter in self._lent:
            return None
        self._lent.add(parameter)
        return self.views[cast(nn.Parameter, parameter)]

    def start_sum(self, dtype: torch.dtype) -> None:
        """Start to sum the gradients over the processes, in `dtype`."""
        if _world_size() > 1:
            rounded = self.flat.to(dtype)  # the buffer itself if it has this dtype
            self._sum = rounded, dist.all_reduce(rounded, async_op=True)

    def finish_sum(self) -> None:
        """Wait for the sum, and prepare for the next step."""
        if self._sum is not None:
            rounded, work = self._sum
            work.wait()
            if rounded is not self.flat:
                self.flat.copy_(rounded)
        self._sum, self.complete, self._empty = None, False, True


def factored_weights(model: nn.Module, rows: int) -> int:
    """The number of weights without a gradient in memory, in steps of `rows` samples over all processes."""
    return sum(layer.weight.numel() for layer in _factored_layers(model, rows))


def _factored_layers(model: nn.Module, rows: int) -> list[WideLinear]:
    layers = [layer for layer in model.modules() if isinstance(layer, WideLinear) and layer.weight.requires_grad]
    return [layer for layer in layers if 2 * rows <= min(layer.weight.shape)]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
