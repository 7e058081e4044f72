"""`slimlm inspect`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimlm.cli import options
from slimlm.cli.console import print_json, say, show
from slimlm.core.errors import CheckpointError, SlimlmError

if TYPE_CHECKING:
    from slimlm.record import Record


def inspect(
    folder: options.Folder,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Also print the stored checksum of every tensor; only with --json.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Show what is in a compressed folder: every layer and the totals. Checks the files' checksums."""
    if checksums and not as_json:
        raise SlimlmError("--checksums adds to what --json prints; give both")

    from slimlm.cli.opened import kernels_for
    from slimlm.record import Record
    from slimlm.report.tables import layers_table, summary_table
    from slimlm.storage import checkpoint

    data = checkpoint.read_record(folder)
    checkpoint.verify_files(folder)
    kernels = kernels_for(folder)
    record = Record.from_dict(data)
    if as_json:
        print_json({**_in_short(data, record, checksums=checksums), "kernels": kernels})
        return
    try:
        tables = layers_table(record), summary_table(record, kernels)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"the record of {folder} is damaged: {error!r}") from error
    show(tables[0])
    say("")
    show(tables[1])


def _in_short(data: dict[str, Any], record: "Record", *, checksums: bool) -> dict[str, Any]:
    """The record's content with the bits per weight of each layer, and without the checksum of each tensor."""
    rows = {
        key: [{**row, "bits_per_weight": own.bits_per_weight} for row, own in zip(data.get(key, []), layers, strict=True)]
        for key, layers in (("layers", record.layers), ("embeddings", record.embeddings))
    }
    files = data["files"]
    if not checksums:
        files = {name: {key: value for key, value in file.items() if key != "tensors"} for name, file in files.items()}
    return {**data, **rows, "files": files}
