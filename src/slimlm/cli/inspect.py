"""`slimlm inspect`."""

from slimlm.cli import options
from slimlm.cli.console import output, print_json
from slimlm.core.errors import CheckpointError


def inspect(folder: options.Folder, as_json: options.Json = False) -> None:
    """Show what is in a compressed folder: every layer and the totals. Checks the files' checksums."""
    from slimlm.cli.opened import kernels_for
    from slimlm.record import Record
    from slimlm.report.tables import layers_table, summary_table
    from slimlm.storage import checkpoint

    data = checkpoint.read_record(folder)
    checkpoint.verify_files(folder)
    kernels = kernels_for(folder)
    if as_json:
        print_json({**data, "kernels": kernels})
        return
    record = Record.from_dict(data)
    try:
        tables = layers_table(record), summary_table(record, kernels)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"the record of {folder} is damaged: {error!r}") from error
    output.print(tables[0])
    output.print()
    output.print(tables[1])
