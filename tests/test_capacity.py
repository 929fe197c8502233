"The costs that the paper's tables state, counted anew."

import pytest

from msad.evaluation.capacity import backbone_capacity

PUBLISHED = {
    "teacher": {0.25: 0.08, 0.5: 0.31, 0.75: 0.70, 1.0: 1.25},
    "student": {0.25: 0.02, 0.5: 0.06, 0.75: 0.14, 1.0: 0.25},
}


@pytest.mark.parametrize("role", PUBLISHED)
@pytest.mark.parametrize("width", PUBLISHED["teacher"])
def test_published_capacity(width, role):
    assert backbone_capacity(width, role) == pytest.approx(PUBLISHED[role][width], abs=0.0125)


def test_unknown_width_is_refused():
    with pytest.raises(ValueError, match=r"width is 0\.3: choose one of 0\.25, 0\.5, 0\.75, 1\.0"):
        backbone_capacity(0.3, "teacher")


def test_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"role is 'pupil': choose one of teacher, student"):
        backbone_capacity(0.25, "pupil")
