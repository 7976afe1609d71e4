"""Decodes latents to volumes in host memory; on CUDA, concurrently with the denoising of the next batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.sampling.memory import out_of_memory
from ccella_fast.sampling.optimizations import fastest_convolutions

# Volumes are decoded one at a time, so a smaller batch helps only where the next batch is denoised meanwhile, on a GPU.
_LESS = "end other programs, or use dtype bfloat16, another device or, on a GPU, a smaller batch_size"


class Decoded(NamedTuple):
    """One decoded latent, on the CPU.

    Attributes:
        volume: (sequences, X, Y, Z) fp32 in [0, 1]; None if only latents were requested.
        latent: (C, x, y, z) fp32.
        class_probabilities: of the classes; None if no class is predicted.
        finite: whether all values are finite, those of the image before clipping, which would turn infinity into 1.
    """

    volume: Tensor | None
    latent: Tensor
    class_probabilities: list[float] | None
    finite: bool


class Decoder:
    """Decodes the latents of a batch.

    Args:
        autoencoder: None if nothing is decoded.
        channels: the number of latent channels per sequence.
        scale_factor: the factor of the latents per sequence.
        stream: a CUDA stream for the decoder; None for the current one.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | None,
        channels: Sequence[int],
        scale_factor: Sequence[float],
        stream: torch.cuda.Stream | None,
    ):
        self._autoencoder, self._channels, self._scale = autoencoder, list(channels), list(scale_factor)
        self._stream = stream

    @property
    def overlaps(self) -> bool:
        """Whether decoding runs concurrently with other work."""
        return self._stream is not None

    def submit(self, latents: Tensor, probabilities: Tensor | None, *, decode: bool) -> Iterator[Decoded]:
        """Decode latents (B, C, x, y, z) to one result per row.

        With a separate stream, all work is enqueued at once, and the first result waits for it; otherwise each row is decoded
        when its result is requested.
        """
        if self._stream is None:
            return self._decode_lazily(latents, probabilities, decode)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(stream):
            latents.record_stream(stream)
            if probabilities is not None:
                probabilities.record_stream(stream)
            queued = [self._decode_row(latent, decode) for latent in latents]
            host = [
                tuple(None if each is None else each.to("cpu", non_blocking=True) for each in row) for row in queued
            ]
            host_probabilities = None if probabilities is None else probabilities.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return self._wait_for(done, host, host_probabilities)

    def _decode_lazily(self, latents: Tensor, probabilities: Tensor | None, decode: bool) -> Iterator[Decoded]:
        for number, latent in enumerate(latents):
            row = tuple(None if each is None else each.cpu() for each in self._decode_row(latent, decode))
            yield _to_decoded(row, None if probabilities is None else probabilities[number])

    @staticmethod
    def _wait_for(done: torch.cuda.Event, host: list, probabilities: Tensor | None) -> Iterator[Decoded]:
        done.synchronize()
        for number, row in enumerate(host):
            yield _to_decoded(row, None if probabilities is None else probabilities[number])

    @torch.no_grad()
    def _decode_row(self, latent: Tensor, decode: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The latent, whether everything is finite, and the volume; all on the device."""
        finite = latent.isfinite().all()
        if not decode or (latent.device.type == "cpu" and not finite):
            return latent, finite, None
        assert self._autoencoder is not None
        dtype = next(self._autoencoder.parameters()).dtype
        images = []
        shape = (self._channels[0], *latent.shape[1:])
        needed = self._autoencoder.decoder.plan(shape, latent.device).bytes
        with out_of_memory("decoding a volume", needed, fix=_LESS):
            for part, factor in zip(latent.split(self._channels), self._scale, strict=True):
                with fastest_convolutions():
                    image = self._autoencoder.decode((part[None] / factor).to(dtype))[0, 0].float()
                finite = finite & image.isfinite().all()
                images.append(image.clamp(0, 1))
        return latent, finite, torch.stack(images)


def _to_decoded(row: tuple, probabilities: Tensor | None) -> Decoded:
    latent, finite, volume = row
    values = None if probabilities is None else probabilities.tolist()
    probabilities_finite = values is None or not any(
        math.isnan(value) for value in values
    )  # a softmax is never infinite
    return Decoded(volume, latent, values, bool(finite) and probabilities_finite)
