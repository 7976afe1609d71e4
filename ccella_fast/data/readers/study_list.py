"""Read the manifest of the reference implementation: a JSON list of studies with images, or with latents and text features.

The class is one-hot ([1, 0]: PI-RADS 1-2, [0, 1]: PI-RADS 3-5) or null if it is unknown. `text` is the report, or the name of
a `.npy` file of text features. `text_isnull` is 1 where there is no report. `split` replaces the split of the list. Further
keys are the user's own and ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from ccella_fast.data.manifest import Split
from ccella_fast.data.readers.links import join_series
from ccella_fast.data.readers.pointers import check_is_data
from ccella_fast.data.readers.study import Defects, Study
from ccella_fast.data.readers.text_checks import (
    MAX_STUDIES,
    check_file_size,
    check_id,
    check_known,
    check_tag,
    clean_report,
    printable,
    quote,
)
from ccella_fast.errors import DataError
from ccella_fast.pirads import NEGATIVE, POSITIVE
from ccella_fast.storage import read_json, safe_join

_SEQUENCES = {"axt2": "t2w", "b1600": "hbv", "adc": "adc"}
_MAX_COMMAS = 5 * 10**6
_KEYS = {*_SEQUENCES, "dataset", "folder", "pirads", "spacing", "split", "text", "text_isnull"}


def read_study_list(
    path: Path, split: Split, images: Path, embeddings: Path | None, follow_links: bool, defects: Defects
) -> list[Study]:
    """The studies of the manifest `path`.

    Args:
        path: The JSON file.
        split: Split of the studies that do not have one of their own. A list of test studies holds no others.
        images: Folder that the paths of images are relative to.
        embeddings: Folder of prepared latents and text features, if there are any.
        follow_links: Whether images may be links to places outside `images`.
        defects: Collects what is wrong with single entries.
    """
    check_is_data(path)
    if path.is_file():
        check_file_size(path)
        if path.read_bytes().count(b",") > _MAX_COMMAS:  # before its values take fifty times the memory of the file
            why = f"this list has more than {_MAX_COMMAS} values"
            raise DataError(why, path=path, fix="check that this is the right file")
    entries = read_json(path)
    if not isinstance(entries, list):
        fix = "start the file with [ (a prepared folder is not given to `prepare` again)"
        raise DataError("a manifest must be a JSON list of objects", path=path, fix=fix)
    if len(entries) > MAX_STUDIES:
        why = f"this list has {len(entries)} entries, but at most {MAX_STUDIES} are read"
        raise DataError(why, path=path, fix="check that this is the right file")
    studies = []
    for index, entry in enumerate(entries):
        try:
            studies.append(_Entry(path, index, entry).study(split, images, embeddings, follow_links))
        except DataError as defect:
            defects.add(defect)
    return studies


class _Entry:
    """One entry of the list, and its place for error messages."""

    def __init__(self, path: Path, index: int, values: Any):
        self.path, self.index, self.values = path, index, values

    def field(self, key: str) -> str:
        return f"[{self.index}].{key}"

    def require(self, is_valid: bool, key: str, why: str, fix: str) -> None:
        if not is_valid:
            raise DataError(why, path=self.path, field=self.field(key), fix=fix)

    def check(self, split: Split) -> None:
        """Check the names and types of all keys."""
        values = self.values
        if not isinstance(values, dict):
            why, fix = "an entry must be a JSON object", 'write {"folder": ..., "axt2": ..., ...}'
            raise DataError(why, path=self.path, field=f"[{self.index}]", fix=fix)
        for key in values.keys() - _KEYS:
            check_known(key, _KEYS, values, path=self.path, field=self.field(printable(key)))
        for key in ("folder", "axt2"):
            is_text = isinstance(values.get(key), str) and values[key] != ""
            self.require(is_text, key, f"'{key}' must be a text that is not empty", "give it as text")
        for key in ("b1600", "adc", "dataset", "text"):
            is_text = isinstance(values.get(key), str | None)
            self.require(
                is_text, key, f"'{key}' must be text, got {quote(values.get(key))}", "give it as text or leave it out"
            )
        check_tag(values.get("dataset"), self.path, self.field("dataset"))
        pirads, spacing, is_null = values.get("pirads"), values.get("spacing"), values.get("text_isnull")
        is_class = (
            isinstance(pirads, list) and pirads in (NEGATIVE, POSITIVE) and not any(each is True for each in pirads)
        )
        why = f"the class must be one-hot or null, got {quote(pirads)}"
        fix = "write [1, 0] (PI-RADS 1-2), [0, 1] (PI-RADS 3-5) or null (unknown)"
        self.require(pirads is None or is_class, "pirads", why, fix)
        is_size = isinstance(spacing, list) and len(spacing) == 3 and all(map(_is_voxel_size, spacing))
        why = f"spacing must be three numbers between 0 and 100 mm, got {quote(spacing)}"
        self.require(spacing is None or is_size, "spacing", why, "write the voxel size in mm along x, y, z")
        is_flag = is_null is None or (is_null in (0, 1) and not isinstance(is_null, bool))
        splits = get_args(Split) if split != "test" else ("test",)
        why = f"split must be {' or '.join(splits)} in this list, got {quote(values.get('split'))}"
        self.require(values.get("split", split) in splits, "split", why, "correct it or leave it out")
        self.require(is_flag, "text_isnull", f"text_isnull must be 0 or 1, got {quote(is_null)}", "write 0 or 1")

    def study(self, split: Split, images: Path, embeddings: Path | None, follow_links: bool) -> Study:
        """Check the entry and return its study."""
        self.check(split)
        values = self.values
        study = Study(
            id=check_id(values["folder"].replace("/", "_"), self.path, self.field("folder")),
            files={
                name: join_series(images, values[key], follow_links=follow_links, path=self.path, field=self.field(key))
                for key, name in _SEQUENCES.items()
                if values.get(key)
            },
            split=values.get("split", split),
            dataset=values.get("dataset"),
            pirads=None if values.get("pirads") is None else [int(value) for value in values["pirads"]],
            spacing=values.get("spacing"),
            listed_in=self.path,
            field=f"[{self.index}]",
        )
        text, is_null = values.get("text") or "", values.get("text_isnull")
        if text.endswith(".npy"):
            return self.with_prepared_files(study, text, embeddings)
        is_blank = not text.strip()
        why = f"text_isnull is {is_null}, but 'text' is {'' if is_blank else 'not '}blank"
        self.require(is_null in (None, int(is_blank)), "text_isnull", why, "correct one of the two")
        return study._replace(report=clean_report(text, self.path, self.field("text")))

    def with_prepared_files(self, study: Study, text: str, embeddings: Path | None) -> Study:
        """`study` with the reference's text features, and with the latents that exist."""
        is_null = self.values.get("text_isnull")
        why = "'text' names a file of features, but --embedding_base_dir is not given"
        self.require(embeddings is not None, "text", why, "give --embedding_base_dir")
        assert embeddings is not None
        why = "text_isnull is required where 'text' names a file of features"
        self.require(is_null is not None, "text_isnull", why, "write 1 if the study has no report, else 0")
        latents = {
            name: self.join(embeddings, key, _latent_name(self.values[key]))
            for key, name in _SEQUENCES.items()
            if self.values.get(key)
        }
        text_file = self.join(embeddings, "text", _relative(text, embeddings))
        why, fix = f"the file '{printable(text)}' does not exist", f"put it below {embeddings}"
        self.require(text_file.is_file(), "text", why, fix)
        latents = {name: file for name, file in latents.items() if file.is_file()}
        return study._replace(text_file=text_file, text_isnull=is_null, latent_files=latents)

    def join(self, root: Path, key: str, name: str) -> Path:
        return safe_join(root, name, path=self.path, field=self.field(key))


def _is_voxel_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 100


def _latent_name(image: str) -> str:
    return image.removesuffix(".nii.gz").removesuffix(".nii") + "_emb.nii.gz"


def _relative(name: str, root: Path) -> str:
    """The reference writes full paths of text features; make those below `root` relative to it."""
    path = Path(name)
    return path.relative_to(root.absolute()).as_posix() if path.is_relative_to(root.absolute()) else name
