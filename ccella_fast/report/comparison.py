"""The page of a comparison: the answers, the table of variants, distances, accuracies, and volumes side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.data.manifest import load_manifest
from ccella_fast.report.figures import COLORS, Panel, montage, png
from ccella_fast.report.page import FIGURES, FOOT, HEAD, render
from ccella_fast.storage import atomic_path

PAGE = "report.html"
_TEMPLATE = (
    HEAD
    + FIGURES
    + """
<div class="verdicts">
{% for each in statements %}
<section class="verdict {{ each.answer }}">
<h3>{{ each.question }}</h3>
<b>{{ each.answer | capitalize }}</b>
<p>{{ each.sentence }}</p>
{% if each.p_holm is none %}<ul><li>exploratory: not adjusted for the number of questions</li></ul>{% endif %}
</section>
{% endfor %}
</div>

<h2>Variants</h2>
<div class="scroll"><table>
<tr>{% for name in columns %}<th{% if loop.index > 4 %} class="number"{% endif %}>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr{% if loop.index < 3 %} class="faint"{% endif %}>{% for cell in row %}
<td{% if loop.index > 4 %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="soft">Mean ± standard deviation over the training seeds; of accuracies, over generators and classifiers.
KID, FD and coverage in {{ space }}. Real against real: two halves of the real studies, which is what a perfect generator
reaches. Autoencoder alone: real studies that were encoded and decoded. Class AUC: how well the class that was asked for is
read from the volumes. rs: a classifier of real and synthetic studies, tested on real ones.</p>
<p class="soft">In the paper, <b>measured on other data, so that only the order can be compared</b>:
{% for name, value in paper %}{{ name }} {{ value }}{{ "; " if not loop.last else "." }}{% endfor %}</p>

{{ figures(charts) }}

<h2>Differences of classifiers</h2>
<div class="scroll"><table>
<tr><th>difference</th><th>metric</th><th class="number">value</th><th class="number">95 % interval</th><th>larger</th>
<th>equal within the margin</th></tr>
{% for each in contrasts %}
<tr><td>{{ each.contrast }}</td><td>{{ each.metric }}</td><td class="number">{{ each.value }}</td>
<td class="number">{{ each.interval }}</td><td>{{ each.verdict }}</td><td>{{ each.equal }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">r: real; rr: real twice, the control for twice the data; v: real after the autoencoder; s: synthetic; l: with
predicted classes; b: the second variant's volumes. The interval holds beyond these generators, classifiers and cases.</p>

<h2>Volumes</h2>
{{ figures(volumes) }}

<h2>Decided on real studies alone</h2>
<div class="scroll long"><table>
{% for name, value in decided %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>

<h2>Protocol</h2>
<div class="scroll long"><table>
{% for name, value in protocol %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>

<h2>Time</h2>
<div class="scroll"><table>
<tr><th>step</th><th class="number">seconds</th></tr>
{% for name, value in seconds %}
<tr><td>{{ name }}</td><td class="number">{{ "%.1f" | format(value) }}</td></tr>
{% endfor %}
</table></div>
"""
    + FOOT
)


def write_page(folder: Path, record: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write report.html.

    Args:
        folder: of the comparison.
        record: the content of comparison.json.
        columns: of the table of variants.
        rows: of the table of variants.
    """
    asked, decided = record["protocol"]["asked"], record["protocol"]["decided"]
    on_phantoms = asked["phantom"] is not None
    variants = " and ".join([", ".join(asked["variants"][:-1]), asked["variants"][-1]])
    notices = ["Not for diagnosis. Generated volumes are synthetic."]
    notices += ["Real studies are phantoms here: the answers are about phantoms, not about patients."] * on_phantoms
    left_out = [arm for arm in asked["arms"] if arm not in {job["arm"] for job in record["classifiers"]}]
    if left_out:
        notices.append(
            f"Arms without classifiers: {', '.join(left_out)}. A model predicts the same class for every report."
        )
    seeds = len(asked["training_seeds"])
    page = render(
        _TEMPLATE,
        title="Comparison of generators",
        subtitle=f"{variants}, {seeds} training seeds each",
        notices=notices,
        facts=[
            ("training studies", decided.get("size", "all of --data")),
            ("classifier seeds", asked["classifier_seeds"]),
            ("distances in", decided["space"]),
            ("protocol", record["protocol_sha256"][:12]),
        ],
        statements=record["statements"],
        columns=columns,
        rows=rows,
        space=decided["space"],
        paper=list(record["paper"].items()),
        charts=[_figure(distances(record), "Distance of each generator, a dot for each training seed", _ABOUT_DISTANCES),
                _figure(accuracies(record), "Accuracy of the classifiers of each arm", _ABOUT_ACCURACIES)],
        contrasts=[_contrast(each) for each in record["contrasts"]],
        volumes=[_montage(folder, record)],
        decided=[(_words(name), _words(value)) for name, value in decided.items()],
        protocol=[(_words(name), _words(value)) for name, value in asked.items()],
        seconds=list(record["seconds"].items()),
    )  # fmt: skip
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


_ABOUT_DISTANCES = (
    "Fréchet distance of generated volumes to real ones, a dot for each training seed. The bar is the distance between two "
    "halves of the real studies, the diamond that of real studies after the autoencoder."
)
_ABOUT_ACCURACIES = (
    "Accuracy on real test studies, a dot for each classifier and generator, and their mean. All arms have the same number of "
    "updates."
)


def distances(record: Mapping[str, Any]) -> bytes:
    """PNG of the distance of every generator, with the floor and the limit of the autoencoder."""
    axes, figure = _axes(len(record["protocol"]["asked"]["variants"]))
    space, names = record["protocol"]["decided"]["space"], record["protocol"]["asked"]["variants"]
    everything = []
    for y, name in enumerate(reversed(names)):
        rows = [
            row
            for generator in record["generators"]
            if generator["variant"] == name
            for row in generator["rows"]
            if (row["metric"], row["features"]) == ("fd", space) and row["value"] is not None
        ]
        axes.plot([row["value"] for row in rows], [y] * len(rows), "o", color=COLORS[0], alpha=0.8, markersize=6)
        everything += rows
    for field, marker in (("floor", "|"), ("limit_autoencoder", "D")):
        known = [row[field] for row in everything if row[field] is not None]
        if known:
            value = float(np.mean(known))
            axes.plot([value] * len(names), range(len(names)), marker, color=COLORS[1], markersize=9, fillstyle="none")
    axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    axes.set_xlabel(f"FD, {space}", fontsize=9)
    axes.set_xlim(left=0)
    return png(figure)


def accuracies(record: Mapping[str, Any]) -> bytes:
    """PNG of the accuracy of every classifier, by arm."""
    first = record["protocol"]["asked"]["variants"][0]
    found: dict[str, list[float]] = {}
    for job in record["classifiers"]:
        label = job["arm"] if job["variant"] in (None, first) else f"{job['arm']} {job['variant']}"
        found.setdefault(label, []).append(job["accuracy"])
    axes, figure = _axes(len(found))
    for y, (_, values) in enumerate(reversed(found.items())):
        axes.plot(values, [y] * len(values), "o", color=COLORS[0], alpha=0.35, markersize=4)
        axes.plot([float(np.mean(values))], [y], "|", color=COLORS[1], markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(found)), list(reversed(found)), fontsize=8)
    axes.set_xlabel("accuracy on real test studies", fontsize=9)
    return png(figure)


def _axes(lines: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 0.9 + 0.32 * lines), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylim(-0.6, lines - 0.4)
    axes.tick_params(labelsize=8, length=2)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return axes, figure


def _montage(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """A real test study, and the volume that each variant has generated from it, or from the same place in its set."""
    names = record["protocol"]["asked"]["variants"]
    seed = record["protocol"]["asked"]["training_seeds"][0]
    real = load_manifest(folder / "real" / "prepared")
    made = {name: load_manifest(folder / "synthetic" / f"{name}-{seed}-test" / "prepared") for name in names}
    case = made[names[0]].cases[0]
    source = next(each for each in real.cases if each.id == case.source_case)
    key = f"image/{real.data.sequences[0]}"
    panels = [Panel(np.asarray(real.array(source, key)), source.spacing, "real")]
    for name, manifest in made.items():
        shown = next((each for each in manifest.cases if each.source_case == source.id), manifest.cases[0])
        panels.append(Panel(np.asarray(manifest.array(shown, key)), shown.spacing, f"{name}, seed {seed}"))
    about = "A real test study, and what each variant generates from its report and class, as far as it reads them."
    return _figure(montage(panels, window=(0.0, 1.0)), "Middle slices of a real study and of generated ones", about)


def _words(value: Any) -> str:
    """A value of the protocol as text: numbers with three digits, parts with commas between them."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(name)} {_words(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (
            "; ".join(map(_words, value))
            if any(isinstance(each, Mapping) for each in value)
            else " ".join(map(_words, value))
        )
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("_", " ")


def _figure(image: bytes, alt: str, caption: str) -> dict[str, Any]:
    return {"image": base64.b64encode(image).decode(), "alt": alt, "caption": caption}


def _contrast(each: Mapping[str, Any]) -> dict[str, str]:
    interval, value, same = each["ci95"], each["difference"], each.get("equivalence")
    return {
        "contrast": each["contrast"], "metric": each["metric"].replace("_", " "), "verdict": each["verdict"],
        "value": "–" if value is None else f"{value:+.3f}",
        "interval": "–" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}",
        "equal": same["verdict"] if same else "",
    }  # fmt: skip
