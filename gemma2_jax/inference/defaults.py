"""What a checkpoint says of generation: which tokens end a text, and how to sample it.

End tokens are obeyed; the sampling settings are only suggested to the user. This module reads generation_config.json;
config.json was read when the checkpoint was opened.
"""

import reprlib
from typing import TYPE_CHECKING, Any

from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.files.safetensors import read_json
from gemma2_jax.data.chat import write_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SAMPLING = ("temperature", "top_k", "top_p")


def stop_tokens(checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerFast", *, chat: bool) -> set[int]:
    """Tokens that end a text: every eos_token_id of the checkpoint and of the tokenizer, and a turn's end with `chat`.

    Raises ValueError if an eos_token_id is not a token number.
    """
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)  # load_tokenizer made sure
    tokens = {eos} | _eos_tokens(checkpoint.hf or {}, "config.json")
    tokens |= _eos_tokens(_read_generation(checkpoint), str(checkpoint.generation))
    if chat and (end := _end_of_turn(tokenizer)) is not None:
        tokens.add(end)
    return tokens


def describe_stop(tokens: set[int], tokenizer: "PreTrainedTokenizerFast", max_new_tokens: int) -> str:
    """What ends a text, as a sentence."""
    names = [f"{tokenizer.convert_ids_to_tokens(token) or 'no token'} ({token})" for token in sorted(tokens)]
    names = [*names[:20], f"{len(names) - 20} more"] if len(names) > 20 else names
    return f"a text ends with {' or '.join(names)}, or after {max_new_tokens} tokens"


def suggested_sampling(checkpoint: Checkpoint) -> dict[str, float]:
    """The sampling settings that the checkpoint suggests, by the names of `Sampling`; empty if it suggests none."""
    generation = _read_generation(checkpoint)
    if generation.get("do_sample") is not True:
        return {}
    settings = {"temperature": 1.0} | {name: generation[name] for name in _SAMPLING if name in generation}
    return {name: value for name, value in settings.items() if type(value) in (int, float)}


def describe_suggestion(settings: dict[str, float]) -> str:
    """A sentence that says that the suggested settings are not used, and which options would use them."""
    options = " ".join(f"--{name} {value}" for name, value in settings.items())
    return f"the most likely tokens are taken; the checkpoint suggests drawing them (do_sample), with {options}"


def _read_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_json(checkpoint.generation) if checkpoint.generation else {}


def _eos_tokens(config: dict[str, Any], source: str) -> set[int]:
    """The eos_token_id of a config, which is a token, a list of them or nothing."""
    found = config.get("eos_token_id")
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise ValueError(
            f"{source}: eos_token_id is {reprlib.repr(found)}; it must be a token's number, or a list of them"
        )
    return set(tokens)


def _end_of_turn(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """The special token that the chat template writes after the model's turn, if it writes one."""
    answer = "answer"
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        before, _, ending = write_messages(talk, tokenizer).rpartition(answer)
    except ValueError:  # the template refuses this conversation
        return None
    tokens = tokenizer.backend_tokenizer.encode(ending, add_special_tokens=False).ids if before else []
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None
