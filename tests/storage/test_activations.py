"""Activations are the same from memory and from files, one rank's and those of many."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimlm.distributed.group import ALONE
from slimlm.run.transport import ActivationTransport
from slimlm.storage.activations import ActivationStore, FileBatches
from slimlm.storage.journal import BlockContent, Content, Journal


def drawn(*sizes: int) -> list[Tensor]:
    """Batches of so many samples each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 2, generator=generator) for size in sizes]


def equal(found: object, expected: list[Tensor]) -> bool:
    batches = list(found)  # type: ignore[call-overload]
    return len(batches) == len(expected) and all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_held_is_given_back_batch_by_batch_and_leaves_no_file(in_memory: bool, tmp_path: Path) -> None:
    batches = drawn(2, 2, 1)
    held = ActivationStore(tmp_path, in_memory).hold("x", iter(batches), 5)
    assert equal(held, batches) and isinstance(held, list) == in_memory
    assert equal(held[1:], batches[1:])
    assert list(tmp_path.iterdir()) == []


def test_a_batch_from_a_file_is_a_copy(tmp_path: Path) -> None:
    held = ActivationStore(tmp_path, in_memory=False).hold("x", drawn(2), 2)
    before = held[0].clone()
    held[0].zero_()
    assert torch.equal(held[0], before)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_holds_the_activations_of_all_ranks_and_each_reads_its_own(in_memory: bool, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, in_memory)
    streams = {"compressed": drawn(2, 1), "original": [2 * batch for batch in drawn(2, 1)]}
    sent = iter([drawn(2), [3 * batch for batch in drawn(2)]])
    path = tmp_path / "inputs.safetensors"
    _, own = store.write(path, {name: iter(stream) for name, stream in streams.items()}, (3, 2), lambda: next(sent))
    assert all(equal(own[name], streams[name]) for name in streams)
    assert isinstance(own["compressed"], FileBatches) != in_memory
    for name, other in (("compressed", drawn(2)), ("original", [3 * batch for batch in drawn(2)])):
        assert equal(store.load(path, 2, slice(3))[name], streams[name])
        assert equal(store.load(path, 2, slice(3, 5))[name], other)


def test_a_block_is_committed_after_its_files_and_its_inputs_are_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    transport = ActivationTransport(journal, ActivationStore(tmp_path, in_memory=False), ALONE, (3,))
    assert equal(transport.begin({"compressed": iter(drawn(2, 1))})["compressed"], drawn(2, 1))

    def outputs() -> object:
        # They are computed while they are written: the block's own file is there, and nothing is named yet.
        assert (tmp_path / "block-0001.safetensors").is_file() and journal.blocks == ()
        yield from [batch + 1 for batch in drawn(2, 1)]

    block = BlockContent("layers.0", {"layers.0.weight": torch.ones(2, 2)}, {}, [])
    own = transport.commit(block, {"compressed": outputs()})  # type: ignore[dict-item]
    assert [finished.name for finished in journal.blocks] == ["layers.0"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"journal.json", "block-0001.safetensors", "inputs-0001.safetensors"}
    again = ActivationTransport(Journal(tmp_path, journal.content), transport.store, ALONE, (3,)).resume(2)
    assert equal(own["compressed"], list(again["compressed"]))
    assert torch.equal(journal.tensors().tensors["layers.0.weight"], torch.ones(2, 2))


def test_the_content_of_a_journal_is_plain_data_and_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.match_identity({"recipe": "slim"})
    journal.note_tensor("text", torch.arange(4))
    content = Content.from_dict(journal.content.to_dict())
    assert content == journal.content and not content.holds_work
    copy = Journal(tmp_path, content)
    noted = copy.noted_tensor("text")
    assert noted is not None and torch.equal(noted, torch.arange(4))
