"""What is known of the hub before it is asked for files: whether it answers, and which names it can have.

huggingface_hub tries an address that does not answer six times, for half a minute, and prints each try.
"""

from slimlm.core.errors import first_line

_TIMEOUT = 10
"""Seconds, as huggingface_hub waits for an answer."""

_OLD_NAMES = (
    ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt"),
    ("ctrl", "transfo-xl-wt103", "xlnet-base-cased", "xlnet-large-cased"),
)
_MODELS_WITHOUT_OWNER = frozenset(name for names in _OLD_NAMES for name in names)
"""Causal language models whose names have no owner; the hub gives no more such names."""


def can_be_model(name: str) -> bool:
    """Whether a model on the hub can have this name: OWNER/NAME, or one of a few old names without an owner."""
    return name in _MODELS_WITHOUT_OWNER or len([part for part in name.split("/") if part]) == 2 == len(name.split("/"))


def unreachable() -> str | None:
    """Why the hub does not answer; None: it does, or it is not to be asked (HF_HUB_OFFLINE), and its cache is used."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as error:  # The class belongs to the HTTP client, which differs between versions of huggingface_hub.
        return f"{constants.ENDPOINT} does not answer: {first_line(error)}"
    return None
