from __future__ import annotations

import pytest
import torch

from gkd.models import Teacher, class_order


def test_equal_classes():
    assert class_order(["a", "b"], ["a", "b"]) is None
    assert class_order(["0", "1"], [0, 1]) is None


def test_permuted_classes():
    order = class_order(["cat", "dog", "owl"], ["owl", "cat", "dog"])
    assert order == [2, 0, 1]
    logits = torch.tensor([[1.0, 2.0, 3.0]])  # of cat, dog, owl
    assert Teacher(lambda images: logits, logit_order=order)(torch.zeros(1, 3, 4, 4)).tolist() == [[3.0, 1.0, 2.0]]
    assert Teacher(lambda images: {"logits": logits}, logit_order=order)(torch.zeros(1, 3, 4, 4)).tolist() == [[3.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (["cat", "dog", "ant"], r"got 3 and 3 classes; it alone has ant; the data alone has owl\)"),
        (["cat", "dog"], r"got 2 and 3 classes; the data alone has owl\)"),
        (["cat", "dog", "owl", "a", "b", "c", "d"], r"got 7 and 3 classes; it alone has a, b, c, \.\.\.\)"),
        (["cat", "cat", "owl"], r"the data alone has dog\)"),
    ],
)
def test_other_classes(theirs, message):
    with pytest.raises(ValueError, match=f"Expected the classes of the teacher to be those of the data .*{message}"):
        class_order(theirs, ["owl", "cat", "dog"])


@pytest.mark.parametrize("order", [[0, 0], [-1, 0]])
def test_order_that_is_none(order):
    with pytest.raises(ValueError, match="Expected logit_order to name a position"):
        Teacher(torch.nn.Identity(), logit_order=order)
