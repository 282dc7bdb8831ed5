"""Downloads models from the Hugging Face Hub into its cache, or says in a sentence why that cannot be done.

The library huggingface_hub takes the token from `hf auth login` or HF_TOKEN and the cache from HF_HOME, and downloads
nothing where HF_HUB_OFFLINE is set. `opening` knows what the files mean.
"""

from pathlib import Path

# Patterns of files at the top of a model. Its subfolders hold the same weights in other formats, or a trainer's states.
_SMALL_FILES, _SUBFOLDERS = ["*.json", "tokenizer*", "*.jinja"], ["*/*"]
# Files of weights; those of a later line are downloaded where a model has none of the earlier ones.
_WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin", "adapter_model.bin"])


def download(name: str, *, weights: bool) -> Path:
    """The folder of the model `name`, such as google/gemma-2-2b, downloaded unless it is in the cache.

    Without `weights` only the config, the tokenizer and other small files are downloaded. Where several processes share
    a cache, one downloads a file while the others wait for it.

    Raises ValueError where there is no such model, it is gated, or the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: httpx's or httpx2's

    def download_files(patterns: list[str]) -> Path:
        wanted = _SMALL_FILES + patterns
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=_SUBFOLDERS))

    try:
        if not weights:
            return download_files([])
        for patterns in _WEIGHTS:
            folder = download_files(patterns)
            if any(file for pattern in patterns for file in folder.glob(pattern)):
                return folder
        listed = huggingface_hub.HfApi().list_repo_files(name)
        files = [file for file in listed if not file.startswith(".")]
        raise ValueError(
            f"{name} has no weights that this program reads (safetensors, or pytorch_model.bin): it has "
            f"{', '.join(files[:10])}; name the model that it was made from"
        )
    except errors.HFValidationError as error:
        raise ValueError(f"there is no folder {name}") from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: accept its license at {constants.ENDPOINT}/{name}, and run `hf auth login` or set "
            "HF_TOKEN to a token of the account that did"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name}, and {constants.ENDPOINT} has no model of that name for this account; check "
            "the spelling, and for a private one run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        incomplete = isinstance(error, errors.IncompleteSnapshotError)
        cached = f"{name} is only partly" if incomplete else f"there is no folder {name}, it is not"
        reason = _first_line(error.__cause__ or error)
        refused = f"{constants.ENDPOINT} did not give it ({reason}); mend that, or copy the model here"
        offline = "HF_HUB_OFFLINE is set; unset it to download"
        raise ValueError(
            f"{cached} in the cache at {constants.HF_HUB_CACHE}, and "
            f"{offline if constants.is_offline_mode() else refused}"
        ) from error
    except (errors.XetDownloadError, HTTPError, OSError) as error:
        raise ValueError(
            f"{name} could not be downloaded to {constants.HF_HUB_CACHE}: {_first_line(error)}; once that is mended, "
            "the same command goes on with it"
        ) from error


def _first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error itself where it has none."""
    return next(line for line in [*str(error).splitlines(), repr(error)] if line.strip())
