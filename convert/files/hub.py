"""Models on the Hugging Face Hub: what is needed of one, in the Hub's cache, or one sentence that says why not.

The token is that of `hf auth login` or HF_TOKEN, the cache that of HF_HOME, and HF_HUB_OFFLINE keeps to the cache: all
of them are huggingface_hub's. What the files mean is `checkpoints`'.
"""

from pathlib import Path

# Of what lies at the top: folders hold the same weights in other forms, or a trainer's checkpoints.
_SMALL, _WEIGHTS, _LEFT_OUT = ["*.json", "tokenizer*", "*.jinja"], ["*.safetensors"], ["*/*"]


def download(name: str, *, weights: bool) -> Path:
    """The folder of the model `name`, such as google/gemma-2-2b, downloaded unless it is in the cache.

    Without `weights` that is its config, its tokenizer and the like.

    Of several processes that share a cache, one downloads a file while the others wait for it.

    Raises ValueError where there is no such model, it is gated, or the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: httpx's or httpx2's

    try:
        wanted = _SMALL + _WEIGHTS * weights
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=_LEFT_OUT))
    except errors.HFValidationError as error:
        raise ValueError(f"there is no folder {name}") from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: accept its licence at {constants.ENDPOINT}/{name}, and run `hf auth login` or set "
            "HF_TOKEN to a token of the account that did"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name}, and {constants.ENDPOINT} has no model of that name for this account; check "
            "the spelling, and for a private one run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        part = isinstance(error, errors.IncompleteSnapshotError)
        cached = f"{name} is only partly" if part else f"there is no folder {name}, it is not"
        reason = _reason(error.__cause__ or error)
        refused = f"{constants.ENDPOINT} did not give it ({reason}); mend that, or copy the model here"
        offline = "HF_HUB_OFFLINE is set; unset it to download"
        raise ValueError(
            f"{cached} in the cache at {constants.HF_HUB_CACHE}, and "
            f"{offline if constants.is_offline_mode() else refused}"
        ) from error
    except (errors.XetDownloadError, HTTPError, OSError) as error:
        raise ValueError(
            f"{name} could not be downloaded to {constants.HF_HUB_CACHE}: {_reason(error)}; once that is mended, the "
            "same command goes on with it"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what a library said."""
    return next(line for line in [*str(error).splitlines(), repr(error)] if line.strip())
