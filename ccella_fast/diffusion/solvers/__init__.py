"""The solvers by name. To add one, write a class in the file of its family and list it in `SOLVERS`."""

from __future__ import annotations

from ccella_fast.deprecation import deprecated_names
from ccella_fast.diffusion.solvers.base import SamplingPlan, Solver, StepResult
from ccella_fast.diffusion.solvers.ddpm import Ddim, Ddpm
from ccella_fast.diffusion.solvers.dpm_solver import DpmSolverPlusPlus2M, DpmSolverPlusPlus2MSde
from ccella_fast.diffusion.solvers.rectified_flow import EulerFlow, HeunFlow
from ccella_fast.diffusion.solvers.unipc import UniPc2
from ccella_fast.errors import ConfigError, did_you_mean

__all__ = ["SOLVERS", "Ddim", "Ddpm", "SamplingPlan", "Solver", "StepResult", "get_solver"]
__getattr__ = deprecated_names(__name__, {"Plan": "SamplingPlan", "Step": "StepResult"})

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (Ddpm, Ddim, DpmSolverPlusPlus2M, DpmSolverPlusPlus2MSde, UniPc2, EulerFlow, HeunFlow)
}


def get_solver(solver: str | Solver, *, flow: bool | None = None) -> Solver:
    """The solver of that name with its default settings; a Solver is returned as it is.

    Args:
        solver: the name, or a Solver.
        flow: whether it must solve a rectified flow (True) or a noise schedule (False); None: either.

    Raises:
        ConfigError: there is no solver of that name, or it solves the other process; the error suggests only those that fit.
    """
    fitting = [name for name, each in SOLVERS.items() if flow in (None, each.flow)]
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ConfigError(f"there is no solver '{solver:.40}'", field="solver", fix=_suggestion(solver, fitting))
    found = SOLVERS[solver]() if isinstance(solver, str) else solver
    if flow not in (None, found.flow):
        solves, trained = ("a rectified flow", "a noise schedule")[:: 1 if found.flow else -1]
        why = f"{found.name} solves {solves}, but this model was trained for {trained}"
        raise ConfigError(why, field="solver", fix=f"use one of: {', '.join(fitting)}")
    return found


def _suggestion(name: str, fitting: list[str]) -> str:
    """The hint for a name as diffusers, k-diffusion and user interfaces write it, such as "DPM++ 2M"."""
    return did_you_mean(name.lower().replace("++", "pp_").replace(" ", "_").replace("__", "_").strip("_"), fitting)
