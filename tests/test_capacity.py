"The costs that the paper's tables state, counted anew."

import pytest

from msad.capacity import capacity

PUBLISHED = (
    ("teacher", 1.0, 1.25),
    ("teacher", 0.75, 0.70),
    ("teacher", 0.5, 0.31),
    ("teacher", 0.25, 0.08),
    ("student", 1.0, 0.25),
    ("student", 0.75, 0.14),
    ("student", 0.5, 0.06),
    ("student", 0.25, 0.02),
)


@pytest.mark.parametrize(("role", "width", "published"), PUBLISHED)
def test_published_capacity(role, width, published):
    assert capacity(width, role) == pytest.approx(published, abs=0.015)


def test_unknown_width_is_refused():
    with pytest.raises(ValueError, match=r"width is 0\.3: choose one of 0\.25, 0\.5, 0\.75, 1\.0"):
        capacity(0.3, "teacher")


def test_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"role is 'pupil': choose one of teacher, student"):
        capacity(0.25, "pupil")
