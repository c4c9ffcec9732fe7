"""Files of figures."""

import pathlib

from matplotlib.figure import Figure

from melt_jax.config import InputError

FORMATS = (".png", ".svg", ".pdf")


def check_name(output: str | pathlib.Path) -> None:
    """Raises InputError if a file's name does not end in one of `FORMATS`."""
    if pathlib.Path(output).suffix not in FORMATS:
        name = pathlib.Path(output).name
        raise InputError(f"--output: expected a name that ends in {', '.join(FORMATS)}, found {name!r}")


def save(figure: Figure, output: str | pathlib.Path) -> None:
    """Writes a figure to a file and creates the file's folder.

    Raises:
      InputError: see `check_name`.
    """
    check_name(output)
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
