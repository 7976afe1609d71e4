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


def get_solver(solver: str | Solver) -> Solver:
    """The solver of that name with its default settings; a Solver is returned as it is.

    Raises:
        ConfigError: there is no solver of that name; the error suggests the nearest one.
    """
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise ConfigError(f"there is no solver '{solver}'", field="solver", fix=did_you_mean(solver, SOLVERS))
    return SOLVERS[solver]()
