"""The evaluation as a part of a page: a jinja2 template. `evaluation.py` computes what it shows."""

from __future__ import annotations

from ccella_fast.report.page import ANSWERS, FIGURES, GATES

_VIEWER = """
{% if viewer %}
<style>
#viewer { outline-offset: 6px; border-radius: 6px; }
#viewer .panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr)); gap: 0.4rem; }
#viewer .pane { margin: 0; min-width: 0; }
#viewer .frame { position: relative; aspect-ratio: 1; background: #000; border-radius: 6px; overflow: hidden; }
#viewer canvas { pointer-events: none; display: block; }
#viewer .letter { position: absolute; color: #ffe9a8; font-size: 0.8rem; text-shadow: 0 0 3px #000; }
#viewer .letter:nth-of-type(1) { left: 0.5rem; top: 50%; } #viewer .letter:nth-of-type(2) { right: 0.5rem; top: 50%; }
#viewer .letter:nth-of-type(3) { left: 50%; top: 0.2rem; } #viewer .letter:nth-of-type(4) { left: 50%; bottom: 0.2rem; }
#viewer .controls { display: flex; flex-wrap: wrap; gap: 0.6rem 1.2rem; align-items: center;
  margin: 0.6rem 0; font-size: 0.92rem; }
#viewer input[type=range] { flex: 1 1 12rem; }
#viewer output { min-width: 8rem; font-variant-numeric: tabular-nums; }
@media print { #viewer, #viewer-notice { display: none; } }
</style>
<div id="viewer" tabindex="0" role="group" aria-label="Volumes slice by slice" hidden>
<div class="controls">
<label>Volumes <select id="viewer-case"></select></label>
<label>Plane <select id="viewer-plane"><option>axial</option><option>coronal</option><option>sagittal</option></select></label>
<input type="range" id="viewer-slice" min="0" max="0" value="0" aria-label="slice">
<output id="viewer-place"></output>
</div>
<div class="panes">
{% for _ in range(viewer.columns) %}
<figure class="pane"><div class="frame"><canvas></canvas><span class="letter"></span><span class="letter"></span><span
class="letter"></span><span class="letter"></span></div><figcaption></figcaption></figure>
{% endfor %}
</div>
<p class="soft">Move the slider, or click an image and turn the wheel. All volumes are at one slice and in one gray window.</p>
</div>
<p id="viewer-notice" class="soft">In a browser with WebGL 2 and scripts, volumes can be looked at slice by slice here.</p>
<script type="application/json" id="viewer-volumes">{{ viewer.cases | safe }}</script>
<script type="module">{{ viewer.script | safe }}</script>
{% else %}
<p class="soft">{{ no_viewer }}</p>
{% endif %}
"""

_METRICS = """
{% macro metrics(rows) %}
<div class="scroll metrics"><table>
<tr><th>metric</th><th>features</th>{% if sequences %}<th>sequence</th>{% endif %}<th class="number">value</th>
<th class="number">95 % interval</th><th class="number">at equal n</th><th class="number">floor</th>
<th class="number">ratio</th><th class="number">autoencoder</th><th class="number">n</th><th>notes</th></tr>
{% for row in rows %}
<tr{% if row.faint %} class="faint"{% endif %}><td>{{ row.metric }}{% if row.better %}<small>{{ row.better }}</small>
{% endif %}</td>
<td>{{ row.features }}</td>{% if sequences %}<td>{{ row.sequence }}</td>{% endif %}
<td class="number">{{ row.value }}</td><td class="number">{{ row.interval }}</td>
<td class="number">{{ row.equal_n }}</td><td class="number">{{ row.floor }}</td>
<td class="number">{{ row.ratio }}</td><td class="number">{{ row.limit }}</td><td class="number">{{ row.n }}</td>
<td>{{ row.notes }}</td></tr>
{% endfor %}
</table></div>
{% endmacro %}
"""

EVALUATION = (
    FIGURES
    + ANSWERS
    + GATES
    + _METRICS
    + """
{{ answers(verdicts) }}

<h2>Numbers</h2>
{{ metrics(rows) }}
<p class="soft">Floor: the same metric between two halves of the {{ words }}, which is what a perfect generator reaches; of
what was asked for, prompts in random order. At equal n: with as many volumes as in these halves. Ratio: that over the
floor. Autoencoder: {{ words }} that were only encoded and decoded, which is what a perfect model of latents reaches.
n: {{ words }} and generated volumes.</p>
{% if further %}<details><summary>Further metrics</summary>{{ metrics(further) }}</details>{% endif %}

{% if notes %}<ol class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ol>{% endif %}

{{ figures(dots) }}

<h2>Side by side</h2>
{{ figures(montages) }}
"""
    + _VIEWER
    + """
<h2 id="closest-pairs">Closest pairs</h2>
{{ figures(pairs) }}

<h2>Glands</h2>
{% if rules %}
<div class="scroll"><table>
<tr><th>rule</th><th class="number">{{ word }}</th><th class="number">generated</th><th class="number">95 % interval</th></tr>
{% for row in rules %}
<tr><td>{{ row.rule }}</td><td class="number">{{ row.real }}</td><td class="number">{{ row.generated }}</td>
<td class="number">{{ row.interval }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{{ figures(glands) }}

<h2>Intensities and sharpness</h2>
{{ figures(curves) }}

<h2>Can the features see?</h2>
{% if gates %}
{{ sensitivity(gates) }}
{% else %}
<p class="notice">{{ no_gates }}</p>
{% endif %}

<h2>Protocol</h2>
<div class="scroll long"><table>
{% for name, value in protocol %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>
"""
)
