"""What may be asked of OpenAI's API: its fields, and those that vLLM adds to it. Any other field is an error.

Fields of what this server cannot do are here too, so that they are refused with the reason; null, and a value that asks
for nothing, is taken.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

MOST_STOPS = 4  # strings, as in OpenAI's API
MOST_SAMPLES = 128  # of one prompt


def _fail(message: str) -> PydanticCustomError:
    return PydanticCustomError("value", "{reason}", {"reason": message})


def _refuse(reason: str, *harmless: Any) -> PlainValidator:
    """Of a field that is not supported: null, or what asks for nothing."""

    def check(value: Any) -> None:
        if value is not None and value not in harmless:
            raise _fail(f"it is not supported: {reason}")

    return PlainValidator(check, json_schema_input_type=None)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(token) is int for token in value)


def _read_prompt(value: Any) -> list[str] | list[list[int]]:
    if isinstance(value, str):
        return [value]
    if _is_tokens(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(x, str) for x in value) or all(map(_is_tokens, value))):
        return value
    raise _fail("give a string, a list of strings, a list of token numbers, or a list of such lists")


def _read_stop(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(strings, tuple | list) or not all(isinstance(x, str) and x for x in strings):
        raise _fail("give a string, or a list of strings, none of them empty")
    if len(strings) > MOST_STOPS:
        raise _fail(f"give {MOST_STOPS} strings at most")
    return tuple(strings)


def _read_bias(value: Any) -> tuple[tuple[int, float], ...]:
    items = {} if value is None else value
    if not isinstance(items, dict) or not all(key.isdecimal() and key.isascii() for key in items):
        raise _fail("give an object with token numbers as its keys, and numbers as its values")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in items.values()):
        raise _fail("its values must be numbers from -100 to 100")
    return tuple((int(token[:19]), float(bias)) for token, bias in items.items())


type Prompt = str | list[str] | list[int] | list[list[int]]
type _Stop = str | list[str] | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Part):
    """What a stream says besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _refuse("nothing is obfuscated", False)] = None


class Settings(_Part):
    """What both kinds of requests have."""

    model: str
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_SAMPLES)] = None
    stop: Annotated[tuple[str, ...], PlainValidator(_read_stop, json_schema_input_type=_Stop)] = ()
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]] | None, Field(max_length=64)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int | None, Field(ge=-1)] = None  # -1 and 0 are no limit, as in vLLM
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[
        tuple[tuple[int, float], ...], PlainValidator(_read_bias, json_schema_input_type=dict[str, float] | None)
    ] = ()
    seed: int | None = None  # of which the engine takes the last 31 bits
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionBody(Settings):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_read_prompt, json_schema_input_type=Prompt)]
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    best_of: int | None = None
    suffix: Annotated[Any, _refuse("Gemma 2 was not trained to fill in text", "")] = None


class TextPart(_Part):
    """A part of a message; no other kind is supported."""

    type: Literal["text"]
    text: str


class Message(_Part):
    """A message of a conversation. What a client hands back of an answer is taken where it says nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Annotated[Any, _refuse("chat templates have no place for names")] = None
    refusal: Annotated[Any, _refuse("the model has no refusals of its own")] = None
    tool_calls: Annotated[Any, _refuse("the model calls no tools", [])] = None
    function_call: Annotated[Any, _refuse("the model calls no functions")] = None
    audio: Annotated[Any, _refuse("the model takes text alone")] = None
    annotations: Annotated[Any, _refuse("the model takes text alone", [])] = None


_NO_TOOLS = "the model calls no tools"


class ChatBody(Settings):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    # Of no consequence here.
    store: bool | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Annotated[Any, _refuse("there is one tier", "auto", "default")] = None
    tools: Annotated[Any, _refuse(_NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, _refuse(_NO_TOOLS, "none", "auto")] = None
    functions: Annotated[Any, _refuse(_NO_TOOLS, [])] = None
    function_call: Annotated[Any, _refuse(_NO_TOOLS, "none", "auto")] = None
    response_format: Annotated[Any, _refuse("the text's form cannot be prescribed", {"type": "text"})] = None
    modalities: Annotated[Any, _refuse("the model writes text alone", ["text"])] = None
    audio: Annotated[Any, _refuse("the model writes text alone")] = None
    prediction: Annotated[Any, _refuse("no text can be predicted for the model")] = None
    reasoning_effort: Annotated[Any, _refuse("the model does not reason apart from its answer", "none")] = None
    verbosity: Annotated[Any, _refuse("ask for it in the prompt", "medium")] = None
    web_search_options: Annotated[Any, _refuse("the model searches nothing")] = None
    moderation: Annotated[Any, _refuse("nothing is moderated")] = None


_Name = Annotated[str, Field(min_length=1, max_length=256)]


class LoadBody(_Part):
    """The body of POST /v1/load_lora_adapter, which is vLLM's."""

    lora_name: _Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: Annotated[Any, _refuse("unload the adapter first", False)] = None
    is_3d_lora_weight: Annotated[Any, _refuse("the model has no experts", False)] = None


class UnloadBody(_Part):
    """The body of POST /v1/unload_lora_adapter, which is vLLM's."""

    lora_name: _Name
    lora_int_id: Annotated[Any, _refuse("adapters are known by their names")] = None
