"The costs that the paper's tables state, counted anew."

import pytest

from msad.capacity import capacity
from msad.comparison import PUBLISHED_RESULTS


@pytest.mark.parametrize("published", PUBLISHED_RESULTS, ids=lambda published: f"{published.role}-{published.width}")
def test_published_capacity(published):
    assert capacity(published.width, published.role) == pytest.approx(published.capacity, abs=0.0125)


def test_unknown_width_is_refused():
    with pytest.raises(ValueError, match=r"width is 0\.3: choose one of 0\.25, 0\.5, 0\.75, 1\.0"):
        capacity(0.3, "teacher")


def test_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"role is 'pupil': choose one of teacher, student"):
        capacity(0.25, "pupil")
