"""Read the PI-RADS score of a study from its report. The rule, with examples, is in docs/how-to/import.md.

Every mention of PI-RADS is classified: stated with a score, ignored (negated, earlier, part of a legend, only the version), or
unclear, for which the highest score is kept that it may mean. The result is the highest stated score, unless an unclear mention
may be higher: then there is no result, as a wrong class is worse than none.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple


class PiradsReading(NamedTuple):
    """The score 1 to 5, or None; and why, in words that are not the report's."""

    score: int | None
    reason: str


class _Mention(NamedTuple):
    kind: str  # stated, ignored, unclear
    score: int  # of an unclear mention the highest that it may mean
    reason: str = ""


_NAME = r"\bpi[\s_-]{0,2}rads?\b|\bpi[\s_-]{0,2}rads?(?=[1-5_]\b|[1-5]-)"
_VERSION = (
    r"\(?\s*(?:version|vers\.?|ver\.?|v\.?)\s*\.?\s*[12](?:[.,]\d)?\s*\)?"
    r"|\(?\s*2[.,][01](?!\d)\s*\)?|\(_\)"  # (_) was a scale, such as (1-5)
    r"|2(?=\s*[:,-]?\s*(?:assessment|score|category|kategorie|categorie|categoria)\W{0,3}[1-5](?!\d))"
)
_FILLER = (
    r"(?:overall|assessment|assigned|category|cat\.?|score|scoring|classification|class|grade|grading|suspicion|level|rating"
    r"|kategorie|klassifikation|klasse|stufe|grad|gesamtscore|gesamt|beurteilung"
    r"|categorie|classificatie|score\s+global|globale?|cotation|classe|niveau|note"
    r"|categoria|puntuacion|puntaje|clasificacion|grado"
    r"|is|was|of|as|ist|war|von|van|de|est|es)(?![a-z])"
)
_SEPARATOR = r"[\s:=_(\[*\"'-]*"
_NO_UNIT = r"(?!\s*(?:mm|cm|ml|cc|cm3|%|x\b|×|t\b|tesla\b|g\b|ng\b|jahre|years?|months?|jaar))"
_SCORE = (
    rf"(?P<score>[1-5])(?P<letter>[ab])?(?![\d]|[.,]\d|[a-z]){_NO_UNIT}|(?-i:(?P<roman>IV|V|I{{1,3}}))(?![a-z0-9.])"
)
_MENTION = re.compile(
    rf"(?P<name>{_NAME})(?P<fill>(?:{_SEPARATOR}(?:{_VERSION}|{_FILLER})){{0,6}}){_SEPARATOR}(?:{_SCORE})?",
    re.IGNORECASE,
)
_ROMAN = {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5}

_OUT_OF = re.compile(r"\s*(?:/|out\s+of|von|sur|sobre)\s*5(?!\d)", re.IGNORECASE)
_RANGE = re.compile(
    rf"\s*(?:-|/|\bto\b|\bor\b|\bbis\b|\boder\b|\ba\b|\bou\b|\bo\b|\btot\b|\bof\b|\bbzw\.?|\bthrough\b)\s*(?:pi[\s-]?rads?\s*)?"
    rf"(?P<other>[1-5])(?![\d]|[.,]\d){_NO_UNIT}",
    re.IGNORECASE,
)
_LIST = re.compile(
    rf"\s*(?P<link>,\s*(?:and\s+)?|&|\b(?:and|und|en|et|y|e)\b)\s*(?P<other>[1-5])(?![\d]|[.,]\d|\s*[:)])\b{_NO_UNIT}",
    re.IGNORECASE,
)
_OTHER_LESION = re.compile(
    rf"(?:#|\b(?:lesion|lasion|laesie|target|roi|nodule|nr|no)\b\.?\s*#?)\s*\w?\s*[:=]\s*(?P<first>[1-5])(?![\d]|[.,]\d){_NO_UNIT}"
    rf"|(?<![\d.,])(?P<second>[1-5])\s*\((?:lesion|lasion|laesie|target|roi|nodule)\b",
    re.IGNORECASE,
)  # "lesion 1: PI-RADS 4; lesion 2: 5", "PI-RADS 4 (lesion 1), 5 (lesion 2)"
_MORE_DIGITS = re.compile(rf"\s*[\[\](x )]*\s+[1-5](?![\d]|[.,]\d){_NO_UNIT}", re.IGNORECASE)
_COMPARED = re.compile(
    r"(?:[<>≥≤]\s*=?|\bat\s+least|\bmindestens|\bminstens|\bau\s+moins|\bal\s+menos)\s*$", re.IGNORECASE
)
_AND_ABOVE = re.compile(
    r"\s*(?:\+|or\s+(?:higher|above|greater|more|lower|less|below)|and\s+(?:above|higher)|oder\s+h|of\s+hoger|ou\s+plus|o\s+mas|at\s+least)",
    re.IGNORECASE,
)

