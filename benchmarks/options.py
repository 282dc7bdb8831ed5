"""The command lines of the benchmarks: each answers `--help` with its module's docstring, and before it does any work.

`benchmarks.gpu` has options of its own and parses them with tyro.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter


def make_parser(module: str, docstring: str | None) -> ArgumentParser:
    """Makes the parser of `python -m benchmarks.MODULE`, which has `--help` and what is added to it."""
    return ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=docstring, formatter_class=RawDescriptionHelpFormatter
    )


def describe_library(module: str, docstring: str | None) -> None:
    """Prints what a module is that other benchmarks import, for one who runs it with `python -m`."""
    parser = make_parser(module, docstring)
    parser.parse_args()
    parser.print_help()
