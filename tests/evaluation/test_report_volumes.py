"""Volumes in reports, written as people write them, and their agreement with segmented volumes."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.data.phantom.report_text import Findings, write_report
from ccella_fast.evaluation.report_volumes import stated_volume, volume_agreement


@pytest.mark.parametrize(
    ("report", "volume"),
    [
        ("Prostate volume 45 ml.", 45),
        ("The prostate measures 4.8 x 3.9 x 4.1 cm (40.2 cc). PSA 6.1 ng/ml, PSA density 0.15 ng/ml/cc.", 40.2),
        ("Gland volume: approximately 38,5 cm3", 38.5),
        ("Volume 52 cm³, PSAD 0.1.", 52),
        ("The gland is enlarged with an estimated volume of 110-cc.", 110),
        ("PROSTATE: 60mL", 60),
        ("Prostate size 5 x 4 x 4 cm, volume 42 cubic centimeters", 42),
        ("De prostaat heeft een volume van 30 cc. PSA densiteit: 0,36.", 30),
        ("Volume of the prostate is 40-44 ml.", 42),
        ("Prostate volume 45 ml (previously 40 ml).", 45),
        ("Prostate volume 60 cc, transition zone volume 35 cc.", 60),
        ("Prostate volume 45 ml. Repeated: the gland has 45 cc.", 45),
        ("The prostate has 33 ml. After 15 ml Dotarem i.v. no early enhancement of the gland.", 33),
        ("Prostate volume 61 ml. Post-void residual 120 ml.", 61),
        ("Tumour volume 6.5 cc in a gland of 48 cc.", 48),
        ("T2, DWI and DCE of the prostate during contrast (15 ml Dotarem i.v.).", None),
        ("PSA 12 ng/ml. Prostate unremarkable.", None),
        ("Transition zone volume 22 cc.", None),
        ("Prostate lesion of 6 ml.", None),
        ("Prostate volume 0.4 cc.", None),
        ("Prostate 812 ml.", None),
        ("Prostate volume 45 ml. The gland measures 54 cc.", None),  # which of both?
        ("PSA density 20 ng/ml/cc of the gland", None),
        ("Gland at level 45 cclosure", None),
        ("", None),
    ],
)
def test_stated_volume(report, volume):
    assert stated_volume(report) == volume


def test_every_phantom_states_its_volume():
    rng = np.random.default_rng(0)
    for number in range(60):
        pirads = 1 + number % 5
        lesion = ("PZ", "left", "mid", 12) if pirads > 2 else ("", "", "", 0)
        findings = Findings(30 + number, 5.5 + number / 10, pirads, *lesion)
        assert stated_volume(write_report(rng, findings)) == 30 + number


def test_agreement_bias_and_limits():
    rng = np.random.default_rng(0)
    stated, real_stated = rng.uniform(20, 90, 60), rng.uniform(20, 90, 50)
    segmented = 0.6 * stated + rng.normal(0, 3, 60)
    real_segmented = real_stated + rng.normal(0, 3, 50)
    found = volume_agreement([*stated, None, 30.0], [*segmented, 40.0, None], list(real_stated), list(real_segmented))
    assert found.agreement.n_synthetic == 60 and found.agreement.n_real == 50
    assert 0.9 < found.agreement.value < 1 and 0.9 < found.agreement.normalized < 1.1
    differences = segmented - stated
    assert found.bias_cc == pytest.approx(differences.mean()) and abs(found.real_bias_cc) < 1.5
    spread = 1.96 * differences.std(ddof=1)
    assert found.limits_cc == pytest.approx((differences.mean() - spread, differences.mean() + spread))
    shuffled = volume_agreement(list(rng.permutation(stated)), list(segmented), list(real_stated), list(real_segmented))
    assert abs(shuffled.agreement.normalized) < 0.3 and shuffled.agreement.p > 0.02
    two = volume_agreement([30.0, 40.0], [31.0, 43.0], [], [])
    assert two.bias_cc == 2 and two.limits_cc == pytest.approx((2 - 1.96 * 2**0.5, 2 + 1.96 * 2**0.5))
    assert two.real_bias_cc is None and two.agreement.guards == ["few", "one_class"]
    nothing = volume_agreement([None], [20.0], [30.0], [31.0])
    assert nothing.agreement.value is None and nothing.bias_cc is None and nothing.limits_cc is None
    assert nothing.real_bias_cc == 1 and nothing.real_limits_cc is None
