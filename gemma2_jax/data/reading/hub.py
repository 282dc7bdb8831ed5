"""Data sets of the Hugging Face Hub, downloaded once into the cache of the library `datasets`.

What it keeps there are Arrow files, which `columnar` reads as any others.
"""

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from gemma2_jax.data.reading.files import File, first_line

_EXTRA = "pip install 'gemma2-jax[datasets]'"


def is_hub_name(source: str) -> bool:
    """Whether a source looks like owner/name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None


@functools.cache  # finding out costs requests to the Hub, and a run must not see two revisions
def find_splits(name: str, subset: str) -> dict[str, tuple[File, ...]]:
    """The Arrow files of a data set, by split. `subset` is "" where it has one alone.

    Raises ValueError where there is no such data set or subset, it is gated, or it cannot be downloaded.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"there is no file or folder {name!r}; to look for a data set of that name on the Hub: {_EXTRA}"
        ) from error
    try:
        splits = datasets.load_dataset(name, subset or None)
    except Exception as error:  # of the library, its builders, HTTP and the disk
        raise ValueError(_explain(name, subset, error)) from error
    return {split: tuple(_list_files(dataset)) for split, dataset in splits.items()}


def _list_files(dataset) -> Iterator[File]:
    for cached in dataset.cache_files:
        path = Path(cached["filename"])
        # The folder is named after the revision of the data set, whichever machine downloaded it.
        mark = "/".join(path.parts[-4:])
        yield File(path=str(path), below=path.name, size=path.stat().st_size, mark=mark)


def _explain(name: str, subset: str, error: Exception) -> str:
    """What went wrong, and what to do about it."""
    from huggingface_hub import constants

    text = str(error)
    address = f"{constants.ENDPOINT}/datasets/{name}"
    if available := re.search(r"available configs: \[(.*?)\]", text, re.DOTALL) or re.search(
        r"Available: \[(.*?)\]", text, re.DOTALL
    ):
        subsets = ", ".join(re.findall(r"'([^']+)'", available[1]))
        asked = f"has no subset {subset!r}" if subset else "has subsets, of which one must be chosen"
        return f"the data set {name} {asked}: --data.subset with one of {subsets}"
    if "gated" in text:
        return (
            f"the data set {name} is gated: accept its terms at {address}, and run `hf auth login` or set HF_TOKEN to "
            "a token of the account that did"
        )
    if "scripts are no longer supported" in text:
        return (
            f"the data set {name} is read by a script of its own, which datasets no longer runs; try its Parquet "
            f"files, as --data.train 'hf://datasets/{name}@refs/convert/parquet/**/train/*.parquet'"
        )
    is_unreachable = isinstance(error, ConnectionError) or "reach" in text
    if is_unreachable and constants.is_offline_mode():
        return (
            f"there is no file or folder {name!r}, the data set is not in the cache at {constants.HF_HOME}, and "
            "HF_HUB_OFFLINE is set; unset it to download"
        )
    if is_unreachable:
        return (
            f"there is no file or folder {name!r}, and {constants.ENDPOINT} did not answer for a data set of that name "
            f"({first_line(error)}); mend that, or copy the data here"
        )
    if "data files" in text:
        return f"the data set {name} has no files that the library datasets reads; look at {address}/tree/main"
    if isinstance(error, FileNotFoundError):
        return (
            f"there is no file or folder {name!r}, and {constants.ENDPOINT} has no data set of that name for this "
            "account; check the spelling, and for a private one run `hf auth login` or set HF_TOKEN"
        )
    cause = error.__cause__ or error
    return f"the data set {name} could not be downloaded: {first_line(cause)}"
