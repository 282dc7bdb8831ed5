"""PEFT's adapter_config.json and our AdapterConfig, both ways.

The projections of an adapter are read from its tensors, not from target_modules, which may be a regular expression.
Options that this program does not have are refused by name. `table` has the tensors.
"""

import reprlib
from typing import Any

from gemma2_jax.config import AdapterConfig
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.hf_config import require_field

# PEFT has no option for where an adapter is added: this key is in our own folders only.
_AFTER_NORM = "gemma2_jax_after_norm"
# Keys that are read below, and keys that change nothing once an adapter is trained.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", _AFTER_NORM}
_INERT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# Other initializations (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change the base weights that the adapter is added to.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def adapter_config(peft: dict[str, Any], projections: list[str], source: object) -> AdapterConfig:
    """The adapter that an adapter_config.json describes, on those projections ("attn/q").

    Raises ValueError naming a key that is missing, or one that asks for what this program does not implement.
    """
    if peft.get("peft_type") != "LORA":
        kind = reprlib.repr(peft.get("peft_type"))
        raise ValueError(f"{source}: peft_type is {kind}; this program has 'LORA' only")
    for key in ("use_rslora", "use_dora", _AFTER_NORM):
        if peft.get(key) not in (True, False, None):
            raise ValueError(f"{source}: {key} is {reprlib.repr(peft[key])}; it must be true or false")
    rank, alpha = require_field(peft, "r", source), require_field(peft, "lora_alpha", source)
    if peft.get("init_lora_weights") not in _INITIALIZATIONS:
        raise ValueError(
            f"{source}: init_lora_weights is {reprlib.repr(peft['init_lora_weights'])}, so the adapter is to changed "
            "base weights; save it as plain LoRA: see PEFT's path_initial_model_for_weight_conversion"
        )
    uniform = {"rank_pattern": rank, "alpha_pattern": alpha}
    for key, value in peft.items():
        if key in uniform and isinstance(value, dict) and all(number == uniform[key] for number in value.values()):
            continue
        if key not in _READ | _INERT and value not in (None, False, "none", "", [], {}):
            raise ValueError(
                f"{source}: {key} is {reprlib.repr(value)}, which this program does not have; train without it"
            )
    if not projections:
        raise ValueError(f"{source}: no projection has an adapter; check that adapter and config belong together")
    try:
        return AdapterConfig(
            kind="dora" if peft.get("use_dora") else "lora",
            rank=rank,
            alpha=alpha,
            rslora=bool(peft.get("use_rslora")),
            dropout=peft.get("lora_dropout") or 0.0,
            targets=tuple(projections),
            after_norm=bool(peft.get(_AFTER_NORM)),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def peft_config(adapter: AdapterConfig, base: str, *, for_orbax: bool = False) -> dict[str, Any]:
    """The adapter_config.json of an adapter to the model `base`, a folder or Hub id.

    Args:
      for_orbax: whether it is for our own Orbax folders, which say where the adapter is added, and not for PEFT.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == "dora",
        "target_modules": [table.PROJECTIONS[name].name.split(".")[-2] for name in table.match_targets(adapter)],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        **({_AFTER_NORM: True} if for_orbax and adapter.after_norm else {}),
    }
