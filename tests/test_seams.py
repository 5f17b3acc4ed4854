"""Every subject through every seam that applies, see ``compatibility``; and views of any shape."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compatibility import CASES
from laws import channels_first, sub_batch
from normkit.core.errors import ShapeError
from seam import Seam, near
from subjects import SUBJECTS, Subject, definition, gradients


# torch's own forward mode scripts its decompositions, and its vmap runs some operators one by one; it warns of both.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize(("seam", "subject"), CASES, ids=lambda one: one.name)
def test_at_every_seam(seam: Seam, subject: Subject) -> None:
    seam.run(subject)


@pytest.mark.parametrize("subject", [one for one in SUBJECTS if one.is_rule], ids=lambda one: one.name)
@given(data=st.data())
def test_views_of_any_shape(subject: Subject, data: st.DataObject) -> None:
    made = subject.fresh()
    spatial = data.draw(st.lists(st.integers(1, 4), max_size=3))
    samples = data.draw(st.integers(1, 3)) * sub_batch(subject.card)
    shape = [samples, 4, *spatial] if channels_first(subject.card) else [samples, *spatial, 4]
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    memory = torch.randn([shape[axis] * steps[axis] for axis in order], dtype=torch.float64) + 1
    view = memory[tuple(slice(None, None, steps[axis]) for axis in order)]
    for axis in range(len(shape)):
        if data.draw(st.booleans()) and axis == len(shape) - 1:
            view = view.select(order.index(axis), 0).unsqueeze(order.index(axis)).expand_as(view)
    view = view.permute([order.index(axis) for axis in range(len(shape))])
    assert list(view.shape) == shape
    try:
        wanted = definition(made, (view,))
    except ShapeError:
        with pytest.raises(ShapeError):
            made(view)
        return
    found = gradients(copy.deepcopy(made), (view,))
    # A constant set has a scale of eps alone, which magnifies the last place.
    near(found, wanted)
