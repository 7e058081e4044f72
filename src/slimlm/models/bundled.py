"""The bundled model: five million parameters, trained on Python's standard library by examples/train_example_model.py."""

from pathlib import Path

from slimlm.core.errors import ModelError

NAME = "pystd-5m"


def bundled_model() -> Path:
    """The folder of the bundled model: in the installed package, or in the source tree it is run from."""
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "bundled" / NAME, here.parents[3] / "examples" / NAME):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(f"the bundled model {NAME} is not part of this installation; install slimlm from its source tree or wheel")
