"""Student's distribution against closed forms and tables."""

import math

import pytest

from ccella_fast.evaluation.student import student_quantile, student_tail


def test_students_distribution():
    for t in (0.0, 0.3, 1.0, 2.5, 7.0, 60.0):
        assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-9, abs=1e-12)
        assert student_tail(t, 2) == pytest.approx(0.5 * (1 - t / math.sqrt(2 + t * t)), rel=1e-7, abs=1e-12)
        assert student_tail(-t, 3.7) == pytest.approx(1 - student_tail(t, 3.7))
        assert student_tail(t, math.inf) == pytest.approx(0.5 * math.erfc(t / math.sqrt(2)))
        assert student_tail(t, 9e4) == pytest.approx(student_tail(t, math.inf), rel=1e-2, abs=1e-12)
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 7: 2.36462, 30: 2.04227, 120: 1.97993, math.inf: 1.95996}
    for df, quantile in table.items():
        assert student_quantile(0.025, df) == pytest.approx(quantile, rel=3e-6)
