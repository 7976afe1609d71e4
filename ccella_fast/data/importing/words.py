"""Words of series descriptions that say what a series is, in several languages. Others are not kept: they may be a name."""

from __future__ import annotations

import re
import unicodedata

#: What a word means -> its spellings. A word is a run of letters and digits, in lower case, without accents.
_SPELLINGS = {
    "t2": "t2 t2w t2wi t2tse t2fse t2spc",
    "t1": "t1 t1w t1wi t1tse t1fse",
    "adc": "adc dadc apparent",
    "dwi": "dwi dwis diff diffusion diffusie difusion diffusionsgewichtet dw ep2d resolve",
    "trace": "trace tracew isotropic",
    "calculated": "calc calculated computed synthetic berechnet berekend calcule calculado cdwi",
    "localizer": "loc localizer localiser scout survey lokalisator reperage localizador surview topogram",
    "dynamic": "dce dyn dynamic dynamisch dynamique dinamico perfusion perf twist vibe lava thrive disco",
    "subtraction": "sub subtraction subtracted subtraktion subtractie soustraction",
    "map": "map mapping t2map t1map relaxometry quant ktrans kep",
    "exponential": "eadc exponential exp",
    "fat suppressed": "fs fatsat spair spir stir tirm dixon",
    "single shot": "haste ssfse ssh",
    "large field": "pelvis becken bekken bassin pelvic lymph nodes abdomen spine wirbelsaule",
}
_MEANINGS = {word: meaning for meaning, words in _SPELLINGS.items() for word in words.split()}


def known_words(description: str) -> frozenset[str]:
    """The meanings of the words of a series description; of b1400 also `b1400`."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", description.lower()) if not unicodedata.combining(c))
    words = re.findall(r"[a-z0-9]+", plain)
    return frozenset([_MEANINGS[word] for word in words if word in _MEANINGS] + _b_values(words))


def _b_values(words: list[str]) -> list[str]:
    """`b1400` for the words b1400, b1400s or the words b 1400."""
    joined = " ".join(words)
    return [f"b{int(value)}" for value in re.findall(r"\bb ?(?:value |wert |waarde )?(\d{2,5})(?:s|t)?\b", joined)]
