"""The small files that travel with weights: tokenizer, chat template, generation config, as files or in a GGUF file."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gemma2_jax.convert.files import folder
from gemma2_jax.convert.formats import gguf_tokenizer, sentencepiece
from gemma2_jax.data import encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def copy_companions(tokenizer: Path | None, generation: Path | None, target: Path) -> None:
    """Copies a tokenizer, with its chat templates, and defaults of generation into the folder `target`.

    A tokenizer.model without a tokenizer.json gets one, as other programs make other tokens of it alone.

    Args:
      tokenizer: a folder, or a GGUF file that has its tokenizer.json in it.
      generation: a generation_config.json.

    Raises ValueError where a tokenizer that is to be unpacked is damaged.
    """
    if tokenizer and tokenizer.is_file():
        gguf_tokenizer.unpack_tokenizer(tokenizer, target)
        tokenizer = None
    folder.copy_companions(tokenizer, generation, target)
    if tokenizer and folder.has_model_only(tokenizer):
        sentencepiece.unpack_model(tokenizer, target)


def load_tokenizer(place: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder, a GGUF file or a Hub id. Raises ValueError where there is none that will do."""
    if not Path(place).is_file() and not folder.has_model_only(Path(place)):
        return encoding.load_tokenizer(place)
    with TemporaryDirectory() as unpacked:
        copy_companions(Path(place), None, Path(unpacked))
        return encoding.load_tokenizer(unpacked, origin=place)
