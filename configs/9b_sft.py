"""Fine-tunes all weights of Gemma 2 9B, with Megatron-Bridge's defaults.

python -m gemma2_jax.train --config 9b_sft --data.train 'dialogues/*.jsonl'
"""

from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.model_config import GEMMA2_9B
from gemma2_jax.recipes import finetune


def config() -> Config:
    return finetune("9b_sft", GEMMA2_9B, "google/gemma-2-9b", "sft", mesh=MeshConfig(tensor=4))
