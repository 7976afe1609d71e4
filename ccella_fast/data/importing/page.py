"""`import.html`: the middle slices of the chosen series of every study and a table of all its series, to be looked at."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ccella_fast.data.importing.choices import plane_of
from ccella_fast.data.importing.sequence_choice import Judgement
from ccella_fast.data.importing.write import StudyTask, read_series
from ccella_fast.errors import DataError
from ccella_fast.report.figures import Panel, montage
from ccella_fast.report.page import FOOT, HEAD, render
from ccella_fast.storage import atomic_path

STUDIES_PER_PAGE = 100  # of some 200 kB each


class Picture(NamedTuple):
    """The chosen series of a study.

    Attributes:
        png: None if there is no series, or none that can be read.
        notes: What the readers say about them.
        defects: Why series cannot be read.
    """

    png: bytes | None
    notes: tuple[str, ...]
    defects: tuple[str, ...]


def draw_study(task: StudyTask) -> Picture:
    """Read the series of a study and draw their middle slices. The picture shows no id."""
    panels, notes, defects = [], [], []
    for sequence in task.series:
        try:
            volume = read_series(task, sequence)
        except DataError as error:
            defects.append(error.why)
            continue
        notes += [f"{sequence}: {note}" for note in volume.notes]
        low, high = np.percentile(volume.array, (0.5, 99.5))
        scaled = (volume.array - low) / max(high - low, 1e-6)
        panels.append(Panel(scaled, volume.spacing.tolist(), sequence))
    png = montage(panels, window=(0, 1)) if panels else None
    return Picture(png, tuple(notes), tuple(defects))


def write_pages(
    folder: Path,
    judged: Mapping[str, Sequence[Judgement]],
    pictures: Mapping[str, Picture],
    facts: Sequence[tuple[str, str]],
    notices: Sequence[str],
) -> Path:
    """Write `import.html`, and `import-2.html` ... for many studies; return the path of the first."""
    from markupsafe import Markup  # which jinja2 brings

    ids = sorted(judged)
    parts = [ids[start : start + STUDIES_PER_PAGE] for start in range(0, len(ids), STUDIES_PER_PAGE)] or [[]]
    names = ["import.html", *(f"import-{number}.html" for number in range(2, len(parts) + 1))]
    for name, part in zip(names, parts, strict=True):
        studies = [_study(study, judged[study], pictures[study]) for study in part]
        title = "Series chosen by ccella-fast import"
        page = render(
            _PAGE,
            title=title,
            subtitle=Markup(_ABOUT),
            names=names,
            studies=studies,
            facts=facts,
            notices=notices,
        )
        with atomic_path(folder / name) as temporary:
            temporary.write_text(page, encoding="utf-8")
    for left in set(folder.glob("import-*.html")) - {folder / name for name in names}:
        left.unlink()
    return folder / names[0]


def _study(study: str, judged: Sequence[Judgement], picture: Picture) -> dict[str, object]:
    rows = [
        {
            "series": each.volume.name,
            "use": each.use,
            "plane": plane_of(each),
            "slices": each.volume.slices,
            "reason": each.reason,
            "doubt": each.doubt if each.use else "",
        }
        for each in judged
    ]
    return {
        "id": study,
        "rows": rows,
        "missing": [name for name in ("t2w", "hbv", "adc") if name not in {each.use for each in judged}],
        "image": None if picture.png is None else base64.b64encode(picture.png).decode(),
        "notes": picture.defects + picture.notes,
    }


_ABOUT = """Check that each picture shows the prostate in the right sequence. To change a choice, edit the column
<b>use</b> of choices.csv (t2w, hbv, adc or empty) and run the command again; then run it with --write. This page shows no
names, dates or ids of the hospital, but text that is part of an image would be visible: look before you share it.
Pictures are middle slices, each series in a gray window of its own. R, L: the patient's right and left. Not for diagnosis."""
_PAGE = (
    HEAD
    + """
{% if names | length > 1 %}<p>{% for other in names %}<a href="{{ other }}">{{ other }}</a> {% endfor %}</p>{% endif %}
{% for study in studies %}
<h2>{{ study.id }}</h2>
{% if study.missing %}<p class="notice">Not found: {{ study.missing | join(", ") }}</p>{% endif %}
{% for note in study.notes %}<p class="notice">{{ note }}</p>
{% endfor %}
{% if study.image %}
<figure><img alt="Middle slices of the chosen series" src="data:image/png;base64,{{ study.image }}"></figure>
{% endif %}
<div class="scroll"><table>
<tr><th>series</th><th>use</th><th>plane</th><th>slices</th><th>reason</th></tr>
{% for row in study.rows %}
<tr{% if row.use %} class="used"{% endif %}><td>{{ row.series }}</td><td>{{ row.use }}</td><td>{{ row.plane }}</td>
<td>{{ row.slices }}</td>
<td>{{ row.reason }}{% if row.doubt %} <span class="doubt">look at it: {{ row.doubt }}</span>{% endif %}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
"""
    + FOOT
)
