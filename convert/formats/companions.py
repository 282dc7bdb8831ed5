"""The small files that travel with weights: tokenizer, chat template, generation config, as files or in a GGUF file."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gemma2_jax.convert.files import folder
from gemma2_jax.convert.formats import gguf_tokenizer
from gemma2_jax.data import encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def copy_companions(tokenizer: Path | None, generation: Path | None, target: Path) -> None:
    """Copies a tokenizer, with its chat templates, and defaults of generation into the folder `target`.

    Args:
      tokenizer: a folder, or a GGUF file that has its tokenizer.json in it.
      generation: a generation_config.json.
    """
    if tokenizer and tokenizer.is_file():
        gguf_tokenizer.unpack_tokenizer(tokenizer, target)
        tokenizer = None
    folder.copy_companions(tokenizer, generation, target)


def load_tokenizer(place: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder, a GGUF file or a Hub id. Raises ValueError where there is none that will do."""
    if not Path(place).is_file():
        return encoding.load_tokenizer(place)
    with TemporaryDirectory() as unpacked:
        gguf_tokenizer.unpack_tokenizer(Path(place), Path(unpacked))
        tokenizer = encoding.load_tokenizer(unpacked)
    tokenizer.name_or_path = str(place)
    return tokenizer
