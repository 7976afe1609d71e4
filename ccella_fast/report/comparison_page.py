"""The page of a comparison: a jinja2 template. `comparison.py` computes what it shows."""

from __future__ import annotations

from ccella_fast.report.page import ANSWERS, FIGURES, FOOT, GATES, HEAD

_TABLE = """
{% macro grid(table, words=1) %}
<div class="scroll"><table{% if words > 1 %} class="dense"{% endif %}>
<tr>{% for name in table.columns %}<th{% if loop.index > words %} class="number"{% endif %}>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr{% if loop.index <= table.references %} class="faint"{% endif %}>{% for cell in row %}
<td{% if loop.index > words %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}

{% macro differences(several) %}
<div class="scroll"><table>
<tr><th>difference</th><th>metric</th><th class="number">value</th><th class="number">95 % interval</th><th>larger</th>
<th>equal within the margin</th></tr>
{% for each in several %}
<tr><td>{{ each.contrast }}</td><td>{{ each.metric }}</td><td class="number">{{ each.value }}</td>
<td class="number">{{ each.interval }}</td><td>{{ each.verdict }}</td><td>{{ each.equal }}</td></tr>
{% endfor %}
</table></div>
{% endmacro %}

{% macro measured(table, missing) %}
{% if table.rows %}{{ grid(table) }}{% else %}<p class="notice">{{ missing }}</p>{% endif %}
{% endmacro %}
"""

COMPARISON = (
    HEAD
    + FIGURES
    + ANSWERS
    + GATES
    + _TABLE
    + """
{{ answers(statements) }}

<h2>Variants</h2>
{{ grid(variants, words=4) }}
<p class="soft">Mean ± standard deviation over the training seeds; of accuracies, over generators and classifiers.
KID, FD and coverage in {{ space }}, all between equal numbers of volumes. Real against real: two halves of the real studies,
which is what a perfect generator reaches; as accuracy, a classifier of real studies alone (r). Autoencoder alone: real studies
that were encoded and decoded (v). Class AUC: how well the class that was asked for is
read from the volumes, with the features that read it best from real ones. rs: a classifier of real and synthetic studies,
tested on real ones. Seconds: the mean of a
training, and of the synthesis of its volumes, with everything else that ran on this machine.</p>
<p class="soft">In the paper, <b>measured on other data, so that only the order can be compared</b>:
{% for name, value in paper %}{{ name }} {{ value }}{{ "; " if not loop.last else "." }}{% endfor %}</p>

<h2>Distances</h2>
{{ figures(distances) }}
{{ measured(tables.distances, "No distance was computed.") }}
<p class="soft">Each evaluation has a page of its own, with all metrics and their intervals, volumes slice by slice and the
closest pairs:
{% for name in evaluations %}<a href="evaluation/{{ name }}/report.html">{{ name }}</a>{{ ", " if not loop.last else "." }}
{% endfor %}</p>

<h2>Classifiers</h2>
{{ figures(classifiers) }}
{{ differences(contrasts | selectattr("metric", "equalto", "accuracy")) }}
<details><summary>Differences of the AUC and of the average precision</summary>
{{ differences(contrasts | rejectattr("metric", "equalto", "accuracy")) }}
</details>
<p class="soft">r: real; rr: real twice, the control for twice the data; v: real after the autoencoder; s: synthetic; l: with
predicted classes; b: the second variant's volumes. The interval is over generators, classifiers and test studies. All have the
same training studies, of which the choice is not part of it.</p>
{{ figures(roc) }}

<h2>Volumes of the same prompts</h2>
{{ figures(same_prompts) }}
{{ measured(tables.conditions, "Nothing that was asked for was looked for in the volumes.") }}
<p class="soft">What was asked for, as linear probes read it from the volumes: AUC of a class, rank correlation of a number.</p>

<h2>Same noise, other class</h2>
{% if other_class %}
{{ figures(other_class) }}
{{ grid(tables.class_changes) }}
<p class="soft">Effect: how far asking for the other class moves what is read, where 1 is the difference between real studies of
both classes; none if the class cannot be read from these. Variants without a class input are not in this table.</p>
{% else %}
<p class="notice">This was not looked at: it is for phantoms and for variants with a class input. Own samples are compared by
ccella-fast evaluate with --counterfactual.</p>
{% endif %}

<h2>Copies of training studies</h2>
<p class="soft">Looked for among volumes from the reports of test studies, which the generators have not seen.</p>
{{ figures(nearest) }}
{{ measured(tables.copies, "Copies of training studies were not looked for.") }}
<p class="soft">The closest pairs and their differences, of each evaluation:
{% for name in evaluations %}<a href="evaluation/{{ name }}/report.html#closest-pairs">{{ name }}</a>
{{- ", " if not loop.last else "." }}
{% endfor %}</p>

<h2>Volume of the gland</h2>
{{ measured(tables.gland_volumes,
"The volume that reports state was not compared with that of glands: this needs studies whose glands the segmenter finds.") }}

<h2>Slices</h2>
{{ measured(tables.slices, "Distances of slices need the weights of RadImageNet, which are not part of this project: "
"ccella-fast evaluate computes them with --features radimagenet=FILE, and done/evaluate-*.json has the rest of the command.") }}

<h2>Intensities and sharpness</h2>
{{ figures(curves) }}
{{ measured(tables.images, "Intensities and spectra were not compared.") }}

<h2>Can the features see?</h2>
{{ sensitivity(gates) }}

<h2>Plausible glands</h2>
{{ measured(tables.glands, "Glands were not segmented: the segmenter does not find those of coarse phantoms.") }}

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
<details><summary>Seconds of each step</summary>
<div class="scroll"><table>
<tr><th>step</th><th class="number">seconds</th></tr>
{% for name, value in seconds %}
<tr><td>{{ name }}</td><td class="number">{{ "%.1f" | format(value) }}</td></tr>
{% endfor %}
</table></div>
</details>
"""
    + FOOT
)
