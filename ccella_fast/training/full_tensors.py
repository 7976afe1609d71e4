"""Whole fp32 tensors of a DeepSpeed engine, by parameter name: master weights and the two moments of Adam.

They do not depend on the ZeRO stage, the precision and the number of processes, which decide how an engine stores them. With
ZeRO each process has a part of every tensor: so all processes call these functions, and iterate to the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ccella_fast.training.flat_adamw import FlatAdamW

Kind = Literal["weights", "exp_avg", "exp_avg_sq", "average"]  # the last without ZeRO only, where the optimizer has it


def full_tensors(engine: Any, kind: Kind, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole tensor of every parameter, sorted by name, on every process.

    A parameter that is not trained has no moments, and its average is itself; `trained_only` leaves it out. A tensor may be the
    engine's own: it must neither be changed nor used after the next step.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind != "weights":
        _create_moments(engine)
    own = _tensors_of_stage_0(engine, kind)
    for name, parameter in sorted_parameters(engine):
        if not parameter.requires_grad:
            if kind in ("weights", "average") and not trained_only:
                with zero.GatheredParameters(parameter):  # does nothing before stage 3, which frees the memory after it
                    whole = parameter.detach().to(torch.float32, copy=engine.zero_optimization_stage() == 3)
                yield name, whole
        elif own is not None:
            yield name, own[parameter]
        elif kind == "weights":
            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, safe_get_full_optimizer_state(parameter, kind)


@torch.no_grad()
def set_full_tensors(engine: Any, kind: Kind, values: Mapping[str, Tensor]) -> None:
    """Copy whole fp32 tensors to the optimizer. The weights that the model computes with stay, see `set_model_weights`.

    values: by parameter name, on any device. Parameters that are not trained have no place in the optimizer.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if kind != "weights":
        _create_moments(engine)
    own = _tensors_of_stage_0(engine, kind)
    for name, parameter in sorted_parameters(engine):
        if not parameter.requires_grad:
            continue
        if own is not None:
            own[parameter].copy_(values[name])
        elif engine.zero_optimization_stage() == 3:
            _set_own_part(engine, parameter, kind, values[name])
        elif kind == "weights":
            safe_set_full_fp32_param(parameter, values[name])
        else:
            safe_set_full_optimizer_state(parameter, values[name], kind)


@torch.no_grad()
def set_model_weights(engine: Any, values: Iterable[tuple[str, Tensor]]) -> None:
    """Round whole parameters to the dtype in which the model computes, and copy them to the model.

    values: all of them, by name, in any order that is the same on all processes.
    """
    from deepspeed import zero

    parameters = dict(engine.module.named_parameters())
    for name, value in values:
        with zero.GatheredParameters(parameters[name], modifier_rank=0):  # does nothing before stage 3
            parameters[name].copy_(value)


def adam_steps(engine: Any) -> int:
    """The number of steps that Adam has applied, which is that of all steps without the skipped ones."""
    if isinstance(engine.optimizer, FlatAdamW):
        return engine.optimizer.steps
    return max((int(state["step"]) for state in engine.basic_optimizer.state.values()), default=0)


@torch.no_grad()
def set_adam_steps(engine: Any, steps: int) -> None:
    """Set the number of steps that Adam has applied, on which its bias correction depends."""
    if isinstance(engine.optimizer, FlatAdamW):
        engine.optimizer.steps = steps
        return
    _create_moments(engine)
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(steps)


def sorted_parameters(engine: Any) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter, sorted by name: the order of tensors in a safetensors file, and of all collectives here."""
    return sorted(engine.module.named_parameters())


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, also at stage 3, which leaves an empty tensor in the module."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _tensors_of_stage_0(engine: Any, kind: Kind) -> dict[nn.Parameter, Tensor] | None:
    """Map from each parameter to the optimizer's own tensor at stage 0; None with ZeRO, which shards them."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, FlatAdamW):
        return None
    return optimizer.views(getattr(optimizer, "masters" if kind == "weights" else kind))


def _create_moments(engine: Any) -> None:
    """Create Adam's state where there is none, as torch does in the first step."""
    if isinstance(engine.optimizer, FlatAdamW):
        return
    states = engine.basic_optimizer.state
    for master in _updated_parameters(engine):
        if not states[master]:
            zeros = {kind: torch.zeros_like(master) for kind in ("exp_avg", "exp_avg_sq")}
            states[master] = {"step": torch.zeros((), device=master.device), **zeros}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # At stages 1 and 2 DeepSpeed does this after the first step; only then it finds the moments of a parameter. Of several
        # groups it does so after the step of the first, when the others have none yet.
        if len(engine.basic_optimizer.param_groups) > 1:
            engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _updated_parameters(engine: Any) -> list[Tensor]:
    """The parameters of the torch optimizer that DeepSpeed wraps: flat parts of all weights."""
    # ZeRO 3 empties `param_groups` between two steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    return flat or [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _set_own_part(engine: Any, parameter: Any, kind: Kind, value: Tensor) -> None:
    """Copy this process's part of a whole tensor to DeepSpeed's ZeRO 3."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    # `ds_tensor` is this process's part of the flat parameter; parts have equal sizes, and the last one is padded.
    size = parameter.ds_tensor.numel()
    padded = nn.functional.pad(value.flatten(), (0, size * engine.world_size - value.numel()))
    part = padded.narrow(0, engine.global_rank * size, size)
    if kind == "weights":
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, kind)
