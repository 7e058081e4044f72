"""Flags that several verbs share.

A parameter of a verb has the name of the library's argument that it becomes, so that errors which name an argument can be shown
with its flag (slimlm.cli.verb).
"""

from pathlib import Path
from typing import Annotated

import typer

from slimlm.core import arguments
from slimlm.core.errors import DataError
from slimlm.core.objective import Objective
from slimlm.data.documents import DEFAULT_DATA
from slimlm.data.rows import Chat
from slimlm.runtime.kernel_names import Kernels

_TEXTS = "a .txt, .jsonl or .parquet file, a folder of them, a hub data set"
EVALUATION_TEXT = f"{_TEXTS}, or stdlib (Python's own source)"

Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress; notes and errors are still shown.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub name.")]
AnyModel = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a model, compressed or not.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Compressed folder.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]

RecipeName = Annotated[str, typer.Option(help="Name of a recipe (slimlm methods lists them) or a .toml file.")]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Average bits per weight to spend, everything counted; each layer is then planned.",
        show_default="no budget; all layers by the recipe",
    ),
]
BudgetObjective = Annotated[Objective, typer.Option(help="What a budget counts: stored bits (size) or run time (speed).")]
EmbeddingBits = Annotated[
    int | None,
    typer.Option(
        help="Bits of the token embedding and lm_head: 4 to 8, or 16 to keep them as stored.",
        show_default="those of the recipe",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Do not compress layers whose full name fits, such as '*.down_proj', in addition to those that the recipe "
        "ignores; may be given several times.",
        show_default="none in addition",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Calibration text: {_TEXTS}, stdlib (Python's own source), or self (text that the model writes); may be given "
        "several times.",
        show_default=DEFAULT_DATA,
    ),
]
Share = Annotated[
    list[float] | None,
    typer.Option(
        help="Share of the samples that the --data before it gives, such as 0.7; one for each, and 1 together.",
        show_default="equal shares",
    ),
]
ChatTemplate = Annotated[
    Chat,
    typer.Option(
        help="What the tokenizer's chat template is applied to: conversations in the calibration text (auto), text, too, as a "
        "message of the user (yes), or nothing (no)."
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Calibration samples.", show_default="as many as the model and the recipe need"),
]
Length = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per calibration sample; at most the model's context is used.", show_default="512"),
]
Seed = Annotated[int, typer.Option(help="Seed by which calibration samples are drawn.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for calibration activations, such as 8GB; more stay on the disk. A plan that needs more is refused.",
        show_default="half of the free memory",
    ),
]

ChosenKernels = Annotated[Kernels, typer.Option(help="Kernels for compressed layers; auto: the fastest that support a layer.")]
MeasuredLength = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per sample of the text.", show_default="the model's context, at most 2048"),
]


def sources_of(data: list[str] | None, share: list[float] | None) -> str | dict[str, float] | None:
    """The calibration text that --data and --share name together; raises DataError where they do not belong together."""
    names = data or []
    if share is not None and len(share) != len(names):
        raise DataError(
            f"--data is given {len(names)} times and --share {len(share)} times; give one share for each text, or none "
            "for equal shares"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"--data {twice[0]} is given twice; name each text once, and give it a larger --share")
    if share is None and len(names) < 2:
        return names[0] if names else None
    return dict(zip(names, share or [1 / len(names)] * len(names), strict=True))


def bytes_of(text: str | None) -> int | None:
    """The size that --memory names, in bytes; raises SlimlmError where it names none."""
    return None if text is None else arguments.size(text, "memory")
