"""Prints the temporary memory of the training gradient beside that of plain differentiation.

    python launch/gradient_table.py                      both phases, 4 to 32 chunks, about two minutes
    python launch/gradient_table.py --chunks 4 8 --phases alignment --remat layer

Both gradients are compiled, not run. Run it in the repository's folder with the Python of the virtual environment.
"""

import argparse
import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # the repository is not installed as a package

from melt_jax.analysis.gradient_memory import CHUNKS, MINIATURE, PHASES, print_table
from melt_jax.config import CHOICES, InputError


def main() -> None:
    """Reads the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="numbers of chunks in a sequence")
    parser.add_argument("--chunk_size", type=int, default=32, help="tokens per chunk")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=[*PHASES])
    parser.add_argument("--remat", choices=CHOICES["remat"], default="none", help="see ModelConfig")
    args = parser.parse_args()
    config = dataclasses.replace(MINIATURE, remat=args.remat)
    try:
        print_table(config, args.phases, args.batch, args.chunk_size, args.chunks)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
