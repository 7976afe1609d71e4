"""Retrieval of reports by volumes and of volumes by reports, in the common space of a text-image model that the user brings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from ccella_fast.errors import DataError
from ccella_fast.evaluation.statistics import feature_pair, share_interval

CANDIDATES_PER_K = 10  # with fewer, chance alone retrieves more than a tenth
_KINDS = ("report", "synthetic", "real")


class Embeddings(NamedTuple):
    """Vectors of a text-image model that the user has computed.

    Attributes:
        reports: name of the report -> its vector.
        synthetic: id of the generated volume -> its vector.
        real: id of the real volume -> its vector; the report of the same name is its own.
    """

    reports: dict[str, np.ndarray]
    synthetic: dict[str, np.ndarray]
    real: dict[str, np.ndarray]

    def of_pairs(
        self, prompts: Mapping[str, str | None], kind: Literal["synthetic", "real"]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The arguments of `text_image_retrieval`: all reports are candidates.

        Args:
            prompts: id of a volume -> name of its report.
            kind: of the volumes.

        Raises:
            DataError: no volume and its report have vectors.
        """
        vectors, place = getattr(self, kind), {name: row for row, name in enumerate(self.reports)}
        chosen = [(case, place[prompt]) for case, prompt in prompts.items() if case in vectors and prompt in place]
        if not chosen:
            why = f"no {kind} volume has a vector together with its report"
            fix = f"name the vectors {kind}/ID and report/NAME, with the ids and report names of samples.csv"
            raise DataError(why, field="--embeddings", fix=fix)
        images = np.stack([vectors[case] for case, _ in chosen])
        return images, np.stack(list(self.reports.values())), [row for _, row in chosen]


def read_embeddings(path: str | Path) -> Embeddings:
    """Read a safetensors file with the vectors `report/NAME`, `synthetic/ID` and, if wanted, `real/ID`, all of one length.

    They may have any floating-point type, such as bfloat16, and are returned in float64.

    Raises:
        DataError: the file is missing, damaged, or has other tensors; a vector is zero or not finite.
    """
    path = Path(path)
    fix = "write it with safetensors.numpy.save_file: report/NAME, synthetic/ID and real/ID, each a vector"
    try:
        vectors = load_file(path)
    except (OSError, SafetensorError):
        why = "this file of embeddings is missing or is no complete safetensors file"
        raise DataError(why, path=path, field="--embeddings", fix=fix) from None
    found: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in _KINDS}
    size = next((vector.numel() for vector in vectors.values()), 0)
    for name, vector in vectors.items():
        kind, _, rest = name.partition("/")
        if kind not in _KINDS or not rest or vector.shape != (size,) or not size or not vector.is_floating_point():
            why = (
                f"'{name:.60}' is not a vector of {size or 'some'} numbers called report/NAME, synthetic/ID or real/ID"
            )
            raise DataError(why, path=path, field="--embeddings", fix=fix)
        found[kind][rest] = values = vector.double().numpy()
        if not np.isfinite(values).all() or not values.any():
            why = f"the vector '{name:.60}' is {'zero' if np.isfinite(values).all() else 'not finite'}"
            raise DataError(why, path=path, field="--embeddings", fix="compute it again, or leave it out")
    if not found["report"] or not found["synthetic"]:
        why = "this file needs vectors of reports and of generated volumes"
        raise DataError(why, path=path, field="--embeddings", fix=fix)
    return Embeddings(found["report"], found["synthetic"], found["real"])


class Retrieval(NamedTuple):
    """Recall at K: how often what belongs together is among the K most similar candidates.

    Attributes:
        k: K.
        image_to_text: share of the volumes whose report is among the K most similar reports; None below 10 K reports.
        image_to_text_ci95: interval of this share.
        text_to_image: share of the reports of which a volume is among the K most similar volumes; None below 10 K volumes.
        text_to_image_ci95: interval of this share.
        chance: of `image_to_text` without any relation.
        texts: number of reports.
        images: number of volumes.
        guards: "few_candidates" where a share is None for that reason, "few" below 20 reports.
    """

    k: int
    image_to_text: float | None
    image_to_text_ci95: tuple[float, float] | None
    text_to_image: float | None
    text_to_image_ci95: tuple[float, float] | None
    chance: float
    texts: int
    images: int
    guards: list[str]


def text_image_retrieval(
    images: Any, texts: Any, match: Sequence[int] | None = None, ks: Sequence[int] = (1, 5, 10)
) -> list[Retrieval]:
    """Recall at each K by cosine similarity. Equal similarities count with the probability of their random order.

    Args:
        images: (n, e) embeddings of generated volumes.
        texts: (m, e) embeddings of different reports.
        match: for each volume, the row of the report that prompted it. Default: row by row.
        ks: the values of K.

    Raises:
        DataError: the embeddings are not finite, one is zero, or the rows do not belong together.
    """
    images, texts = feature_pair(images, texts, ("image", "text"), 1)
    rows = np.arange(len(images)) if match is None else np.asarray(match)
    if rows.shape != (len(images),) or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(texts):
        why = f"each of the {len(images)} volumes needs the row of its report, from 0 to {len(texts) - 1}"
        raise DataError(why, field="match")
    units = []
    for matrix, name in ((images, "image"), (texts, "text")):
        largest = np.abs(matrix).max(axis=1, keepdims=True)
        if not largest.all():
            raise DataError(f"row {int(np.argmin(largest))} of the {name} embeddings is zero", field=name)
        matrix = matrix / largest  # so that squares neither overflow nor underflow
        units.append(matrix / np.linalg.norm(matrix, axis=1, keepdims=True))
    similarity = np.round(units[0] @ units[1].T, 12)  # equal embeddings give equal values
    belongs = rows[:, None] == np.arange(len(texts))
    asked = belongs.any(0)
    results = []
    for k in ks:
        by_image = _recall(similarity, belongs, k) if len(texts) >= CANDIDATES_PER_K * k else None
        by_text = _recall(similarity.T[asked], belongs.T[asked], k) if len(images) >= CANDIDATES_PER_K * k else None
        guards = ["few_candidates"] if by_image is None or by_text is None else []
        results.append(
            Retrieval(
                k, *_with_interval(by_image), *_with_interval(by_text), min(1.0, k / len(texts)), len(texts), len(images),
                guards + (["few"] if len(texts) < 20 else []),
            )
        )  # fmt: skip
    return results


def _recall(similarity: np.ndarray, belongs: np.ndarray, k: int) -> np.ndarray:
    """For each row, the probability that one of the candidates that belong to it is among the first k."""
    hits = []
    for values, right in zip(similarity, belongs, strict=True):
        best = values[right].max()
        slots = k - int((values > best).sum())  # for the candidates that are as similar as the best right one
        tied, wrong = int((values == best).sum()), int((values[~right] == best).sum())
        hits.append(0.0 if slots <= 0 else 1 - math.comb(wrong, min(slots, tied)) / math.comb(tied, min(slots, tied)))
    return np.array(hits)


def _with_interval(hits: np.ndarray | None) -> tuple[float | None, tuple[float, float] | None]:
    if hits is None:
        return None, None
    return float(hits.mean()), share_interval(hits.sum(), len(hits))
