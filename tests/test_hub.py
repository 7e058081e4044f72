"""Names that the hub cannot have, and a hub that does not answer, are refused at once."""

import time

import pytest

from slimlm import hub
from slimlm.core.errors import ModelError
from slimlm.models.opening import read_config


@pytest.mark.parametrize(
    ("name", "can_be"),
    [("owner/name", True), ("gpt2", True), ("my-model", False), ("a/b/c", False), ("owner/", False), ("/name", False)],
)
def test_models_on_the_hub_have_an_owner_and_a_name(name: str, can_be: bool) -> None:
    assert hub.can_be_model(name) == can_be


def test_a_name_that_is_no_folder_and_cannot_be_on_the_hub_is_refused_without_asking_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slimlm.models.opening.unreachable", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=r"neither a folder here nor a name that a model on the hub can have \(OWNER/NAME\)"):
        read_config("my-model")


def test_an_address_that_does_not_answer_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing listens on this port, so the connection is refused at once.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"'owner/name' is neither .* \(http://127.0.0.1:9 does not answer: "):
        read_config("owner/name")
    assert time.monotonic() - began < 5, "six tries take 20 seconds and more"


def test_an_offline_hub_is_not_asked_whether_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("the hub was asked"))
    assert hub.unreachable() is None
