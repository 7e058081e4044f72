"""A model that runs from stored tensors copies nothing that it does not run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from slimlm.evaluation.stored_model import StoredModel
from slimlm.models.lazy import open_lazy
from slimlm.models.structure import blocks_of


def test_blocks_that_are_replaced_are_not_copied(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = open_lazy(str(llama_folder), None, pytest.fail)
    stored, ids = StoredModel(lazy.model, lazy.weights, lazy.release), torch.arange(8)[None]
    blocks = blocks_of(lazy.model)

    def refused(_: Any, memo: dict[int, Any]) -> None:
        pytest.fail("a block was copied")

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0]

    monkeypatch.setattr(type(next(iter(blocks.values()))), "__deepcopy__", refused, raising=False)
    model = stored.around(dict.fromkeys(blocks, given))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        hidden = model.model.norm(model.model.embed_tokens(ids))
        assert torch.equal(logits, model.lm_head(hidden))
    assert blocks_of(lazy.model) == blocks, "the meta model has its blocks"
