"""A viewer of volumes, slice by slice, inside a page: NiiVue, embedded whole, so that nothing is loaded.

NiiVue (BSD-2-Clause) draws NIfTI volumes with WebGL 2. The package `ipyniivue` contains the stand-alone module that NiiVue
writes into pages of its own ("save as HTML"), URI-encoded as a constant of its widget. The package is read, not imported.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ccella_fast.optional import install

_PACKAGE, _BUNDLE = "ipyniivue", "ipyniivue/static/widget.js"
_ENCODED = re.compile(r"[A-Za-z0-9_.!~*'()%-]{100000,}")  # what encodeURIComponent leaves, and much of it
_EXPORTS = re.compile(r"export\s*\{[^}]*\bNVImage\b[^}]*\bNiivue\b[^}]*\}")
_MAX_BYTES = 12e6  # of all embedded volumes
_INSTALL = install(_PACKAGE)
ABSENT = f"Volumes can be looked at slice by slice with the extra “viewer”: {_INSTALL}, then write the page again."
UNKNOWN = f"The installed ipyniivue does not contain the viewer in a known form: {_INSTALL}, then write the page again."


class ViewedVolume(NamedTuple):
    """A volume to view. title: above it. path: its `.nii.gz` file."""

    title: str
    path: Path


class ViewedCase(NamedTuple):
    """Volumes that are shown next to each other. title: in the list of cases."""

    title: str
    volumes: list[ViewedVolume]


class Viewer(NamedTuple):
    """What a page embeds.

    Attributes:
        cases: JSON for the element `viewer-volumes`.
        columns: how many volumes are next to each other.
        script: the module.
        policy: the source of scripts that the page's Content-Security-Policy allows: this script alone, by its hash.
    """

    cases: str
    columns: int
    script: str
    policy: str


def make_viewer(cases: Sequence[ViewedCase]) -> Viewer | str:
    """The viewer of these cases, which have equally many volumes each, or a sentence that says why there is none.

    Cases beyond 12 MB are left out.
    """
    module = _niivue()
    if module is None:
        return ABSENT
    if not _EXPORTS.search(module):
        return UNKNOWN
    embedded: list[dict[str, object]] = []
    size = 0
    for case in cases:
        data = [base64.b64encode(volume.path.read_bytes()).decode() for volume in case.volumes]
        size += sum(map(len, data))
        if embedded and size > _MAX_BYTES:
            break
        volumes = [{"title": volume.title, "data": each} for volume, each in zip(case.volumes, data, strict=True)]
        embedded.append({"title": case.title, "volumes": volumes})
    script = _safe(f"/*\n{_license()}\n*/\n{module}\n{_SCRIPT}")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Viewer(_json(embedded), len(cases[0].volumes), script, f"'sha256-{digest}'")


@functools.cache
def _niivue() -> str | None:
    """The stand-alone module, "" if the package does not contain it, None without the package."""
    try:
        file = Path(str(distribution(_PACKAGE).locate_file(_BUNDLE)))
    except PackageNotFoundError:
        return None
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return unquote(max(_ENCODED.findall(text), key=len, default=""))


def _license() -> str:
    found = distribution(_PACKAGE)
    texts = [str(file.read_text()) for file in found.files or () if file.name.startswith("LICENSE")]
    return f"NiiVue, from ipyniivue {found.version}\n\n{texts[0] if texts else 'BSD-2-Clause'}".replace("*/", "")


def _safe(script: str) -> str:
    """The script as an HTML element may contain it. What is replaced can only be in texts, where it means the same."""
    script = re.sub(r"</(script)", r"<\\/\1", script.replace("<!--", "<\\!--"), flags=re.IGNORECASE)
    return script.replace("\r\n", "\n").replace("\r", "\n")  # as an HTML parser does, before the hash is checked


def _json(value: object) -> str:
    return json.dumps(value).replace("<", "\\u003c")


# `Niivue` and `NVImage` are those of the module that this is appended to. The mouse acts on the figure and not on NiiVue's
# canvases, so that all volumes stay at one slice and in one window, and the page scrolls unless the figure has been clicked.
_SCRIPT = """
{
const figure = document.getElementById("viewer"), notice = document.getElementById("viewer-notice");
const cases = JSON.parse(document.getElementById("viewer-volumes").textContent);
const [choice, plane, slider] = ["case", "plane", "slice"].map((name) => document.getElementById(`viewer-${name}`));
const place = document.getElementById("viewer-place");
const panes = [...figure.querySelectorAll(".pane")];
const AXES = {axial: 2, coronal: 1, sagittal: 0};
const LETTERS = {axial: "RLAP", coronal: "RLSI", sagittal: "APSI"};
const views = [], images = new Map();

function image({title, data}) {
  if (!images.has(data)) {
    images.set(data, NVImage.loadFromBase64({base64: data, name: `${title}.nii.gz`, cal_min: 0, cal_max: 1}));
  }
  return images.get(data);
}

function draw() {
  const axis = AXES[plane.value], count = Number(slider.max) + 1, at = Number(slider.value);
  for (const view of views) {
    view.scene.crosshairPos[axis] = (at + 0.5) / count;  // the middle of the slice: nothing is interpolated between slices
    view.drawScene();
  }
  place.value = `slice ${at + 1} of ${count}`;
  figure.dataset.slice = at;
}

function turn() {
  const axis = AXES[plane.value], letters = LETTERS[plane.value];
  for (const [index, view] of views.entries()) {
    view.setSliceType({axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL, sagittal: SLICE_TYPE.SAGITTAL}[plane.value]);
    panes[index].querySelectorAll(".letter").forEach((element, side) => { element.textContent = letters[side]; });
  }
  slider.max = Math.max(...views.map((view) => view.volumes[0].dimsRAS[axis + 1])) - 1;
  slider.value = Math.floor((Number(slider.max) + 1) / 2);
  draw();
}

async function show() {
  const chosen = cases[Number(choice.value)];
  for (const [index, view] of views.entries()) {
    const loaded = await image(chosen.volumes[index]);
    panes[index].querySelector("figcaption").textContent = chosen.volumes[index].title;
    if (view.volumes.length) view.removeVolume(view.volumes[0]);
    view.addVolume(loaded);
  }
  turn();
}

if (document.createElement("canvas").getContext("webgl2")) {
  figure.hidden = false;
  for (const pane of panes) {
    const view = new Niivue({
      isRadiologicalConvention: true, sagittalNoseLeft: true, crosshairWidth: 0, isOrientationTextVisible: false,
      backColor: [0, 0, 0, 1], dragAndDropEnabled: false, loadingText: "", logLevel: "error",
    });
    await view.attachToCanvas(pane.querySelector("canvas"), false);
    views.push(view);
  }
  for (const [index, each] of cases.entries()) choice.add(new Option(each.title, index));
  await show();
  choice.addEventListener("change", show);
  plane.addEventListener("change", turn);
  slider.addEventListener("input", draw);
  figure.addEventListener("wheel", (event) => {
    if (!figure.contains(document.activeElement)) return;
    event.preventDefault();
    slider.value = Number(slider.value) + Math.sign(event.deltaY);
    draw();
  }, {passive: false});
  notice.hidden = true;
  figure.dataset.ready = "yes";
}
}
"""
