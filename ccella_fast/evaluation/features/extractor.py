"""What every feature extractor offers, and how one is named on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from ccella_fast.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

_INPUTS = {"medicalnet": ("ccella", "medicalnet"), "radimagenet": ("ccella", "maisi", "official")}
_NAMES = ("taps", "radiomics", "random", *_INPUTS)


class Extractor(Protocol):
    """Turns one volume into a vector for each of its feature spaces. One pass of a network may serve several spaces.

    The vectors depend on the volume alone: not on other volumes, on the number of calls or on a random state.

    Attributes:
        spaces: name -> number of features.
        sequences: those it is made for; None for all.
        identity: plain JSON values on which the features depend: the weights' SHA-256, the version of the code and all of the
            preprocessing. It is part of every number and of the cache's key.
    """

    spaces: dict[str, int]
    sequences: frozenset[str] | None
    identity: dict[str, object]

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The float32 vector of each space.

        Raises:
            DataError: the volume has voxels that are not finite, or is constant.
        """
        ...


@runtime_checkable
class SliceExtractor(Extractor, Protocol):
    """An extractor for slices. Its vectors of a volume are the means over the slices."""

    def slices(self, volume: Volume) -> dict[str, np.ndarray]:
        """The (slices, d) float32 features of each space. Raises as a call of the extractor."""
        ...


def serves(extractor: Extractor, sequence: str) -> bool:
    """Whether an extractor is made for a sequence."""
    return extractor.sequences is None or sequence in extractor.sequences


def load_extractor(spec: str, *, device: str = "cpu", allow_unknown_weights: bool = False) -> Extractor:
    """Load an extractor by its name. Nothing is downloaded.

    Args:
        spec: `taps`, `radiomics`, `random`, or a network whose weights are in a file: `medicalnet=FILE`,
            `radimagenet=FILE`. The input that the network is given may follow the file: `medicalnet=FILE:ccella` (default) or
            `:medicalnet`; `radimagenet=FILE:ccella`, `:maisi` or `:official` (default: as the file was trained).
        device: of the networks, such as `cuda`.
        allow_unknown_weights: accept a weight file whose SHA-256 is not among the known ones. Its architecture is checked
            all the same.

    Raises:
        ConfigError: the name or the input is unknown, the file is not given, or the package `lavlab-taps` is not installed.
        CheckpointError: the weight file is missing or damaged, has an unknown SHA-256, or is of another architecture.
    """
    name, has_file, file = spec.partition("=")
    if name not in _NAMES:
        fix = (
            f"{did_you_mean(name, _NAMES)}; networks with a weight file are given as medicalnet=FILE, radimagenet=FILE"
        )
        raise ConfigError(f"there are no features called {name!r:.80}", field="features", fix=fix)
    if (name in _INPUTS) != bool(file):
        why = f"'{name}' is given with a weight file" if name in _INPUTS else f"'{name}' is given without a file"
        fix = f"write {name}=FILE" if name in _INPUTS else f"write {name}"
        raise ConfigError(f"{why}, got {spec!r:.200}", field="features", fix=fix)
    # Imported here: MONAI takes seconds to import.
    if name == "radiomics":
        from ccella_fast.evaluation.features.radiomics import Radiomics

        return Radiomics()
    if name == "taps":
        from ccella_fast.evaluation.features.taps import Taps

        return Taps(device=device)
    if name == "random":
        from ccella_fast.evaluation.features.random_networks import RandomNetworks

        return RandomNetworks(device=device)
    path, input_name = _split_input(name, file)
    if name == "medicalnet":
        from ccella_fast.evaluation.features.medicalnet import MedicalNet

        return MedicalNet(path, input_name or "ccella", device=device, allow_unknown_weights=allow_unknown_weights)
    from ccella_fast.evaluation.features.radimagenet import RadImageNet

    return RadImageNet(path, input_name, device=device, allow_unknown_weights=allow_unknown_weights)


def _split_input(name: str, file: str) -> tuple[str, str | None]:
    """The path and the input of `FILE:INPUT`. A path may have colons, so only a known input or a bare word is split off."""
    path, colon, tail = file.rpartition(":")
    if not colon or not path or not tail.isidentifier():
        return file, None
    if tail not in _INPUTS[name]:
        fix = did_you_mean(tail, _INPUTS[name])
        raise ConfigError(f"'{name}' has no input called {tail!r:.80}", field="features", fix=fix)
    return path, tail
