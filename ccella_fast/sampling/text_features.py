"""Reports, or their features, as the model takes them; and the null report that guidance needs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.errors import ConfigError

if TYPE_CHECKING:
    from ccella_fast.sampling.request import Request

logger = logging.getLogger("ccella_fast")


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """features (U, L, E) fp32 on the CPU: the different reports. rows: for each report that was given, its row there; empty if
    there are none. identities: what tells the rows apart, the text itself or a hash of its features. null: (1, L, E) or None.
    encoder: the encoder's identity, None for features that were given."""

    features: Tensor | None = None
    rows: tuple[int, ...] = ()
    identities: tuple[str, ...] = ()
    null: Tensor | None = None
    encoder: Any = None

    def features_of(self, row: int | str) -> Tensor | None:
        """(1, L, E) of a row, or of "null"."""
        if isinstance(row, str):
            return self.null
        return None if self.features is None else self.features[row : row + 1]


class TextFeatureCache:
    """Encodes the reports of requests; the features of the last request are kept, so that asking again costs nothing.

    encoder: anything with `encode(reports).features` and `identity`; None: the configuration's, loaded when a new report comes
    and released after it has been encoded, because it may be larger than the model. checks_length: the configuration is the
    training's, so its number of text positions counts."""

    def __init__(self, config: Config, encoder: Any, *, checks_length: bool):
        self._config, self._encoder, self._checks_length = config, encoder, checks_length
        self._known: dict[tuple[str, bool], Tensor] = {}

    def of(self, request: Request, *, guided: bool) -> PromptFeatures:
        """Raises ConfigError for reports and features together, and for features that the model was not trained with."""
        if request.text is not None:
            if request.reports is not None:
                raise ConfigError("both reports and text are given", field="text", fix="give one of them")
            features = self._checked(request.text, "text")
            identities = tuple(hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in features)
            null = self._null_beside(request, features) if guided else None
            return PromptFeatures(features, tuple(range(len(features))), identities, null)
        if request.reports is None:
            if guided:
                why = f"{self._config.model.variant} has no report to be guided by"
                raise ConfigError(why, field="guidance_scale", fix="leave it at 1")
            return PromptFeatures()
        reports = request.reports
        if isinstance(reports, str) or len(reports) == 0 or not all(isinstance(report, str) for report in reports):
            raise ConfigError("reports is not a list of texts", field="reports", fix='write reports=["..."]')
        encoder = self._encoder or _LazyTextEncoder(self._config)
        different = tuple(dict.fromkeys(reports))
        null = self._null(request, encoder) if guided else None
        features = self._encode(different, encoder, alone=request.batch_invariant)
        rows = tuple(different.index(report) for report in reports)
        return PromptFeatures(features, rows, different, null, encoder.identity)

    def _null(self, request: Request, encoder: Any) -> Tensor:
        if request.null_text is None:
            return self._encode([""], encoder, alone=True)
        null = self._checked(request.null_text, "null_text")
        if len(null) != 1:
            raise ConfigError(f"{len(null)} null reports", field="null_text", fix="give the features of one")
        return null

    def _null_beside(self, request: Request, features: Tensor) -> Tensor:
        """The null report's features beside features that were given: from the encoder if there is one."""
        try:
            null = self._null(request, self._encoder or _LazyTextEncoder(self._config))
        except ConfigError as bad:
            fix = "give null_text=, the features of the empty report"
            raise ConfigError(bad.why, path=bad.path, field="null_text", fix=fix) from None
        if null.shape[1] != features.shape[1]:
            why = f"the null report has {null.shape[1]} positions, the text has {features.shape[1]}"
            raise ConfigError(why, field="null_text", fix="encode both alike")
        return null

    def _encode(self, reports: Sequence[str], encoder: Any, *, alone: bool) -> Tensor:
        """alone: one by one, so that the bits of a report's features do not depend on its company."""
        missing = [report for report in reports if (report, alone) not in self._known]
        for batch in [[report] for report in missing] if alone else [missing] if missing else []:
            encoded = encoder.encode(batch)
            features = self._checked(encoded.features, "text.encoder")
            self._known |= {(report, alone): row[None] for report, row in zip(batch, features, strict=True)}
            for report, cut in zip(batch, getattr(encoded, "truncated", ()), strict=False):
                if cut:
                    number, length = list(reports).index(report) + 1, self._config.text.max_length
                    logger.warning("report %d is longer than %d tokens: its beginning is cut", number, length)
        self._known = {key: row for key, row in self._known.items() if key[0] in (*reports, "")}
        return torch.cat([self._known[report, alone] for report in reports])

    def _checked(self, text: Any, field: str) -> Tensor:
        """Text features as fp32 (n, L, E) on the CPU; ConfigError when they are not what the model was trained with."""
        features = torch.as_tensor(text).float().cpu()
        features = features[None] if features.ndim == 2 else features
        width, length = self._config.model.input_dim, self._config.text.max_length
        fix = "use the encoder that the model was trained with"
        if features.ndim != 3 or not features.numel():
            why = f"text features of shape {tuple(features.shape)}"
            raise ConfigError(why, field=field, fix=f"give (n, positions, {width})")
        if features.shape[2] != width:
            why = f"the text features are {features.shape[2]} wide, the model takes {width}"
            raise ConfigError(why, field=field, fix=fix)
        if self._checks_length and features.shape[1] != length:
            why = f"the text features have {features.shape[1]} positions, the model was trained with {length}"
            raise ConfigError(why, field=field, fix=f"{fix}, padded to text.max_length")
        if not bool(features.isfinite().all()):
            raise ConfigError("the text features are not finite", field=field, fix="encode in fp32 or bf16")
        return features


class _LazyTextEncoder:
    """The configuration's encoder, made when it is first needed and forgotten with this object."""

    def __init__(self, config: Config):
        self._config, self._made = config.text, None  # type: Any, Any

    def _make(self) -> Any:
        if self._made is None:
            from ccella_fast.data.text_encoder import TextEncoder

            self._made = TextEncoder(self._config)
        return self._made

    def encode(self, reports: list[str]) -> Any:
        return self._make().encode(reports)

    @property
    def identity(self) -> Any:
        return self._make().identity
