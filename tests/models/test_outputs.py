from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gkd.models import read_logits

LOGITS, ELSE = torch.zeros(2, 3), torch.ones(2, 7)
Heads = namedtuple("Heads", ["aux", "logits"])


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"aux": ELSE, "logits": LOGITS},
        {"aux": ELSE, "out": LOGITS},
        OrderedDict(out=ELSE, logits=LOGITS),
        {"loss": None, "prediction": LOGITS, "aux": ELSE},
        {"logits": None, "prediction": LOGITS},
        (LOGITS, ELSE),
        [None, LOGITS],
        Heads(ELSE, LOGITS),
        Output(LOGITS),
    ],
)
def test_logits_of_common_outputs(output):
    assert read_logits(output) is LOGITS


def test_model_output():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    assert read_logits(outputs.ImageClassifierOutput(loss=ELSE, logits=LOGITS)) is LOGITS


@pytest.mark.parametrize(
    ("output", "got"), [({"boxes": 3}, "dict of boxes"), (3.0, "float"), ("text", "str"), ((), "tuple"), ({}, "dict of nothing")]
)
def test_output_without_a_tensor(output, got):
    with pytest.raises(ValueError, match=rf"Expected a network that returns its logits: .* \(got {got}\)"):
        read_logits(output)
