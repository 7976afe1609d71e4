"""The same few volumes, generated again and again while a model is trained, with a small evaluation of them.

Prompts are the reports of the first validation studies, as features that the prepared folder has, with their spacing and class.
Nothing but pictures and numbers leaves this module: no report, no id.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccella_fast.config import Config
from ccella_fast.data.loading.selection import select_studies
from ccella_fast.data.manifest import StudyEntry, load_manifest
from ccella_fast.errors import NonFiniteError
from ccella_fast.evaluation.copying import memorisation
from ccella_fast.evaluation.features.random_networks import RandomNetworks
from ccella_fast.evaluation.mmd import kernel_distance
from ccella_fast.evaluation.volumes import Volume
from ccella_fast.models import DiffusionModel
from ccella_fast.models.autoencoder import load_autoencoder
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.sampling.optimizations import Optimizations
from ccella_fast.sampling.sampler import FastSampler
from ccella_fast.training.observer import Preview, PreviewSampler

logger = logging.getLogger("ccella_fast")
# Weights are shared with the training where that is possible, and nothing is kept between two previews.
_OPTIMIZATIONS = Optimizations(packed_weights=False, cuda_graph=False, overlap_decode=False)
_LEAST = 3  # volumes of a set that copies are sought with


def make_previews(data: Path, config: Config, device: torch.device) -> PreviewSampler:
    """What generates previews while a model is trained, see `train`."""
    return _ValidationPreviews(data, config, device)


class _ValidationPreviews:
    """Generates previews of a model.

    Args:
        data: the prepared folder, with an autoencoder.
        config: the configuration of the training.
        device: of the model.
    """

    def __init__(self, data: Path, config: Config, device: torch.device):
        self._config, self._device = config, device
        self._prepared = load_manifest(data)
        self._autoencoder = load_autoencoder(data / "vae", config.autoencoder)
        self._extractor = RandomNetworks(device=str(device))
        cases = select_studies(self._prepared, config, "val")
        count, traits = config.monitoring.samples, config.model.traits
        prompts = [cases[number % len(cases)] for number in range(count)]
        names = [None if case.pirads is None else CLASS_NAMES[case.pirads.index(1)] for case in prompts]
        self._request: dict[str, Any] = {
            "seeds": [number // len(cases) for number in range(count)],
            "spacing": [case.spacing for case in prompts],
            "num_inference_steps": config.monitoring.sample_inference_steps,
            "solver": "dpmpp_2m" if config.sampling.solver == "ddpm" else config.sampling.solver,
            "guidance_scale": 1.0,  # guidance needs the encoder for the null report
            "progress": False,
        }
        if traits.text:
            self._request["text"] = np.stack([self._prepared.array(case, "text") for case in prompts])
        if traits.class_input == "given":
            self._request["pirads"] = names
        self._held_out = self._real_features(cases)
        self._train = self._real_features(select_studies(self._prepared, config, "train"))

    def __call__(self, model: DiffusionModel) -> Preview | None:
        """The preview of a model; None, with a warning, if a volume is not finite. The model stays as it is."""
        dtype = next(model.parameters()).dtype
        sampler = FastSampler(
            model, self._autoencoder, self._prepared.scale_factor or 1.0, self._device, dtype, config=self._config,
            optimizations=_OPTIMIZATIONS, intensity_scale=self._prepared.intensity_scale,
        )  # fmt: skip
        try:
            made = sampler(**self._request).volumes
        except NonFiniteError:
            logger.warning("the volumes that this model generates are not finite")
            return None
        assert made is not None  # they are decoded
        volumes = made.numpy()
        generated = [
            self._features(list(volumes[:, place]), self._request["spacing"])
            for place in range(len(self._config.data.sequences))
        ]
        return Preview(volumes, self._request["spacing"], self._metrics(generated))

    def _metrics(self, generated: list[np.ndarray]) -> dict[str, float | None]:
        """Over all sequences: the mean distance, and the largest share of copies."""
        distances, copies = [], []
        for made, held_out, train in zip(generated, self._held_out, self._train, strict=True):
            if min(len(made), len(held_out)) >= 2:
                distances.append(kernel_distance(held_out, made))
            if min(len(held_out), len(train)) >= _LEAST:
                copies.append(memorisation(train, held_out, made).copies)
        return {
            "sample_distance": float(np.mean(distances)) if distances else None,
            "sample_copies": max(copies) if copies else None,
        }

    def _real_features(self, cases: Sequence[StudyEntry]) -> list[np.ndarray]:
        """For each sequence, the features of the studies of which the prepared folder has images."""
        features = []
        for sequence in self._config.data.sequences:
            known = [case for case in cases if f"image/{sequence}" in case.files]
            arrays = [np.asarray(self._prepared.array(case, f"image/{sequence}")) for case in known]
            features.append(self._features(arrays, [case.spacing for case in known]))
        return features

    def _features(self, arrays: Sequence[np.ndarray], spacings: Sequence[Sequence[float]]) -> np.ndarray:
        """(n, d) features. The volumes are numbered for error messages."""
        volumes = [
            Volume(array, (spacing[0], spacing[1], spacing[2]), str(number))
            for number, (array, spacing) in enumerate(zip(arrays, spacings, strict=True), start=1)
        ]
        rows = [self._extractor(volume)["random"] for volume in volumes]
        return np.stack(rows) if rows else np.empty((0, self._extractor.spaces["random"]), np.float32)
