"""Studies that are left out of a training because they made steps non-finite again and again.

A step with a study whose prediction is not finite is skipped for the whole global batch, in each epoch. After `STRIKES` such
steps the study is left out: from the next step on, the next study in the order of the epoch takes its place. This depends on
what all processes know and is part of a checkpoint, so a resumed run is the same, and so is one on more or fewer processes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ccella_fast.errors import CheckpointError, NonFiniteError
from ccella_fast.quantities import counted

logger = logging.getLogger("ccella_fast")
STRIKES = 3  # skipped steps after which a study is left out
_AT_LEAST, _FRACTION = 10, 0.01  # of the studies that may be left out


class Quarantine:
    """The studies that are left out, and the skipped steps that each study has caused.

    Args:
        ids: of all studies of the training.
        state: what `state` has returned before; empty for a new run.

    Attributes:
        left_out: index of a study -> the first step, counted from 0, that does not use it.
        ids: those of the studies that are left out.
    """

    def __init__(self, ids: Sequence[str], state: dict[str, Any]):
        self._all = ids
        self._strikes = {int(study): count for study, count in state.get("strikes", {}).items()}
        self.left_out = {int(study): step for study, step in state.get("left_out", {}).items()}
        if not len(self.left_out) < len(ids) > max([0, *self.left_out, *self._strikes]):
            raise CheckpointError(
                "the quarantine of this checkpoint is not one of these studies", fix="use another checkpoint"
            )
        self.ids = [ids[study] for study in self.left_out]

    def state(self) -> dict[str, Any]:
        """The entry `quarantine` of training_state.json. Studies are numbered, because a checkpoint contains no ids."""
        tables = {"strikes": self._strikes, "left_out": self.left_out}
        return {name: {str(study): value for study, value in table.items()} for name, table in tables.items()}

    def uses(self, study: int, step: int) -> bool:
        """Whether the study takes part in a step, counted from 0."""
        return step < self.left_out.get(study, step + 1)

    def count(self, nonfinite: set[str], batch: set[str], step: int) -> None:
        """Count a skipped step, the `step`-th of the run. A study may be left out from the next one on.

        nonfinite: ids of the studies whose predictions are not finite. They are the cause only if other predictions of the same
        global batch are finite, or if it has no other; otherwise the model is broken. The only study of a training is
        never left out.
        batch: ids of all studies of the step.

        Raises:
            NonFiniteError: too many studies are left out.
        """
        if nonfinite == batch and (len(batch) > 1 or len(self._all) == 1):
            return
        found = []
        for case in sorted(nonfinite):
            study = self._all.index(case)
            self._strikes[study] = self._strikes.get(study, 0) + 1
            if self._strikes[study] == STRIKES:
                self.left_out[study] = step
                found.append(case)
        self.ids += found
        for case in found:
            logger.warning("%s made %d steps non-finite and is left out after step %d", case, STRIKES, step)
        limit = min(max(_AT_LEAST, int(_FRACTION * len(self._all))), len(self._all) - 1)
        if len(self.ids) > limit:
            why = f"{counted(len(self.ids), 'study', 'studies')} made steps non-finite and would be left out; {limit} may be"
            fix = "check the latents and the text of these studies, see quarantined in run_status.json, or lower training.lr"
            raise NonFiniteError(why, field="training", fix=fix)
