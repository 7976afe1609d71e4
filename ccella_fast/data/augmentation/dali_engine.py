"""Volumes with NVIDIA DALI: one pipeline definition, on a GPU or (`device_id=None`) on a CPU.

`.npy` files are read by DALI's threads, the needed box of each only; on a GPU everything after that happens there, and torch
takes the result over without a copy. Operators that the configuration leaves out are not in the pipeline.
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
from torch import Tensor

from ccella_fast.config import AugmentationConfig
from ccella_fast.data.augmentation.engine import diagnose_engine_error, threads_per_process
from ccella_fast.data.augmentation.parameters import FAINT, normals
from ccella_fast.data.augmentation.requests import VolumeRequest

_AHEAD = 2  # batches


class DaliEngine:
    """See volumes.Engine."""

    name = "dali"

    def __init__(self, config: AugmentationConfig, device: torch.device, size: Sequence[int]):
        self.config, self.device, self.size = config, device, list(size)
        table = normals(math.prod(size)) if config.noise else None
        self._normals = None if table is None else torch.tensor(table, device=device)

    def stream(self, paths: Sequence[Path], jobs: Callable[[int], list[VolumeRequest]], count: int) -> Iterator[Tensor]:
        if not count:
            return
        batch, at = len(paths) // count, 0

        def asked(n: int) -> list[VolumeRequest]:
            return jobs(min(n, count - 1))  # DALI asks for a few batches more than are used

        try:
            pipeline = self._pipeline(list(map(str, paths)), asked, batch_size=batch)
            pipeline.build()
            for at in range(count):  # noqa: B007
                (out,) = pipeline.run(self._stream())
                yield torch.from_dlpack(out.as_tensor()).view(batch, 1, *self.size)
        except RuntimeError as bad:
            ahead = range(at, min(at + _AHEAD + 1, count))
            raise diagnose_engine_error([job for n in ahead for job in jobs(n)], bad) from None

    def _stream(self) -> torch.cuda.Stream | None:
        """The stream that uses the volumes. DALI binds their memory to it: what torch lets go is written again only after the
        kernels that were still to read it. Unbound, it would be free at once."""
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _parameters(self, jobs: list[VolumeRequest]) -> list[Any]:
        """For each of the pipeline's small inputs a list over the batch, in the order in which `graph` takes them."""
        config, drawn = self.config, [job.augmentation for job in jobs]
        inputs: list[Any] = [
            [np.array(job.box[0], np.int32) for job in jobs],
            [np.array(job.box[1], np.int32) for job in jobs],
        ]
        if config.moves:
            inputs.append([_dali_matrix(job.local_matrix) for job in jobs])
        if config.blur:
            # A sigma of exactly 0 would mean "not given".
            inputs.append([np.maximum(job.sigmas, 1e-6).astype(np.float32) for job in jobs])
        if config.brightness or config.bias:
            inputs.append([augmentation.field()[..., None] for augmentation in drawn])
        for name in ("gamma", "contrast", "noise"):
            if getattr(config, name):
                inputs.append([np.array(getattr(augmentation, name), np.float32) for augmentation in drawn])
        return inputs

    def _noise(self, jobs: list[VolumeRequest]) -> list[Any]:
        """Views of the table, on the device where it lies."""
        assert self._normals is not None
        starts = [job.augmentation.noise_start for job in jobs]
        parts = [self._normals[start : start + math.prod(self.size)].view(self.size) for start in starts]
        return parts if self.device.type == "cuda" else [part.numpy() for part in parts]

    def _pipeline(self, files: list[str], jobs: Callable[[int], list[VolumeRequest]], *, batch_size: int) -> Any:
        on_gpu = self.device.type == "cuda"
        config, size = self.config, self.size
        number = len(self._parameters(jobs(0)))

        def here(node: Any) -> Any:
            return node.gpu() if on_gpu else node

        @pipeline_def(
            batch_size=batch_size,
            num_threads=threads_per_process(),
            device_id=(self.device.index or 0) if on_gpu else None,  # type: ignore[arg-type]
            prefetch_queue_depth=_AHEAD if on_gpu else 1,
        )
        def graph() -> Any:
            inputs = iter(fn.external_source(source=lambda n: self._parameters(jobs(n)), num_outputs=number))
            x = here(fn.readers.numpy(files=files, roi_start=next(inputs), roi_shape=next(inputs)))
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
                field: Any = fn.reshape(here(next(inputs)), layout="DHWC")
                field = fn.resize(field, size=size, interp_type=linear, antialias=False)
                x = dali.math.clamp(x * fn.squeeze(field, axes=3), 0.0, 1.0)
            if config.gamma:
                x = dali.math.pow(x, here(next(inputs)))
            if config.contrast:
                x = x + x * (1.0 - x) * (x - 0.5) * here(next(inputs) * 4.0)
            if config.noise:
                faded = here(next(inputs)) * dali.math.clamp(x * (1 / FAINT), 0.0, 1.0)
                noise = fn.external_source(source=lambda n: self._noise(jobs(n)), device="gpu" if on_gpu else "cpu")
                x = dali.math.clamp(x + faded * noise, 0.0, 1.0)
            return x

        return graph()


def _dali_matrix(matrix: np.ndarray) -> np.ndarray:
    """Ours maps (x, y, z) at voxel centres to indices; DALI's maps (z, y, x) with voxel centres at halves."""
    linear, offset = matrix[::-1, 2::-1], matrix[::-1, 3]
    return np.column_stack([linear, offset + 0.5 - linear @ np.full(3, 0.5)]).astype(np.float32)
