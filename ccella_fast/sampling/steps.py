"""One denoising step: conditioning, network, guidance, solver; and what of it is captured in a CUDA graph.

Which kind a step is (guided or not, whole or with a reused feature) is known before the loop. Each kind is a fixed sequence of
kernels over tensors that keep their addresses; the position in the plan is read on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.diffusion.loop import Walk
from ccella_fast.errors import ConfigError
from ccella_fast.models import Conditioning, Denoiser
from ccella_fast.models.feature_reuse import check_depth, denoise_keeping, denoise_reusing
from ccella_fast.models.unet3d import UNet3d
from ccella_fast.sampling.hoist import ConditioningSource


@dataclass(frozen=True)
class Reuse:
    """Feature reuse: of `interval` steps one is whole, the others compute only the outermost `depth` blocks of the up path.

    An approximation (`models.feature_reuse`): measure its error beside its gain on your model."""

    interval: int = 3
    depth: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"an interval of {self.interval}", field="reuse.interval", fix="use 1 or more")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): null + scale (conditional - null), where null is the
    prediction for the null report. interval: only at timesteps between these fractions of the schedule (Kynkaanniemi et al.
    2024, arXiv 2404.07724); outside it a step costs no more than without guidance."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            fix = "give two fractions of the schedule, such as 0.1 0.7"
            raise ConfigError(f"{list(self.interval)} is no interval", field="guidance_interval", fix=fix)
        if not 0 <= self.scale < 1e3:
            raise ConfigError(
                f"a guidance scale of {self.scale}", field="guidance_scale", fix="use 1 (off) to about 10"
            )

    @property
    def on(self) -> bool:
        return self.scale != 1


class Kind(NamedTuple):
    guided: bool
    feature: str  # "": nothing is kept; "keep": computed whole and kept; "reuse": the kept one is used


def step_kinds(timesteps: Sequence[float], total: int, guidance: Guidance, reuse: Reuse | None) -> list[Kind]:
    """The kind of each evaluation. total: the schedule's length. A change of guidance makes a key step: rows come or go."""
    low, high = (edge * total for edge in guidance.interval)
    kinds: list[Kind] = []
    since = 0
    for t in timesteps:
        guided = guidance.on and low <= t <= high
        if reuse is None:
            kinds.append(Kind(guided, ""))
            continue
        fresh = not kinds or kinds[-1].guided != guided or since >= reuse.interval
        kinds.append(Kind(guided, "keep" if fresh else "reuse"))
        since = 1 if fresh else since + 1
    return kinds


class Network:
    """The prediction at the next evaluation of a trajectory, one method call a kind of step."""

    def __init__(
        self,
        model: Denoiser,
        source: ConditioningSource,
        index: Tensor,
        guidance: Guidance,
        reuse: Reuse | None,
        *,
        compiled: bool = False,
    ):
        self._source, self._index, self._guidance = source, index, guidance
        self._depth = 0 if reuse is None else reuse.depth
        self._features: dict[bool, Tensor] = {}  # by guided: with guidance there are twice the rows
        unet: Any = getattr(model, "unet", model)
        assert isinstance(unet, UNet3d)
        if reuse is not None:
            check_depth(unet, reuse.depth)
        # dynamic=False: every shape is compiled for itself.
        wrap: Callable = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._unet = unet
        self._whole, self._keeping, self._reusing = wrap(unet.denoise), wrap(denoise_keeping), wrap(denoise_reusing)

    def predict(self, x: Tensor, kind: Kind) -> Tensor:
        """x (B, C, X, Y, Z) -> the prediction in fp32. The source's rows: one for all, or the B conditional ones and then, if
        the run is guided anywhere, the B of the null report."""
        conditioning = self._source.at(self._index)
        if not kind.guided:
            return self._call(x, _rows(conditioning, len(x)), kind).float()
        both = self._call(torch.cat([x, x]), conditioning, kind).float()
        conditional, null = both.chunk(2)
        return null + self._guidance.scale * (conditional - null)

    def _call(self, x: Tensor, conditioning: Conditioning, kind: Kind) -> Tensor:
        if kind.feature == "":
            return self._whole(x, conditioning)
        if kind.feature == "reuse":
            return self._reusing(self._unet, x, conditioning, self._depth, self._features[kind.guided])
        noise, feature = self._keeping(self._unet, x, conditioning, self._depth)
        if kind.guided not in self._features:
            self._features[kind.guided] = torch.empty_like(feature)  # memory that no graph owns
        self._features[kind.guided].copy_(feature)
        return noise


def _rows(conditioning: Conditioning, count: int) -> Conditioning:
    """Of the rows there are, the first `count`; a single row serves all."""

    def take(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 else tensor[:count]

    pairs = tuple((take(keys), take(values)) for keys, values in conditioning.keys_values)
    return Conditioning(tuple(map(take, conditioning.shifts)), pairs, None)


Replay = Callable[[], None]


class Steps:
    """Takes step after step of a trajectory.

    capture(step) -> replay: how a step is recorded; None: every step is executed. The first step of a kind is always executed,
    which readies libraries and tuners, the second is captured without being executed, and from then on it is replayed."""

    def __init__(
        self,
        walk: Walk,
        network: Network,
        source: ConditioningSource,
        kinds: Sequence[Kind],
        capture: Callable[[Replay], Replay] | None = None,
    ):
        self._walk, self._network, self._source, self._kinds, self._capture = walk, network, source, kinds, capture
        self._executed: set[Kind] = set()
        self._replays: dict[Kind, Replay] = {}

    def advance(self, i: int) -> None:
        kind = self._kinds[i]
        self._source.prepare(i)

        def step() -> None:
            self._walk.advance(lambda x, t: self._network.predict(x, kind))

        if self._capture is None or kind not in self._executed:
            step()
            self._executed.add(kind)
            return
        if kind not in self._replays:
            self._replays[kind] = self._capture(step)
        self._replays[kind]()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device, because cuBLAS keeps a workspace for each stream. PyTorch's own belongs to whichever GPU came first."""
    return torch.cuda.Stream(device)


class CudaCapture:
    """Records a step on `device` in a CUDA graph. The graphs of one loop are replayed one after the other and share their
    memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the decoder's stream may be busy meanwhile.
        recorded = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._stream.device), recorded:
            step()
        return graph.replay
