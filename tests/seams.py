"""The table of seams x subjects: every layer, every weight parametrization, every fitted preprocessing, wherever each applies.

``python tests/seams.py`` prints it.
"""

from __future__ import annotations

import module_seams
import value_seams
import view_seams
from seam import SEAMS
from subjects import SUBJECTS

PARTS = (module_seams, value_seams, view_seams)  # which enter their contexts into the table
CASES = [(one, subject) for one in SEAMS.values() for subject in SUBJECTS if one.applies(subject)]

if __name__ == "__main__":
    for _seam in SEAMS.values():
        _count = sum(one is _seam for one, _ in CASES)
        print(f"{_seam.name:50} {_count:3} of {len(SUBJECTS)}  {_seam.but}")
    print(f"{len(SEAMS)} contexts, {len(CASES)} cases")