_NEGATION = (
    r"no(?!\s*\.?\s*\d)|not|without|none|negative\s+for|absence\s+of|kein\w*|ohne|nicht|geen|zonder|niet|pas\s+de|aucune?|sans"
    r"|sin|ningun\w*|neither|nor|weder"
)
_BETWEEN_NEGATION = (
    r"(?:evidence|sign|signs|hay|of|for|a|an|any|the|lesions?|focus|foci|area|areas|findings?|focal|suspicious|new|further|other|more"
    r"|additional|definite|discrete|convincing|with|hinweis|auf|eine?[rn]?|lasion\w*|lasionen|herd\w*|weitere\w*|mit|sichere\w*"
    r"|aanwijzing\w*|voor|laesies?|andere|nieuwe|met|verdachte|suspekte\w*|signe|lesion|autre|avec|nouvelle|otras?|con|nueva)"
)
_NEGATED = re.compile(rf"\b(?:{_NEGATION})(?:\s+{_BETWEEN_NEGATION})*[\s-]*$", re.IGNORECASE)
_MAYBE_NEGATED = re.compile(rf"\b(?:{_NEGATION})\b[^,:()]*$", re.IGNORECASE)
_NO_CHANGE = re.compile(r"\bno\s+(?:\w+\s+){0,2}changes?\b|\bnot\s+only\b", re.IGNORECASE)
_NEGATED_AFTER = re.compile(
    r"[^,.;:()]{0,40}?\b(?:(?:not|nicht|niet|non)\s+(?:\w+\s+)?(?:seen|identified|present|found|visible|detected|nachweisbar|erkennbar"
    r"|aanwezig|zichtbaar)|excluded|ruled\s+out|absent|ausgeschlossen|uitgesloten|exclue?|descartad\w*)",
    re.IGNORECASE,
)

