"""Settings of every test and doctest."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside one another; threads of their own would fight

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Found by the same search everywhere: a failure seen once is seen again. No deadline, as machines are slow at will.
settings.register_profile("normkit", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.load_profile("normkit")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, nn=torch.nn)
