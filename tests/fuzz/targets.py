"""The inputs that are fuzzed: every format and list that a user may give, and what the commands leave for one another."""

from __future__ import annotations

import file_targets
import image_targets
import list_targets
from target import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in [*image_targets.TARGETS, *list_targets.TARGETS, *file_targets.TARGETS]
}
