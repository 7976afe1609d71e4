"""The page of `report.html` as a jinja2 template, and what all pages share: one file, and nothing that is loaded."""

from __future__ import annotations

from typing import Any

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser enforces it: nothing is loaded or run
)

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root {
  --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --paper: #ffffff; --card: #f6f8fa; --mark: #8a5a00;
  --yes: #1a7f37; --no: #b3261e;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #323a43; --paper: #12161b; --card: #1a2027; --mark: #e3b341;
  --yes: #57c26f; --no: #f2817a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.6rem 0 0.2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; }
p { margin: 0.4rem 0; }
.soft { color: var(--soft); }
tr.used td { font-weight: 600; }
.doubt { color: var(--mark); }
.notice { border-left: 4px solid var(--mark); background: var(--card); padding: 0.6rem 0.9rem; margin: 0.9rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.6rem; margin: 1rem 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.7rem; }
.facts span { display: block; color: var(--soft); font-size: 0.8rem; }
.facts b { font-weight: 600; overflow-wrap: anywhere; }
figure { margin: 0.8rem 0 1.2rem; break-inside: avoid; }
figure img { max-width: 100%; height: auto; display: block; border-radius: 6px; border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: 0.88rem; margin-top: 0.35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; width: 100%; }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0.8rem; margin: 1rem 0; }
.verdict { background: var(--card); border: 1px solid var(--line); border-left: 6px solid var(--soft); border-radius: 6px;
  padding: 0.6rem 0.9rem 0.8rem; }
.verdict.yes { border-left-color: var(--yes); } .verdict.yes b { color: var(--yes); }
.verdict.no { border-left-color: var(--no); } .verdict.no b { color: var(--no); }
.verdict.undecided { border-left-color: var(--mark); } .verdict.undecided b { color: var(--mark); }
.verdict h3 { font-size: 0.95rem; margin: 0; font-weight: 600; color: var(--soft); }
.verdict b { display: block; font-size: 1.5rem; line-height: 1.3; }
.verdict ul { margin: 0.5rem 0 0; padding-left: 1.1rem; color: var(--soft); font-size: 0.85rem; }
.notes { color: var(--soft); font-size: 0.88rem; padding-left: 1.4rem; margin: 0.6rem 0; }
.faint td { color: var(--soft); }
details { margin: 0.8rem 0; } summary { cursor: pointer; color: var(--soft); }
td small { display: block; color: var(--soft); }
th, td { text-align: left; padding: 0.3rem 0.7rem 0.3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { white-space: nowrap; } .long td { overflow-wrap: anywhere; }
.dense { font-size: 0.85rem; } .dense td, .dense th { padding-right: 0.45rem; } .metrics td:first-child { min-width: 9rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
@media screen and (max-width: 40rem) { figure { overflow-x: auto; } figure img { max-width: none; width: 46rem; } }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; } h2 { break-after: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
{% for notice in notices %}<p class="notice">{{ notice }}</p>
{% endfor %}
<div class="facts">
{% for name, value in facts %}<div><span>{{ name }}</span><b>{{ value }}</b></div>
{% endfor %}
</div>
"""

FOOT = """</main>
</body>
</html>
"""

#: Pictures with their captions, or a notice where one is missing.
FIGURES = """
{% macro figures(several) %}
{% for picture in several %}
{% if picture.image %}
<figure>
<img alt="{{ picture.alt }}" src="data:image/png;base64,{{ picture.image }}">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% else %}
<p class="notice">{{ picture.missing }}</p>
{% endif %}
{% endfor %}
{% endmacro %}
"""

#: Answers, each with its question, a sentence and further sentences (`remarks`).
ANSWERS = """
{% macro answers(several) %}
<div class="verdicts">
{% for each in several %}
<section class="verdict {{ each.answer }}">
<h3>{{ each.question }}</h3>
<b>{{ each.answer | capitalize }}</b>
<p>{{ each.sentence }}</p>
{% if each.remarks %}<ul>{% for remark in each.remarks %}<li>{{ remark }}</li>{% endfor %}</ul>{% endif %}

</section>
{% endfor %}
</div>
{% endmacro %}
"""

#: The sensitivity gate: a row for each feature space, a column for each degradation.
GATES = """
{% macro sensitivity(gates) %}
<p class="soft">Volumes were made worse in known ways. A number is the distance of a volume to its worse copy, as a multiple of
the distance between two studies. It has to grow with the strength of the blur, the noise and the size of the gland in at
least 90 % of the volumes; features that fail decide nothing.</p>
<div class="scroll"><table>
<tr><th>features</th><th>result</th>{% for name in gates[0].names %}<th class="number">{{ name }}</th>{% endfor %}
{% for name in gates[0].in_order %}<th class="number">{{ name }} in order</th>{% endfor %}</tr>
{% for gate in gates %}
<tr{% if not gate.passed %} class="faint"{% endif %}><td>{{ gate.space }}</td>
<td>{% if gate.passed %}passes{% else %}<span class="doubt">fails: {{ gate.failed }}</span>{% endif %}</td>
{% for value in gate.distances %}<td class="number">{{ value }}</td>{% endfor %}
{% for share in gate.in_order.values() %}<td class="number">{{ share }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
"""

TEMPLATE = (
    HEAD
    + """
{{ evaluation | safe }}
<h2>Images</h2>
<p class="soft">Middle slices in three planes, one gray window (0 to 1 of each volume's normalized intensity), true proportions.
R, L: the patient's right and left; A, P: front and back; S, I: head and feet. The patient's right is on the left side.</p>
"""
    + FIGURES
    + """{{ figures(pictures) }}

<h2>Training</h2>
{{ figures(charts) }}

<h2>Generated volumes</h2>
{% if samples %}
<div class="scroll"><table>
<tr><th>volume</th><th class="number">report</th><th class="number">seed</th><th>solver</th><th class="number">steps</th>
<th>class given</th><th class="number">P(PI-RADS 1-2)</th><th class="number">P(PI-RADS 3-5)</th></tr>
{% for row in samples %}
<tr><td>{{ row.number }}</td><td class="number">{{ row.report }}</td><td class="number">{{ row.seed }}</td>
<td>{{ row.solver }}</td><td class="number">{{ row.steps }}</td><td>{{ row.given }}</td>
<td class="number">{{ row.neg }}</td><td class="number">{{ row.pos }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">Reports are numbered in the order in which they were given; their text is not kept. P: the class that the model
read from the report at the last step. {{ class_heads }}</p>
{% else %}
<p class="notice">{{ no_samples }}</p>
{% endif %}

<h2>Time and memory</h2>
<div class="scroll"><table>
<tr><th>command</th><th class="number">seconds</th><th class="number">peak memory, MiB</th><th>remarks</th></tr>
{% for row in timings %}
<tr><td>{{ row.command }}</td>
{% if row.seconds is none %}<td class="number">-</td><td class="number">-</td>{% else %}
<td class="number">{{ "%.1f" | format(row.seconds) }}</td><td class="number">{{ row.memory }}</td>{% endif %}
<td>{{ row.remarks }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">The last run of each command. Peak memory is that of its largest process.</p>

<h2>Environment</h2>
<div class="scroll"><table>
{% for name, value in environment %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>
"""
    + FOOT
)


def render(template: str, **values: Any) -> str:
    """The page as HTML. Values are escaped, and one that the template names must be given; `policy` is `POLICY` if not."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(**{"policy": POLICY, **values})
