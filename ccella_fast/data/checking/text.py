"""Reports as the text encoder will see them: language, unknown tokens, truncation. Only numbers and ids are kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ccella_fast.config import Config, TextConfig
from ccella_fast.data.checking.findings import Finding
from ccella_fast.data.readers.study import Study
from ccella_fast.errors import ConfigError

_UNKNOWN = 0.02  # share of tokens
# Frequent words that radiology reports contain and the other languages here do not.
_STOP_WORDS = {
    "English": "the of and is with are there without for from no not was this has which left right"
    " seen nodes bones vesicles none size gland",
    "Dutch": "het een van zijn niet geen naar bij aan wordt dat voor met links rechts er deze laesie perifere",
    "German": "der das und ist mit keine nicht im eine bei den dem links rechts kein sowie auf läsion periphere peripheren"
    " von ohne nachweis suspekte unauffällig samenblasen lymphknoten apikal erniedrigt",
    "French": "les des dans une est pas avec du sur sans gauche droite au aux et par ne lésion périphérique",
    "Spanish": "los las del una en con sin izquierda derecha el por se que no hay lóbulo lesión"
    " zona periférica izquierdo derecho vesículas",
    "Italian": "il della nel con una di sinistra destra non del alla che lesione sono dei nella periferica",
    "Portuguese": "uma com sem não esquerda direita da do na em dos das os observa lesão na",
    "Swedish": "och är av ett med inte utan vid på som till vänster höger finns körtel förändring hö vä",
    "Danish or Norwegian": "og er av et med ikke uten uden ved på som til venstre høyre højre forandring",
    "Polish": "na nie bez oraz jest się po lewej prawej stronie zmiana strefie obwodowej stercza węzły chłonne gruczoł",
    "Czech": "je na bez se není vlevo vpravo ložisko zóně periferní prostaty uzliny žláza oboustranně",
    "Turkish": "ve bir ile sol sağ olup zonda lezyon periferik izlendi yok saptanmadı prostatın",
    "Finnish": "ja ei vasemmalla oikealla eturauhasen eturauhanen muutos ilman sekä ovat",
    "Hungarian": "és az nem bal jobb oldali elváltozás nélkül perifériás zónában nyirokcsomó",
    "Romanian": "și cu în fără stânga dreapta leziune periferică este nu pe zona",
}
_FEW_WORDS = 15  # of a report; English of more words contains some of the frequent ones
_WORDS = {language: frozenset(words.split()) for language, words in _STOP_WORDS.items()}


def check_reports(studies: Sequence[Study], config: Config) -> list[Finding]:
    """Findings about the reports of these studies; none for a variant that does not read reports."""
    written = [study for study in studies if study.report]
    if not written or not config.model.traits.text:
        return []
    return [*_languages(written), *_tokens(written, config)]


def language_of(report: str) -> str | None:
    """The language of a report by its frequent words, or what it is not; None if it is too short to tell."""
    letters = [letter for letter in report if letter.isalpha()]
    if sum(ord(letter) > 0x2FF for letter in letters) > len(letters) / 2:
        return "not in Latin letters"
    words = Counter(re.findall(r"[^\W\d_]+", report.lower()))
    scores = {language: sum(words[word] for word in common) for language, common in _WORDS.items()}
    best = max(scores, key=lambda language: scores[language])
    if scores[best] >= 3 and scores[best] > 1.2 * scores["English"]:
        return best
    if scores["English"] == 0 and sum(count for word, count in words.items() if len(word) > 2) > _FEW_WORDS:
        return "not in English"
    return "English" if best == "English" else None


def _languages(written: list[Study]) -> list[Finding]:
    languages = {study.id: language_of(study.report or "") for study in written}
    foreign = {study: language for study, language in languages.items() if language not in (None, "English")}
    if not foreign:
        return []
    counts = ", ".join(f"{count} {language}" for language, count in Counter(foreign.values()).most_common())
    why = f"reports that seem not to be English: {len(foreign)} of {len(written)} ({counts})"
    fix = "translate them, or choose a text.encoder that was trained on this language"
    return [Finding("report_language", "warning", why, fix, tuple(foreign))]


def _tokens(written: list[Study], config: Config) -> list[Finding]:
    tokenizer = _load_tokenizer(config.text)
    if tokenizer is None:
        why = f"the tokenizer of {config.text.encoder} is not on this machine: unknown tokens and truncation were not counted"
        return [Finding("no_tokenizer", "info", why)]
    tokens, unknown, many, long = 0, 0, [], []
    for study in written:
        ids = tokenizer(study.report, verbose=False)["input_ids"]
        of_study = sum(token == tokenizer.unk_token_id for token in ids)
        tokens, unknown = tokens + len(ids), unknown + of_study
        if of_study > _UNKNOWN * len(ids):
            many.append(study.id)
        if len(ids) > config.text.max_length:
            long.append(study.id)
    found = [
        Finding("tokens", "info", f"{tokens / len(written):.0f} tokens per report, {unknown / tokens:.1%} unknown")
    ]
    if many:
        why = f"reports with more than {_UNKNOWN:.0%} of tokens that the encoder does not know: {len(many)} of {len(written)}"
        fix = "check the encoding of the file, or choose another text.encoder"
        found.append(Finding("unknown_tokens", "warning", why, fix, tuple(many)))
    if long:
        why = f"reports of more than {config.text.max_length} tokens, which lose their beginning: {len(long)} of {len(written)}"
        found.append(
            Finding("truncated_reports", "warning", why, "raise text.max_length, or shorten them", tuple(long))
        )
    return found


def _load_tokenizer(config: TextConfig) -> Any:
    """The encoder's tokenizer if it is on this machine, else None; nothing is downloaded."""
    from transformers import AutoTokenizer

    from ccella_fast.data.text_encoder import locate_encoder

    try:
        location, _ = locate_encoder(config.encoder)
        return AutoTokenizer.from_pretrained(
            location, revision=config.revision, local_files_only=True, trust_remote_code=False
        )
    except (ConfigError, OSError, ValueError, ImportError):
        return None
