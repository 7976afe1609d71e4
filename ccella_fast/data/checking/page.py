"""`check.html`: the findings as one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ccella_fast.data.checking.findings import MEANING, Finding
from ccella_fast.report.page import FOOT, HEAD, render

_TEMPLATE = (
    HEAD
    + """
{% for severity, meaning, rows in groups %}
<h2>{{ severity }} ({{ rows | length }})</h2>
<p class="soft">{{ meaning }}</p>
<div class="scroll"><table>
<tr><th>finding</th><th>what</th><th>studies</th><th>fix</th></tr>
{% for row in rows %}
<tr><td>{{ row.name }}</td><td>{{ row.message }}{% if row.path %}<br><span class="soft">{{ row.path }}{% endif %}
{% if row.field %} {{ row.field }}{% endif %}{% if row.path %}</span>{% endif %}</td>
<td>{{ row.studies | join(", ") }}</td><td>{{ row.fix }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}

<h2>Memory and disk space</h2>
<div class="scroll"><table>
{% for name, value in needs %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>
"""
    + FOOT
)


def render_page(
    data: Path, studies: int, findings: Sequence[Finding], needs: Sequence[tuple[str, str]], allow: Sequence[str]
) -> str:
    """The page as HTML.

    Args:
        data: The data set that was checked.
        studies: Number of studies.
        findings: What was found.
        needs: Memory and disk space, as (name, text).
        allow: Names of findings that were allowed.
    """
    groups = [(severity, meaning, [each for each in findings if each.severity == severity])
              for severity, meaning in MEANING.items()]  # fmt: skip
    facts = [("Studies", str(studies)), *((severity, str(len(rows))) for severity, _, rows in groups)]
    return render(
        _TEMPLATE,
        title="ccella_fast: check of a data set",
        subtitle=str(data),
        notices=[f"Allowed: {', '.join(allow)}"] if allow else [],
        facts=facts,
        groups=[group for group in groups if group[2]],
        needs=needs,
    )
