"""Every subject through every seam that applies; see ``seams``."""

import pytest

from seam import Seam
from seams import CASES
from subjects import Subject


# torch's own forward mode scripts its decompositions, and its vmap runs some operators one by one; it warns of both.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("seam", "subject"), [pytest.param(*case, id=f"{case[0].name}-{case[1].name}") for case in CASES]
)
def test_at_every_seam(seam: Seam, subject: Subject) -> None:
    seam.run(subject)
