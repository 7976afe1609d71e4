"""Volumes with NVIDIA DALI: one pipeline definition, on a GPU or (`device_id=None`) on a CPU.

DALI's threads read from each `.npy` file only the box that is needed. On a GPU all later operators run there. Operators that
the configuration does not enable are not part of the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from ccella_fast.config import AugmentationConfig
from ccella_fast.data.augmentation.engine import diagnose_engine_error, threads_per_process
from ccella_fast.data.augmentation.parameters import NOISE_FADE_LIMIT, standard_normals
from ccella_fast.data.augmentation.requests import VolumeRequest

_PREFETCHED_BATCHES = 2


class DaliEngine:
    """An `AugmentationEngine` that uses DALI.

    Its volumes are those of `TorchEngine`, with images in [0, 1], up to a largest difference of 2e-3 and a mean difference of
    2e-5 where geometry is augmented (the position of a voxel is rounded to about 1e-4 voxel), 5e-5 for flips alone and 2e-6 for
    all other operators. The order of requests and the batch size do not change a volume.
    """

    name = "dali"

    def __init__(self, config: AugmentationConfig, device: torch.device, size: Sequence[int]):
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.config, self.device, self.size = config, device, list(size)
        table = standard_normals(math.prod(size)) if config.noise else None
        self._normals = None if table is None else torch.tensor(table, device=device)

    def stream(
        self, paths: Sequence[Path], requests: Callable[[int], list[VolumeRequest]], count: int
    ) -> Iterator[Tensor]:
        """Yield `count` batches; see `AugmentationEngine.stream`."""
        if not count:
            return
        batch_size, current = len(paths) // count, 0

        def requests_clamped(n: int) -> list[VolumeRequest]:
            return requests(min(n, count - 1))  # DALI prefetches a few batches beyond the last one

        if self.device.type == "cuda":
            torch.cuda.current_stream(
                self.device
            ).query()  # DALI needs a CUDA context, which a new thread does not have
        try:
            pipeline = self._pipeline(list(map(str, paths)), requests_clamped, batch_size=batch_size)
            pipeline.build()
            for current in range(count):  # noqa: B007
                yield self._next(pipeline).view(batch_size, 1, *self.size)
        except RuntimeError as error:
            in_flight = range(current, current + _PREFETCHED_BATCHES + 1)  # DALI begins again after the last
            raise diagnose_engine_error(
                [request for n in in_flight for request in requests(n % count)], error
            ) from None

    def _next(self, pipeline: Any) -> Tensor:
        """The pipeline's next batch, (B, *size).

        On a GPU it is copied into torch's memory in torch's current stream. DALI's own memory returns to DALI when torch
        releases it, even if kernels are queued that still read it; with the copy, DALI's stream waits for the copy alone.
        """
        if self.device.type == "cpu":
            (volumes,) = pipeline.run()
            return torch.from_dlpack(volumes.as_tensor())
        stream = torch.cuda.current_stream(self.device)
        (volumes,) = pipeline.run(stream)
        source = volumes.as_tensor()
        return feed_ndarray(source, torch.empty(source.shape(), device=self.device), cuda_stream=stream)

    def _parameters(self, requests: list[VolumeRequest]) -> list[Any]:
        """The pipeline's small inputs, each a list over the batch, in the order in which `graph` takes them."""
        config, drawn = self.config, [request.augmentation for request in requests]
        inputs: list[Any] = [
            [np.array(request.box[0], np.int32) for request in requests],
            [np.array(request.box[1], np.int32) for request in requests],
        ]
        if config.moves:
            inputs.append([_dali_matrix(request.local_matrix) for request in requests])
        if config.blur:
            # A sigma of exactly 0 would mean "not given".
            inputs.append([np.maximum(request.sigmas, 1e-6).astype(np.float32) for request in requests])
        if config.brightness or config.bias:
            inputs.append([augmentation.field()[..., None] for augmentation in drawn])
        for name in ("gamma", "contrast", "noise"):
            if getattr(config, name):
                inputs.append([np.array(getattr(augmentation, name), np.float32) for augmentation in drawn])
        return inputs

    def _noise(self, requests: list[VolumeRequest]) -> list[Any]:
        """Views of the table of normal numbers, on its device."""
        assert self._normals is not None
        starts = [request.augmentation.noise_start for request in requests]
        parts = [self._normals[start : start + math.prod(self.size)].view(self.size) for start in starts]
        return parts if self.device.type == "cuda" else [part.numpy() for part in parts]

    def _pipeline(self, files: list[str], requests: Callable[[int], list[VolumeRequest]], *, batch_size: int) -> Any:
        on_gpu = self.device.type == "cuda"
        config, size = self.config, self.size
        num_inputs = len(self._parameters(requests(0)))

        def to_device(node: Any) -> Any:
            return node.gpu() if on_gpu else node

        @pipeline_def(
            batch_size=batch_size,
            num_threads=threads_per_process(),
            device_id=self.device.index if on_gpu else None,  # type: ignore[arg-type]
            prefetch_queue_depth=_PREFETCHED_BATCHES if on_gpu else 1,
        )
        def graph() -> Any:
            inputs = iter(fn.external_source(source=lambda n: self._parameters(requests(n)), num_outputs=num_inputs))
            x = to_device(fn.readers.numpy(files=files, roi_start=next(inputs), roi_shape=next(inputs)))
            if not config.active:
                return x
            if config.moves:
                x = fn.warp_affine(
                    fn.reshape(fn.expand_dims(x, axes=3), layout="DHWC"), matrix=next(inputs), size=size, fill_value=0.0,
                    inverse_map=True, interp_type=types.DALIInterpType.INTERP_LINEAR,
                )  # fmt: skip
                x = fn.squeeze(x, axes=3)
            if config.blur:
                x = fn.gaussian_blur(fn.reshape(x, layout="DHW"), sigma=next(inputs))
            if config.brightness or config.bias:
                linear = types.DALIInterpType.INTERP_LINEAR
                field: Any = fn.reshape(to_device(next(inputs)), layout="DHWC")
                field = fn.resize(field, size=size, interp_type=linear, antialias=False)
                x = dali.math.clamp(x * fn.squeeze(field, axes=3), 0.0, 1.0)
            if config.gamma:
                x = dali.math.pow(x, to_device(next(inputs)))
            if config.contrast:
                x = x + x * (1.0 - x) * (x - 0.5) * to_device(next(inputs) * 4.0)
            if config.noise:
                amplitude = to_device(next(inputs)) * dali.math.clamp(x * (1 / NOISE_FADE_LIMIT), 0.0, 1.0)
                noise = fn.external_source(source=lambda n: self._noise(requests(n)), device="gpu" if on_gpu else "cpu")
                x = dali.math.clamp(x + amplitude * noise, 0.0, 1.0)
            return x

        return graph()


def _dali_matrix(matrix: np.ndarray) -> np.ndarray:
    """Convert from (x, y, z) with voxel centers at integers to DALI's (z, y, x) with voxel centers at half integers."""
    linear, offset = matrix[::-1, 2::-1], matrix[::-1, 3]
    return np.column_stack([linear, offset + 0.5 - linear @ np.full(3, 0.5)]).astype(np.float32)