_EXAMINATION = r"(?:mri|exam\w*|study|scan|report|year|hospital|institution)"
_EARLIER = (
    r"previous(?:ly)?|prior|earlier|formerly|former|history\s+of|initial(?:ly)?|baseline|upgraded\s+from|downgraded\s+from|from"
    r"|voorheen|eerder\w*|vorige?|destijds|fruher\w*|vorbefund\w*|voruntersuchung\w*|voraufnahme\w*|vormals|zuvor|ehemals|vor-mrt"
    r"|precedemment|precedente?|anterieurement|auparavant|ancien\w*|examen\s+anterieur|irm\s+anterieure|previamente|previ[oa]"
    r"|anteriormente|(?:estudio|informe|rm)\s+anterior"
    rf"|(?:last|old)\s+{_EXAMINATION}"
)
_BETWEEN_EARLIER = (
    r"(?:mri|mr|mrt|irm|rm|exam(?:ination|en)?|study|scan|report|score|scored|lesions?|imaging|with|a|an|the|of|was|were|as|is|on|in|at|from"
    r"|to|categorized|categorised|classified|graded|rated|reported|described|assigned|called|known|war|wurde|als|mit|befund|am|vom|een|met"
    r"|de|du|le|la|en|el|\d{1,4}(?:[./-]\d{1,4}){0,2}|[a-z]+\s+\d{4}|assessment|overall|category)"
)
_IS_EARLIER = re.compile(rf"\b(?:{_EARLIER})(?:[\s:(-]+{_BETWEEN_EARLIER})*[\s:(-]*$", re.IGNORECASE)
_MAYBE_EARLIER = re.compile(
    rf"\b(?:{_EARLIER.replace('|from', '')}"
    rf"|(?:outside|external)\s+{_EXAMINATION}|known|status\s+post|s/p|ablat\w*|treated|biopsied"
    r"|19\d\d|20\d\d|bekannt\w*|bekende|connue?|conocid\w*)\b",
    re.IGNORECASE,
)
_NOW = re.compile(
    r"\b(?:now|current(?:ly)?|today|present(?:ly)?|new|aktuell\w*|jetzt|heute|nun|nu|thans|huidige?|actuellement|ce\s+jour|ahora|actual\w*"
    r"|upgraded\s+to|downgraded\s+to|from\s.*\bto)\b",
    re.IGNORECASE,
)
_EARLIER_AFTER = re.compile(
    rf"[^,.;:()]{{0,30}}?\b(?:on|in|at|from|unchanged|than|op|bei|im|in)\s+(?:the\s+|der\s+|de\s+|het\s+)?(?:{_EARLIER}|19\d\d|20\d\d)\b",
    re.IGNORECASE,
)
_MAYBE = re.compile(
    r"\b(?:if|when|whether|would|could|may|might|should|possibl[ey]|probabl[ey]|perhaps|versus|vs\.?|rather\s+than|suggestive\s+of|dd"
    r"|wenn|falls|eventuell|wahrscheinlich|moglicherweise|vermutlich|mogelijk|indien|waarschijnlijk|peut-etre|si|posible\w*|probable\w*)"
    r"(?:\s+(?:be|a|an|as|is|for|of|to|the|een|eine?|une?|lesions?)){0,3}\s*$",
    re.IGNORECASE,
)
_VERSION_ONLY = re.compile(
    r"\b(?:according\s+to|using|per|following|based\s+on|nach|gemass|gemaess|entsprechend|volgens|conform|selon|segun)(?:\s+(?:the|den|de|la|les))?\s*$",
    re.IGNORECASE,
)
_HISTORY = re.compile(
    r"(?:^|\n|(?<=[.;!?]))[ \t]*(?:clinical\s+(?:history|information|indication|details|data)|clinical|indication|history"
    r"|comparison|prior\s+(?:mri|exams?|studies|imaging)|reason\s+for\s+\w+|anamnese|voorgeschiedenis|klinische\s+\w+|vraagstelling|fragestellung"
    r"|indikation|indicatie|vergelijking|vergleich|renseignements\s+cliniques|antecedents|comparaison|antecedentes|datos\s+clinicos"
    r"|motivo|comparacion)\s*:",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(?:\n[ \t]*|(?<=[.;!?])\s+)(?!pi[\s-]?rads)[a-z][\w /()-]{2,40}:", re.IGNORECASE)
_LEGENDS = [
    re.compile(r"[^\d]{2,90}".join(rf"\b{digit}\b" for digit in digits)) for digits in ("12345", "54321")
]  # "1: very low, 2: low, ..." with or without PI-RADS before each
_BOUNDARY = re.compile(r"[.!?;]+(?=\s|$)|\n\s*\n|\n(?=\s*(?:[A-Z•*-]|\d+[.)]))")


def read_pirads(report: str) -> PiradsReading:
    """The PI-RADS score that a report states for the study: the highest of its lesions; None if it is not certain."""
    text = _plain(report)
    if not re.search(_NAME, text, re.IGNORECASE):
        return PiradsReading(None, "PI-RADS is not mentioned")
    text = _without_legends(text)
    histories = _history_sections(text)
    mentions = [
        _Mention("ignored", 0, "in the history")
        if any(start <= match.start() < end for start, end in histories)
        else _classify(text, match)
        for match in _MENTION.finditer(text)
    ]
    mentions += [
        _Mention("unclear", int(each["first"] or each["second"]), "a lesion without PI-RADS")
        for each in _OTHER_LESION.finditer(text)
    ]
    stated = [each.score for each in mentions if each.kind == "stated"]
    unclear = [each for each in mentions if each.kind == "unclear" and each.score > max(stated, default=0)]
    if unclear:
        return PiradsReading(None, f"ambiguous: {unclear[0].reason}")
    if stated:
        return PiradsReading(max(stated), "one score" if len(stated) == 1 else f"the highest of {len(stated)} scores")
    ignored = sorted({each.reason for each in mentions if each.reason})
    return PiradsReading(None, "no score" + (f": {', '.join(ignored)}" if ignored else ""))


def _plain(report: str) -> str:
    """Without accents, with plain hyphens and line ends."""
    text = re.sub(r"[\u2010-\u2015\u2212]", "-", report.replace("\r\n", "\n").replace("\r", "\n"))
    text = unicodedata.normalize("NFKD", re.sub("[™®]", "", text).replace("ß", "ss"))
    return "".join(letter for letter in text if not unicodedata.combining(letter))


def _without_legends(text: str) -> str:
    """The text without explanations of all five scores. A line such as "1: ... 5: ..." without PI-RADS is not a legend."""
    for legend in _LEGENDS:
        for match in list(legend.finditer(text)):
            if re.search(_NAME, text[max(0, match.start() - 60) : match.end()], re.IGNORECASE):
                text = text[: match.start()] + "_" * (match.end() - match.start()) + text[match.end() :]
    return re.sub(r"\b1\s*(?:-|to|bis|tot|a)\s*5\b", "_", text)  # the scale


def _history_sections(text: str) -> list[tuple[int, int]]:
    """Where sections on the history and earlier examinations begin and end: at the next heading, or an empty line."""
    sections = []
    for match in _HISTORY.finditer(text):
        ends = [
            found.start()
            for found in (_HEADING.search(text, match.end()), re.compile(r"\n\s*\n").search(text, match.end()))
            if found
        ]
        sections.append((match.start(), min(ends, default=len(text))))
    return sections


def _classify(text: str, match: re.Match[str]) -> _Mention:
    starts = [found.end() for found in _BOUNDARY.finditer(text, 0, match.start())]
    before = re.sub(r"\s+", " ", text[max(starts, default=0) : match.start()])
    end = _BOUNDARY.search(text, match.end())
    after = re.sub(r"\s+", " ", text[match.end() : end.start() if end else len(text)])
    asked = end is not None and end[0].startswith("?")
    digit = match["score"] or _ROMAN.get(match["roman"] or "")
    if digit is None:
        return _without_score(before, after)
    top, doubt, after = _all_scores(int(digit), after)
    if _NEGATED.search(before) and not _NO_CHANGE.search(before):
        return _Mention("ignored", 0, "negated")
    if _IS_EARLIER.search(before) and not _NOW.search(before):
        return _Mention("ignored", 0, "of an earlier examination")
    if _VERSION_ONLY.search(before) and top <= 2:
        return _Mention("unclear", top, "a score, or the version of PI-RADS?")
    if doubt:
        return _Mention("unclear", top, doubt)
    if _COMPARED.search(before) or _COMPARED.search(match["fill"] or "") or _AND_ABOVE.match(after):
        return _Mention("unclear", 5, "a limit")
    if _MORE_DIGITS.match(after):
        return _Mention("unclear", 5, "several digits")
    if re.match(r"\s*=\s*[a-z]", after, re.IGNORECASE):
        return _Mention("unclear", top, "an explanation of scores?")
    if _MAYBE.search(before) or re.match(r"\s*\)?\s*\?", after) or (asked and len(after.split()) < 3):
        return _Mention("unclear", top, "not certain in the text")
    if _NEGATED_AFTER.match(after) or (_MAYBE_NEGATED.search(before) and not _NO_CHANGE.search(before)):
        return _Mention("unclear", top, "negated?")
    if _EARLIER_AFTER.match(after) or _is_maybe_earlier(before):
        return _Mention("unclear", top, "of an earlier examination?")
    return _Mention("stated", top)


def _all_scores(first: int, after: str) -> tuple[int, str, str]:
    """The highest of the scores that follow the name, what is doubtful in them, and the text after them."""
    if out_of := _OUT_OF.match(after):
        return first, "", after[out_of.end() :]
    if span := _RANGE.match(after):
        return max(first, int(span["other"])), "a range", after[span.end() :]
    top, doubt = first, ""
    while more := _LIST.match(after):
        if int(more["other"]) > top:
            top, doubt = int(more["other"]), "a score, or a number of lesions?" if "," in more["link"] else ""
        after = after[more.end() :]
    return top, doubt, after


def _is_maybe_earlier(before: str) -> bool:
    earlier = [found.end() for found in _MAYBE_EARLIER.finditer(before)]
    now = [found.end() for found in _NOW.finditer(before)]
    return bool(earlier) and max(now, default=-1) < max(earlier)


def _without_score(before: str, after: str) -> _Mention:
    """A mention that no score follows directly: of the system or its version; unclear if a number may belong to it."""
    after = re.split(_NAME, after, maxsplit=1, flags=re.IGNORECASE)[0]
    limit = re.match(rf"\s*(?:[<>≥≤]\s*=?|at\s+least|mindestens|minstens)\s*[1-5]{_NO_UNIT}", after, re.IGNORECASE)
    if limit:
        return _Mention("ignored", 0, "negated") if _NEGATED.search(before) else _Mention("unclear", 5, "a limit")
    number = rf"(?<![\d.,/a-z-])[1-5](?![\d/]|[.,]\d){_NO_UNIT}"
    if re.search(number, after, re.IGNORECASE) or re.search(
        rf"(?:score|category|grade|rat|kategorie)\w*\W+(?:\w+\W+){{0,2}}{number}[^.]*$", before, re.IGNORECASE
    ):
        return _Mention("unclear", 5, "a number that may be a score")
    return _Mention("ignored", 0, "without a score")
