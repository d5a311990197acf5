from __future__ import annotations

import copy

import torch

from tests.model.tiny import tiny_llama
from vattention.model.fingerprint import fingerprint


def test_the_same_weights_are_the_same_model() -> None:
    assert fingerprint(tiny_llama()) == fingerprint(tiny_llama())


def test_other_weights_types_and_shapes_are_other_models() -> None:
    model = tiny_llama()
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight += 1e-6
    others = [tiny_llama(seed=1), trained, copy.deepcopy(model).to(torch.bfloat16), tiny_llama(hidden_size=64)]
    assert len({fingerprint(model), *map(fingerprint, others)}) == 1 + len(others)
