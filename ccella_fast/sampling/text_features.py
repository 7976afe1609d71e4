"""Text features of reports and of the null report, in the form that the model takes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.data.checking.text import language_of
from ccella_fast.errors import ConfigError
from ccella_fast.sampling.request import Request

logger = logging.getLogger("ccella_fast")
_KEPT_BYTES = 64 << 20  # of given features that are kept, where they are, to be recognized in the next request
_UNKNOWN_SHARE = 0.05  # of the tokens of a report, from which on a warning is due


class _Given(NamedTuple):
    """Features that a request gave, a copy of them if they are kept, and in the form that the model takes."""

    original: Tensor
    features: Tensor
    identities: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """The text features of a request.

    Attributes:
        features: (U, L, E) fp32, the distinct reports; None without reports.
        rows: the row in `features` of each report of the request; empty without reports.
        identities: what distinguishes the rows: the text, or a hash of given features.
        null: (1, L, E), the null report; None without guidance.
        encoder: the encoder's identity; None for given features.
    """

    features: Tensor | None = None
    rows: tuple[int, ...] = ()
    identities: tuple[str, ...] = ()
    null: Tensor | None = None
    encoder: Any = None

    def features_of(self, row: int | str) -> Tensor | None:
        """The features (1, L, E) of a row, or of "null"; None without reports."""
        if isinstance(row, str):
            return self.null
        return None if self.features is None else self.features[row : row + 1]


class TextFeatureCache:
    """Encodes the reports of requests and keeps the features of the last request.

    Args:
        config: the sampler's configuration.
        encoder: an object with `encode(reports).features` and `identity`. None: the configured encoder, loaded when a new
            report must be encoded and released afterwards, because it may be larger than the model.
        checks_length: whether the number of text positions must be that of the configuration, which then is the one that the
            model was trained with.
    """

    def __init__(self, config: Config, encoder: Any, *, checks_length: bool):
        self._config, self._encoder, self._checks_length = config, encoder, checks_length
        self._encoded: dict[tuple[str, bool], Tensor] = {}  # by (report, encoded alone)
        self._given: _Given | None = None

    def features_for(self, request: Request, *, guided: bool) -> PromptFeatures:
        """The text features of a request; if `guided`, with those of the null report.

        Raises:
            ConfigError: the features do not have the form that the model was trained with, or guidance is requested without a
                report.
        """
        if request.text is not None:
            given = self._given_features(request.text)
            null = self._null_features_like(given.features, request) if guided else None
            return PromptFeatures(given.features, tuple(range(len(given.features))), given.identities, null)
        if request.reports is None:
            if guided and not self._config.training.class_dropout:
                why = f"guidance needs a report, and {self._config.model.variant} does not take one"
                raise ConfigError(why, field="guidance_scale", fix="use 1, which disables guidance")
            return PromptFeatures()
        reports = [report if report.strip() else "" for report in request.reports]
        if "" in reports:
            blank = reports.count("")
            which = f"report {reports.index('') + 1} is" if blank == 1 else f"{blank} of {len(reports)} reports are"
            logger.warning("%s missing or blank: the null report is used", which)
        _warn_of_languages(reports)
        encoder = self._encoder or _LazyTextEncoder(self._config)
        distinct = tuple(dict.fromkeys(reports))
        null = self._null_features(request, encoder) if guided else None
        features = self._encode(distinct, encoder, alone=request.batch_invariant, numbers=reports)
        rows = tuple(distinct.index(report) for report in reports)
        return PromptFeatures(features, rows, distinct, null, encoder.identity)

    def _given_features(self, text: Any) -> _Given:
        """Features that a request gives, checked and hashed.

        They are compared with those of the last request first. Equal ones, as in a loop over seeds, cost no copy to the host.
        """
        original, last = _as_tensor(text, "text"), self._given
        comparable = last is not None and (original.device, original.dtype) == (
            last.original.device,
            last.original.dtype,
        )
        if last is not None and comparable and torch.equal(original, last.original):
            return last
        self._given = None
        kept = original.nbytes <= _KEPT_BYTES
        if kept:
            original = original.clone()  # the caller may change its own
        features = self._check_features(original, "text")
        on_host = features.to("cpu", copy=not kept)
        # + 0.0 turns -0.0, which is equal to 0.0, into it: equal features have one hash.
        identities = tuple(hashlib.sha256((row + 0.0).numpy().tobytes()).hexdigest() for row in on_host)
        if not kept:
            return _Given(original, on_host, identities)
        given = self._given = _Given(original, features, identities)
        return given

    def _null_features(self, request: Request, encoder: Any) -> Tensor:
        if request.null_text is None:
            return self._encode([""], encoder, alone=True)
        null = self._check_features(request.null_text, "null_text").clone()  # the caller may change its own
        if len(null) != 1:
            why = f"null_text must hold the features of one report, got {len(null)}"
            raise ConfigError(why, field="null_text", fix="give features of shape (1, L, E)")
        return null

    def _null_features_like(self, features: Tensor, request: Request) -> Tensor:
        """The null report's features for a request with given features, of the same length."""
        try:
            null = self._null_features(request, self._encoder or _LazyTextEncoder(self._config))
        except ConfigError as bad:
            fix = "give null_text=, the features of the empty report"
            raise ConfigError(bad.why, path=bad.path, field="null_text", fix=fix) from None
        if null.shape[1] != features.shape[1]:
            why = f"the null report has {null.shape[1]} positions, but the text has {features.shape[1]}"
            raise ConfigError(why, field="null_text", fix="encode both with the same number of positions")
        return null

    def _encode(
        self, reports: Sequence[str], encoder: Any, *, alone: bool, numbers: Sequence[str] | None = None
    ) -> Tensor:
        """The features of each report.

        Args:
            reports: distinct texts.
            encoder: the text encoder.
            alone: one call per report, so that its bits do not depend on the other reports.
            numbers: the reports as the request gives them, by whose positions messages name a report.
        """
        missing = [report for report in reports if (report, alone) not in self._encoded]
        for batch in [[report] for report in missing] if alone else [missing] if missing else []:
            encoding = encoder.encode(batch)
            features = self._check_features(encoding.features, "text.encoder").cpu()
            self._encoded |= {(report, alone): row[None] for report, row in zip(batch, features, strict=True)}
            for position, report in enumerate(batch):
                self._warn_of_losses(encoding, position, list(numbers or reports).index(report) + 1)
        self._encoded = {key: row for key, row in self._encoded.items() if key[0] in (*reports, "")}
        return torch.cat([self._encoded[report, alone] for report in reports])

    def _warn_of_losses(self, encoding: Any, position: int, number: int) -> None:
        """Warn of what the encoder did not read of report `number`, without its text."""
        length = self._config.text.max_length
        if any(encoding.truncated[position : position + 1]):
            lost = getattr(encoding, "lost", None)
            count = f"its first {lost[position]} tokens are" if lost else "its beginning is"
            logger.warning("report %d is longer than %d tokens: %s cut off", number, length, count)
        unknown = getattr(encoding, "unknown", None)
        if unknown and unknown[position] >= _UNKNOWN_SHARE:
            why = "%.0f %% of the tokens of report %d are unknown to the tokenizer of %s: is it in another language?"
            logger.warning(why, 100 * unknown[position], number, self._config.text.encoder)

    def _check_features(self, text: Any, field: str) -> Tensor:
        """Text features as fp32 (n, L, E).

        Raises:
            ConfigError: they are not an array of numbers, not finite, or of another form than in training.
        """
        features = _as_tensor(text, field).float()
        features = features[None] if features.ndim == 2 else features
        width, length = self._config.model.input_dim, self._config.text.max_length
        fix = "use the encoder that the model was trained with"
        if features.ndim != 3 or not features.numel():
            why = f"text features must have the shape (n, positions, {width}), got {tuple(features.shape)}"
            raise ConfigError(why, field=field, fix=f"give features of shape (n, positions, {width})")
        if features.shape[2] != width:
            why = f"the width of the text features must be {width}, as the model was trained, got {features.shape[2]}"
            raise ConfigError(why, field=field, fix=fix)
        if self._checks_length and features.shape[1] != length:
            why = f"the text features have {features.shape[1]} positions, but the model was trained with {length}"
            raise ConfigError(why, field=field, fix=f"{fix}, padded to text.max_length")
        if not bool(features.isfinite().all()):
            raise ConfigError("the text features are not finite", field=field, fix="encode in fp32 or bf16")
        return features


