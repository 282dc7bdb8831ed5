"""PEFT's adapter_config.json and our AdapterConfig, both ways.

Which modules of a model have an adapter, of which rank and alpha, is decided by PEFT's rules: names, regular
expressions, layers, exclusions and patterns. Options that this program does not have are refused by name. `peft` has
the tensors.
"""

import re
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.hf_config import require_field
from gemma2_jax.model_config import TOKEN_ROWS, AdapterConfig, list_patterns, weight_name

EMBEDDING = "model.embed_tokens"
HEAD = table.HEAD.removesuffix(".weight")
# PEFT has no option for where an adapter is added: this key is in our own folders only.
_AFTER_NORM = "gemma2_jax_after_norm"
# Keys that are read here or in `peft`, and keys that change nothing once an adapter is trained.
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", _AFTER_NORM),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "bias", "fan_in_fan_out"),
}
_INERT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config"),
}
# Other initializations (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change the base weights that the adapter is added to.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Kinds of PEFT's that learn inputs of the model or of its layers, and options that PEFT merges no adapter with.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
_UNMERGED = ("alora_invocation_tokens", "arrow_config")
# Within these limits the matching of a module's name, which has 40 characters, takes milliseconds. What people write is
# such as .*\.(q|v)_proj or ^model\.layers\.[0-3]\..*
_MOST_REPEATS, _MOST_OPTIONS, _LONGEST = 6, 16, 10_000


class Weights(NamedTuple):
    """What an adapter has in place of the model's weights."""

    saved: tuple[str, ...] = ()  # whole ones: `AdapterConfig.modules_to_save`
    tokens: tuple[int, ...] = ()  # rows of the embedding: `AdapterConfig.trainable_tokens`


