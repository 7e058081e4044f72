"""`slimlm doctor`."""

from slimlm.cli import options
from slimlm.cli.console import print_json, say, show


def doctor(as_json: options.Json = False) -> None:
    """Show versions, processor, memory, GPU and kernels of this installation, with advice where something is missing."""
    from slimlm.cli import diagnosis

    found = diagnosis.examine()
    if as_json:
        print_json(found.to_dict())
        return
    show(diagnosis.table(found))
    for advice in found.advice or ("no problems found",):
        say(f"\n{advice}")