def _as_tensor(text: Any, field: str) -> Tensor:
    """Text features as a tensor without a gradient, which shares their memory where it can."""
    try:
        features = torch.as_tensor(text).detach()
    except (TypeError, ValueError, RuntimeError):
        features = None
    if features is None or features.layout != torch.strided or features.is_complex():
        why = f"text features must be a dense tensor or array of real numbers, got a {type(text).__name__}"
        fix = "stack several reports in one tensor (torch.stack), or give a contiguous float32 array"
        raise ConfigError(why, field=field, fix=fix)
    return features


def _warn_of_languages(reports: Sequence[str]) -> None:
    """Warn of reports that seem not to be English: nothing about the words of training reports is kept with a checkpoint."""
    numbers: dict[str, list[int]] = {}
    for report in dict.fromkeys(reports):
        language = language_of(report)
        if language not in (None, "English"):
            numbers.setdefault(str(language), []).append(reports.index(report) + 1)
    for language, those in numbers.items():
        which = f"report {those[0]} seems" if len(those) == 1 else f"{len(those)} reports (first: {those[0]}) seem"
        how = language if language.startswith("not ") else f"in {language}"
        why = (
            "the volumes follow it only if the model was trained on reports like that, which a checkpoint does not say"
        )
        logger.warning("%s to be %s: %s", which, how, why)


class _LazyTextEncoder:
    """The configured encoder, loaded on first use and released with this object."""

    def __init__(self, config: Config):
        self._config, self._loaded = config.text, None  # type: Any, Any

    def _load(self) -> Any:
        if self._loaded is None:
            from ccella_fast.data.text_encoder import TextEncoder

            self._loaded = TextEncoder(self._config)
        return self._loaded

    def encode(self, reports: list[str]) -> Any:
        return self._load().encode(reports)

    @property
    def identity(self) -> Any:
        return self._load().identity