def adapter_config(
    peft: dict[str, Any],
    settings: Mapping[str, Mapping[int, tuple[int, float]]],
    layers: tuple[int, ...],
    weights: Weights,
    source: object,
) -> AdapterConfig:
    """The adapter that an adapter_config.json describes.

    Args:
      settings: the rank and the alpha of every projection that has an adapter ("attn/q"), by layer.
      layers: those that have adapters; empty: all.
      weights: what it has in place of the model's.

    Raises ValueError naming a key that is missing, or one that asks for what this program does not implement.
    """
    _check_options(peft, source)
    if not settings and weights == Weights():
        raise ValueError(f"{source}: no projection has an adapter; check that adapter and config belong together")
    ranks = {name: {layer: rank for layer, (rank, _) in found.items()} for name, found in settings.items()}
    alphas = {name: {layer: alpha for layer, (_, alpha) in found.items()} for name, found in settings.items()}
    rank = _usual_number(ranks, require_field(peft, "r", source))
    alpha = _usual_number(alphas, require_field(peft, "lora_alpha", source))
    try:
        return AdapterConfig(
            kind="dora" if peft.get("use_dora") else "lora",
            rank=rank,
            alpha=alpha,
            rslora=bool(peft.get("use_rslora")),
            dropout=peft.get("lora_dropout") or 0.0,
            targets=tuple(settings),
            after_norm=bool(peft.get(_AFTER_NORM)),
            layers=layers,
            rank_pattern=list_patterns(ranks, rank),
            alpha_pattern=list_patterns(alphas, alpha),
            modules_to_save=weights.saved,
            trainable_tokens=weights.tokens,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _usual_number[Number: (int, float)](numbers: Mapping[str, Mapping[int, Number]], default: Number) -> Number:
    """The default where a module has it, or none has any; else the first module's."""
    found = [number for by_layer in numbers.values() for number in by_layer.values()]
    return default if default in found or not found else found[0]


def stored_config(peft: dict[str, Any], shapes: Mapping[str, Any], source: object) -> AdapterConfig:
    """The adapter of an Orbax folder, whose arrays have these shapes, by path, and whose config `peft_config` wrote."""
    layers = chosen_layers(peft, source)
    settings = {}
    for name in table.adapted_rows(shapes):
        stem = table.PROJECTIONS[name].name.removesuffix(".weight")
        count = (*next(tuple(shapes[row.path]) for row in table.adapter_rows(name).values() if row.path in shapes), 0)[
            0
        ]
        settings[name] = {layer: module_setting(peft, stem.format(L=layer), source) for layer in layers or range(count)}
    names = saved_names(peft, source)
    # The embedding is also there where it has grown, and only some of its rows were trained.
    saved = [
        weight_name(row.path)
        for row in table.MODEL
        if row.path in shapes and (row.path != "embedding" or _saved_name(row) in names)
    ]
    tokens = token_indices(peft, EMBEDDING, source) if TOKEN_ROWS in shapes else ()
    return adapter_config(peft, settings, layers, Weights(tuple(saved), tuple(tokens)), source)


def check_kind(peft: dict[str, Any], source: object) -> None:
    """Raises ValueError for an adapter of another kind than LoRA, with what can be done with it."""
    kind = peft.get("peft_type")
    if kind == "LORA":
        return
    remedy = "bring what PEFT's merge_and_unload() makes of it, saved with save_pretrained, which is a whole model"
    if kind in _PROMPTS:
        remedy = "it adds inputs and no weights, so that nothing merges it; train a LoRA"
    raise ValueError(f"{source}: peft_type is {reprlib.repr(kind)}; this program has 'LORA' only: {remedy}")


def _check_options(peft: dict[str, Any], source: object) -> None:
    """Raises ValueError naming an option that this program does not have, or one that PEFT does not have so."""
    check_kind(peft, source)
    for key in ("use_rslora", "use_dora", "ensure_weight_tying", "fan_in_fan_out", _AFTER_NORM):
        if peft.get(key) not in (True, False, None):
            raise ValueError(f"{source}: {key} is {reprlib.repr(peft[key])}; it must be true or false")
    if peft.get("bias") not in (None, "none", "all", "lora_only"):
        raise ValueError(f"{source}: bias is {reprlib.repr(peft['bias'])}; PEFT has none, all and lora_only")
    if peft.get("init_lora_weights") not in _INITIALIZATIONS:
        raise ValueError(
            f"{source}: init_lora_weights is {reprlib.repr(peft['init_lora_weights'])}, so the adapter is to changed "
            "base weights; save it as plain LoRA: see PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in peft.items():
        if key not in _READ | _INERT and value not in (None, False, "none", "", [], {}):
            merged = "" if key in _UNMERGED else ", or bring what PEFT's merge_and_unload() makes of it, a whole model"
            raise ValueError(
                f"{source}: {key} is {reprlib.repr(value)}, which this program does not have; train without it{merged}"
            )


def module_setting(peft: dict[str, Any], module: str, source: object) -> tuple[int, float]:
    """The rank and the alpha that a module, such as "model.layers.0.self_attn.q_proj", has in PEFT."""
    setting = []
    for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = peft.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{source}: {key} is {reprlib.repr(patterns)}; it must be an object of numbers by module")
        value = next(
            (
                patterns[pattern]
                for pattern in patterns
                if _expression(rf"(.*\.)?({pattern})$", key, source).match(module)
            ),
            require_field(peft, default, source),
        )
        whole = key == "rank_pattern"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{source}: {key} or {default} has {reprlib.repr(value)}; it must be a number")
        setting.append(value)
    return setting[0], setting[1]


def is_targeted(peft: dict[str, Any], module: str, source: object) -> bool:
    """Whether PEFT gives a module an adapter, as `peft.tuners.tuners_utils.check_target_module_exists` decides it."""
    excluded = _names(peft, "exclude_modules", source)
    if isinstance(excluded, str):
        if _expression(excluded, "exclude_modules", source).fullmatch(module):
            return False
    elif _ends_with(module, excluded):
        return False
    if any(
        _expression(rf"(^|.*\.){name}($|\..*)", "modules_to_save", source).match(module)
        for name in saved_names(peft, source)
    ):
        return False
    targets = _names(peft, "target_modules", source)
    if targets == "all-linear":
        return module not in (EMBEDDING, HEAD)
    if isinstance(targets, str):
        return bool(_expression(targets, "target_modules", source).fullmatch(module))
    return module in targets or (_ends_with(module, targets) and _in_layers(peft, module, source))


def _in_layers(peft: dict[str, Any], module: str, source: object) -> bool:
    """Whether layers_to_transform has the layer of a module; layers_pattern says how layers are called."""
    layers = peft.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = _names(peft, "layers_pattern", source) or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        lead = r"(?:^|.*?\.)" if peft.get("layers_pattern") else r".*?\."
        expression = _expression(rf"{lead}{pattern}\.(?P<layer>\d+)\.", "layers_pattern", source)
        if match := expression.match(module):
            return int(match["layer"]) in chosen_layers(peft, source)
    return False


def chosen_layers(peft: dict[str, Any], source: object) -> tuple[int, ...]:
    """The layers of layers_to_transform, in order; empty: all."""
    layers = peft.get("layers_to_transform")
    layers = [] if layers is None else layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise ValueError(f"{source}: layers_to_transform is {reprlib.repr(layers)}; it must be numbers of layers")
    return tuple(sorted(set(layers)))


def saved_names(peft: dict[str, Any], source: object) -> list[str]:
    """The names in modules_to_save."""
    names = _names(peft, "modules_to_save", source)
    return [names] if isinstance(names, str) else names


def token_indices(peft: dict[str, Any], module: str, source: object) -> list[int]:
    """The rows of trainable_token_indices that a module, the embedding or the output matrix, is given."""
    tokens = peft.get("trainable_token_indices")
    if isinstance(tokens, dict):
        tokens = next((rows for name, rows in tokens.items() if module.endswith(name)), None)
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        given = reprlib.repr(peft.get("trainable_token_indices"))
        raise ValueError(f"{source}: trainable_token_indices is {given}; it must list numbers of tokens of {module}")
    return tokens


def _names(peft: dict[str, Any], key: str, source: object) -> list[str] | str:
    value = peft.get(key)
    if value is None:
        return []
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"{source}: {key} is {reprlib.repr(value)}; it must be a text or a list of texts")
    return value


def _ends_with(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


@lru_cache(4096)
def _expression(pattern: str, key: str, source: object) -> re.Pattern[str]:
    """A regular expression that a file brought.

    Raises ValueError where it is none, or could take very long: where it repeats what it repeats, or repeats a lot.
    """
    plain = re.sub(r"\\.", "", pattern, flags=re.DOTALL)  # without escaped characters
    repeats, options = len(re.findall(r"[*+{]", plain)), len(re.findall(r"(?<![(*+?}])\?", plain))
    if len(pattern) > _LONGEST or repeats > _MOST_REPEATS or options > _MOST_OPTIONS or re.search(r"\)[*+{]", plain):
        raise ValueError(
            f"{source}: {key} has {reprlib.repr(pattern)}, a regular expression that could take for ever; name the "
            "modules in a list instead"
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{source}: {key} has {reprlib.repr(pattern)}, which is no regular expression") from error


def peft_config(
    adapter: AdapterConfig, base: str, layer_count: int, layers: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """The adapter_config.json of an adapter to the model `base`, a folder or Hub id, which has so many layers.

    Args:
      layers: those of each projection that have an adapter, for PEFT. None: it is for our own Orbax folders, which
        have zeros in the other layers, and say where an adapter is added.
    """
    projections = table.match_targets(adapter)
    every = adapter.layers or range(layer_count)
    adapted = {name: layers[name] if layers else every for name in projections}
    ranks, alphas = (
        {name: {layer: setting(name, layer) for layer in found} for name, found in adapted.items() if found}
        for setting in (adapter.layer_rank, adapter.layer_alpha)
    )
    targets, chosen = [_module_name(name) for name in projections], list(adapter.layers) or None
    if layers and any(list(found) != chosen for found in layers.values()) and chosen:
        # PEFT has one list of layers for all projections.
        chosen, targets = (
            None,
            [_module_name(f"{layer}/{name}") for name, found in layers.items() for layer in found],
        )
    saved = [_saved_name(row) for row in table.MODEL if adapter.replaces(row.path)]
    tied = adapter.replaces("embedding")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": _shorten(adapter.alpha),
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == "dora",
        "target_modules": targets,
        "layers_to_transform": chosen,
        "rank_pattern": {_module_name(name): rank for name, rank in list_patterns(ranks, adapter.rank)},
        "alpha_pattern": {_module_name(name): _shorten(a) for name, a in list_patterns(alphas, adapter.alpha)},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        # Named both, the matrix is one for versions of PEFT that cannot tie it too.
        "modules_to_save": [*saved, HEAD] if tied else saved or None,
        **({"ensure_weight_tying": True} if tied else {}),
        **({"trainable_token_indices": [*adapter.token_ids]} if adapter.trainable_tokens else {}),
        **({_AFTER_NORM: True} if layers is None and adapter.after_norm else {}),
    }


def _saved_name(row: table.Row) -> str:
    """What modules_to_save calls a weight. PEFT takes every module whose name ends so."""
    module = row.name.removesuffix(".weight")
    return module if module.endswith(".norm") else module.split(".")[-1]


def _module_name(projection: str) -> str:
    """PEFT's name of a projection, or of one in a layer: "attn/q" is q_proj, "3/attn/q" layers.3.self_attn.q_proj."""
    layer, _, name = projection.partition("/")
    if not layer.isdecimal():
        return table.PROJECTIONS[projection].name.split(".")[-2]
    return table.PROJECTIONS[name].name.format(L=layer).removeprefix("model.").removesuffix(".weight")


def _shorten(number: float) -> float:
    return int(number) if number == int(number) else number
