"""Latents to volumes in host memory, on a CUDA device beside the denoising of the next batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.sampling.memory import out_of_memory


class Decoded(NamedTuple):
    """volume: (sequences, X, Y, Z) fp32 in [0, 1], None when not asked for. latent: (C, x, y, z) fp32. finite: everything is,
    the image before it is clipped: afterwards infinity would pass for white."""

    volume: Tensor | None
    latent: Tensor
    class_probabilities: list[float] | None
    finite: bool


class Decoder:
    """autoencoder: None if nothing is ever decoded. channels, scale_factor: one entry a sequence. stream: a CUDA stream for the
    decoder, None for the current one."""

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
        return self._stream is not None

    def start(self, latents: Tensor, probabilities: Tensor | None, *, decode: bool) -> Iterator[Decoded]:
        """latents (B, C, x, y, z) -> one result a row. With a stream of its own all work is queued now and waited for when the
        first result is asked for; otherwise each row is decoded when it is asked for."""
        if self._stream is None:
            return self._one_by_one(latents, probabilities, decode)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(stream):
            latents.record_stream(stream)
            if probabilities is not None:
                probabilities.record_stream(stream)
            queued = [self._row(latent, decode) for latent in latents]
            host = [
                tuple(None if each is None else each.to("cpu", non_blocking=True) for each in row) for row in queued
            ]
            chances = None if probabilities is None else probabilities.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return self._waited(done, host, chances)

    def _one_by_one(self, latents: Tensor, probabilities: Tensor | None, decode: bool) -> Iterator[Decoded]:
        for number, latent in enumerate(latents):
            row = tuple(None if each is None else each.cpu() for each in self._row(latent, decode))
            yield _decoded(row, None if probabilities is None else probabilities[number])

    @staticmethod
    def _waited(done: torch.cuda.Event, host: list, chances: Tensor | None) -> Iterator[Decoded]:
        done.synchronize()
        for number, row in enumerate(host):
            yield _decoded(row, None if chances is None else chances[number])

    @torch.no_grad()
    def _row(self, latent: Tensor, decode: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """latent, is everything finite, volume; all on the device."""
        finite = latent.isfinite().all()
        if not decode or (latent.device.type == "cpu" and not finite):
            return latent, finite, None
        assert self._autoencoder is not None
        dtype = next(self._autoencoder.parameters()).dtype
        images = []
        with out_of_memory("decoding"):
            for part, factor in zip(latent.split(self._channels), self._scale, strict=True):
                image = self._autoencoder.decode((part[None] / factor).to(dtype))[0, 0].float()
                finite = finite & image.isfinite().all()
                images.append(image.clamp(0, 1))
        return latent, finite, torch.stack(images)


def _decoded(row: tuple, probabilities: Tensor | None) -> Decoded:
    latent, finite, volume = row
    chances = None if probabilities is None else probabilities.tolist()
    known = chances is None or all(chance == chance for chance in chances)  # NaN is not itself
    return Decoded(volume, latent, chances, bool(finite) and known)
