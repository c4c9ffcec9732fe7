"""Files of figures."""

from matplotlib.figure import Figure

from melt_jax.config import InputError
from melt_jax.files import PathLike, as_path, make_folder, written_on_disk

FORMATS = (".png", ".svg", ".pdf")


def check_name(output: PathLike) -> None:
    """Raises InputError if a file's name does not end in one of `FORMATS`."""
    if as_path(output, "--output").suffix not in FORMATS:
        name = as_path(output).name
        raise InputError(f"--output: expected a name that ends in {', '.join(FORMATS)}, found {name!r}")


def save(figure: Figure, output: PathLike) -> None:
    """Writes a figure to a file and creates the file's folder.

    Raises:
      InputError: see `check_name`.
    """
    check_name(output)
    output = as_path(output)
    make_folder(output.parent)
    with written_on_disk(output) as file:
        figure.savefig(file, dpi=150)
