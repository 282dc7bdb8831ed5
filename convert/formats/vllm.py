"""What vLLM's LoRA serves of an adapter to Gemma 2, as rules that were read off its code.

vLLM takes any of the seven projections, in all layers or some, with alpha / rank or alpha / sqrt(rank) as the scale.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gemma2_jax.model_config import AdapterConfig

# What --max-lora-rank may be (vllm/config/lora.py: MaxLoRARanks). The default is 16.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Something that vLLM does not do."""

    breaks: Callable[[AdapterConfig], object]  # whether an adapter needs it
    sentence: str
    source: str  # where vLLM's code says so
    mergeable: bool = True  # whether merging the adapter into its model is a remedy


RULES = (
    Rule(
        breaks=lambda adapter: adapter.kind == "dora",
        sentence="it is a DoRA, which vLLM refuses to load",
        source="vllm/lora/peft_helper.py, use_dora",
    ),
    Rule(
        breaks=lambda adapter: adapter.modules_to_save,
        sentence="it has weights in place of the model's (by modules_to_save, or by LoRA on the embedding), which vLLM "
        "refuses to load",
        source="vllm/lora/peft_helper.py, modules_to_save",
    ),
    Rule(
        breaks=lambda adapter: adapter.trainable_tokens,
        sentence="it has rows of the embedding (trainable_tokens), which vLLM refuses to load",
        source="vllm/lora/utils.py, parse_fine_tuned_lora_name",
    ),
    Rule(
        breaks=lambda adapter: adapter.rank_pattern or adapter.alpha_pattern,
        sentence="its projections have ranks or alphas of their own, and vLLM scales all by one lora_alpha / r",
        source="vllm/lora/peft_helper.py, vllm_lora_scaling_factor",
    ),
    Rule(
        breaks=lambda adapter: adapter.rank > MAX_RANKS[-1],
        sentence=f"its rank is above {MAX_RANKS[-1]}, the largest --max-lora-rank",
        source="vllm/config/lora.py, MaxLoRARanks",
    ),
    Rule(
        breaks=lambda adapter: adapter.unmergeable_targets,
        sentence="it is added after the post-norm (adapter.after_norm), and vLLM adds it before",
        source="vllm/model_executor/models/gemma2.py",
        mergeable=False,
    ),
)


def broken_rules(adapter: AdapterConfig) -> list[Rule]:
    """The rules that keep vLLM from serving an adapter as it is."""
    return [rule for rule in RULES if rule.breaks(adapter)]


def max_lora_rank(adapter: AdapterConfig) -> int:
    """The --max-lora-rank that an adapter needs, which breaks no rule."""
    return next(rank for rank in MAX_RANKS if rank >= adapter.rank)
