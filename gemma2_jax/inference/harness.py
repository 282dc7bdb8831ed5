"""A model for EleutherAI's lm-evaluation-harness (`lm_eval`), in this process: the command `evaluate` runs it.

The harness has the tasks, the prompts and the metrics. Here its three kinds of requests are answered, with the tokens
that its own backend for transformers takes, so that the numbers are the same: `scoring` has the log-probabilities of
given texts, the engine continues others.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gemma2_jax import command_line
from gemma2_jax.data.chat import move_system, open_chat_format
from gemma2_jax.data.records import Turn
from gemma2_jax.inference.completion import Completion
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.engine import Request, make_engine
from gemma2_jax.inference.scoring import BATCH_TOKENS, Continuation, score_continuations
from gemma2_jax.inference.settings import NUMBERS, Sampling, TextSettings
from gemma2_jax.inference.text import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MAX_GEN_TOKS = 256  # where a task names none, as in the harness's own backends


class HarnessModel(TemplateLM):
    """A decoder and its tokenizer, which begins every text with <bos>: Gemma 2 has seen no other."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        stop: Iterable[int],
        batch_tokens: int = BATCH_TOKENS,
    ):
        """`stop` end a text (`defaults.stop_tokens`), `batch_tokens` as in `score_continuations`."""
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = decoder.config.max_length
        self._decoder = decoder
        self._stop = frozenset(stop)
        self._batch_tokens = batch_tokens

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)  # load_tokenizer made sure
        return eos

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text whose context is empty."""
        bos = self.tokenizer.bos_token_id
        assert isinstance(bos, int)  # load_tokenizer made sure
        return bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model beside the results."""
        weights = jax.tree.leaves(self._decoder.weights)
        return {"model_num_parameters": sum(w.size for w in weights), "model_dtype": str(max(weights, key=len).dtype)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The text's tokens, after <bos> unless it is asked for without special tokens."""
        if add_special_tokens is False:
            return self.tokenizer.backend_tokenizer.encode(string, add_special_tokens=False).ids
        return encode_prompt(string, self.tokenizer, chat=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation's text; without the beginning of an answer, its last message is one that goes on.

        A system prompt that the template has no place for is put before the user's turn, as in training.
        """
        messages = chat_history
        if messages[0]["role"] == "system" and not open_chat_format(self.tokenizer, "refuse").takes_system:
            turns = move_system([Turn(role=m["role"], content=m["content"]) for m in messages])
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows of the model's context.

        As in the harness's own backend, <bos> is the first token that is predicted, after another <bos>.
        """
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found = [(None, *make_disjoint_window(window)) for window in found]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """The scores of tokens after others, of which those at the beginning are left out where they are too many."""
        room = self.max_length + 1  # the last token is not read
        continuations = [
            Continuation((context + continuation)[-room:], len(continuation)) for _, context, continuation in requests
        ]
        cut = sum(len(context) + len(continuation) > room for _, context, continuation in requests)
        _warn_cut(cut, len(requests), self.max_length)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        scores = score_continuations(self._decoder, continuations, batch_tokens=self._batch_tokens)
        for number, score in tqdm(scores, "score", total=len(requests), disable=disable_tqdm):
            answers[number] = score.log_probability, score.is_greedy
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to a string of its `until`."""
        completions = [self._make_completion(number, *request.args) for number, request in enumerate(requests)]
        if not completions:
            return []
        numbers = {id(completion.request): number for number, completion in enumerate(completions)}
        engine = make_engine(self._decoder, [completion.request for completion in completions])
        for completion in completions:
            engine.submit(completion.request)
        with tqdm(desc="generate", total=len(requests), disable=disable_tqdm) as bar:
            while not engine.is_idle:
                for request in engine.advance():
                    number = numbers[id(request)]
                    completions[number].take()
                    if completions[number].reason:
                        bar.update()
                        self.cache_hook.add_partial("generate_until", requests[number].args, completions[number].text)
        return [completion.text for completion in completions]

    def _make_completion(self, number: int, context: str, options: dict[str, Any]) -> Completion:
        """A request that continues a context, of which the end alone is read where it is too long."""
        settings: dict[str, Any] = {**normalize_gen_kwargs(options, _MAX_GEN_TOKS)}
        stop, new = settings.pop("until"), settings.pop("max_gen_toks")
        if new >= self.max_length:
            raise ValueError(f"max_gen_toks is {new}, and the model's context {self.max_length}; set fewer in the task")
        tokens = self.tok_encode(context)
        _warn_cut(len(tokens) > self.max_length - new, 1, self.max_length - new)
        prompt = tokens[-(self.max_length - new) :]
        sampling = _read_sampling(settings)
        request = Request(prompt=prompt, max_new_tokens=new, sampling=sampling, sample=number, stop=self._stop)
        return Completion(request, self.tokenizer, stop)


def _read_sampling(settings: dict[str, Any]) -> Sampling:
    """A task's `generation_kwargs` as the engine's settings. Raises ValueError for those that it has not."""
    is_drawn = settings.pop("do_sample")
    if unknown := settings.keys() - NUMBERS.keys():
        raise ValueError(f"generation_kwargs has {', '.join(sorted(unknown))}; it may have {', '.join(NUMBERS)}")
    changes = {"temperature": 1.0} | settings if is_drawn else settings | {"temperature": 0.0}
    return TextSettings(max_new_tokens=1).change(changes).sampling


def _warn_cut(cut: int, total: int, room: int) -> None:
    if cut:
        command_line.notify(
            f"warning: {cut:,} of {total:,} contexts have more than {room:,} tokens; what is before is left out"
        )
