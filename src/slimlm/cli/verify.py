"""`slimlm verify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import print_json, say_on_stderr, show
from slimlm.core.errors import DataError, SlimlmError

if TYPE_CHECKING:
    from torch import Tensor

_MOST_TOKENS = 4096


def verify(
    folder: options.Folder,
    text: Annotated[
        str | None,
        typer.Option(help=f"Measure the perplexity on this text, too: {options.EVALUATION_TEXT}.", show_default="not measured"),
    ] = None,
    length: options.MeasuredLength = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Stop reading the text after this many tokens.", show_default=str(_MOST_TOKENS)),
    ] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Check a compressed folder: checksums, masks, scales, that no layer is missing, and that the model runs."""
    for option, given in (("--length", length), ("--tokens", tokens)):
        if text is None and given is not None:
            raise SlimlmError(f"{option} needs --text: it says how much of a text is read, and none is named")

    from slimlm.report.tables import verified_table
    from slimlm.run.config import pick_device
    from slimlm.verification.folder import verify as verify_folder

    samples = None if text is None else _samples_for(folder, text, length, tokens or _MOST_TOKENS)
    found = verify_folder(folder, samples, device=pick_device(device))
    if as_json:
        print_json(found.to_dict())
    else:
        show(verified_table(found))
    found.raise_if_unsound()


def _samples_for(folder: Path, text: str, length: int | None, tokens: int) -> "Tensor":
    """Samples of a text for a checkpoint that is not opened."""
    from slimlm.evaluation.samples import MOST_LENGTH, text_windows
    from slimlm.models.opening import open_tokenizer, read_config
    from slimlm.storage import checkpoint

    checkpoint.read_record(folder)
    if (tokenizer := open_tokenizer(str(folder))) is None:
        raise DataError(f"{folder} has no tokenizer, so text cannot be read; add its tokenizer files to the folder")
    config = read_config(str(folder))
    own = config.get("text_config")
    context = (own if isinstance(own, dict) else config).get("max_position_embeddings")
    limit = context if isinstance(context, int) and context > 1 else MOST_LENGTH
    return text_windows(tokenizer, text, length=length, context=limit, at_most=tokens, notify=say_on_stderr, shrink=True)
