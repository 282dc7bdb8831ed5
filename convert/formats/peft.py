"""PEFT's tensors of an adapter to Gemma 2, as `table` has them: whole stacks of layers, and whole weights.

PEFT saves nothing for a layer without an adapter, and lets every module have its own rank and alpha. A stack has zeros
in place of what a layer lacks. Weights that PEFT saves whole (modules_to_save) and LoRA on the embedding and the output
matrix become weights in place of the model's; rows of the embedding (trainable_token_indices) stay rows, unless PEFT
changed the embedding otherwise too. PEFT wraps the embedding and the output matrix separately; the model has
one matrix for both, so that what makes them differ is refused. `peft_config` has PEFT's rules of names.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax.convert.files import safetensors
from gemma2_jax.convert.files.memory import Shapes
from gemma2_jax.convert.files.safetensors import read_json
from gemma2_jax.convert.files.tensors import Tensor, Tensors, open_tensors
from gemma2_jax.convert.formats import peft_config, table
from gemma2_jax.convert.formats.peft_config import EMBEDDING, HEAD
from gemma2_jax.convert.formats.peft_tensors import (
    LowRankSum,
    PaddedTensor,
    ReplacedRows,
    ZeroTensor,
    are_equal,
    read_whole,
)
from gemma2_jax.convert.formats.state_dict import HEADS, WRAPPER, check_elements
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.model_config import TOKEN_ROWS, AdapterConfig, ModelConfig, weight_name

CONFIG = "adapter_config.json"
BINARY = "adapter_model.bin"

# A module, what PEFT calls a part of it, and the adapter's name, which PEFT itself leaves out of files.
_NAME = re.compile(
    r"(?P<module>.+?)(?:\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta|token_adapter\.base_layer|base_layer|modules_to_save|original_module)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?)?(?:\.weight)?"
)
_LAYER = re.compile(r"(model\.)?layers\.(\d{1,5})\.")
_PROJECTIONS = {row.name.removesuffix(".weight"): name for name, row in table.PROJECTIONS.items()}
_WEIGHTS = {row.name.removesuffix(".weight"): row for row in table.MODEL}
_PARTS = {"a": "lora_A", "b": "lora_B", "m": "lora_magnitude_vector"}
_TOKENS = "token_adapter.trainable_tokens_delta"

ReadBase = Callable[[Row, int | None], Tensor]  # the model's own tensor of a row, in a layer of a stack


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter's files: their config, and their tensors by module and part.

    Modules are called as in the model: "model.layers.0.self_attn.q_proj". Parts are lora_A and so on, or "weight".
    """

    folder: Path
    config: dict[str, Any]
    stored: Tensors
    parts: dict[str, dict[str, str]]  # the names of tensors
    prefix: str  # "model." or "": what the names of layers begin with in PEFT's rules

    @property
    def source(self) -> Path:
        """What messages name."""
        return self.folder / CONFIG

    @cached_property
    def adapted_layers(self) -> dict[str, list[int]]:
        """The layers of each projection that have an adapter."""
        layers = {name: list[int]() for name in table.PROJECTIONS}
        for module, parts in self.parts.items():
            name, layer = _split_module(module)
            if name in _PROJECTIONS and parts.keys() & set(_PARTS.values()):
                assert layer is not None
                layers[_PROJECTIONS[name]].append(layer)
        return {name: sorted(found) for name, found in layers.items() if found}

    def adapter_config(self, layer_count: int | None) -> AdapterConfig:
        """What it is, as an adapter of a model of so many layers; None where that is not known.

        Raises ValueError for options that this program does not have.
        """
        layers = self.adapted_layers
        every = sorted(set().union(*layers.values()))
        whole = list(range(layer_count or len(every)))
        complete = all(found == whole for found in layers.values())
        settings = {
            name: {layer: self._setting(_layer_module(name, layer)) for layer in found}
            for name, found in layers.items()
        }
        chosen = () if complete else tuple(every)
        weights = peft_config.Weights(self._saved_weights, self.token_ids)
        return peft_config.adapter_config(self.config, settings, chosen, weights, self.source)

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens whose rows are all that it changes in the embedding; empty where it changes none, or more."""
        embedding, head = ({*self.parts.get(module, {})} for module in (EMBEDDING, HEAD))
        saved = any(map(self._is_saved, (EMBEDDING, HEAD)))
        if _TOKENS not in embedding or saved or not embedding | head <= {_TOKENS, "base_layer"}:
            return ()
        ids = peft_config.token_indices(self.config, EMBEDDING, self.source)
        if _TOKENS in head:
            deltas = [self.stored.by_name[self.parts[module][_TOKENS]] for module in (EMBEDDING, HEAD)]
            same = ids == peft_config.token_indices(self.config, HEAD, self.source)
            if not same or not are_equal(*deltas):
                return ()
        return tuple(ids)

    @property
    def grown(self) -> bool:
        """Whether it brings the embedding that the rows of `token_ids` are in, as its vocabulary was grown."""
        return bool(self.token_ids) and self.vocabulary is not None

    @property
    def vocabulary(self) -> int | None:
        """The rows of the embedding that it brings, if it does."""
        for module in (EMBEDDING, HEAD):
            for part in ("base_layer", "weight"):
                if name := self.parts.get(module, {}).get(part):
                    return (*self.stored.shapes[name], 0)[0]
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about options of its config that change nothing."""
        notes = []
        if (bias := self.config.get("bias")) not in (None, "none"):
            notes.append(f"its bias is {bias!r}, and Gemma 2 has no biases, so that there are none to read")
        if self.config.get("fan_in_fan_out"):
            notes.append("its fan_in_fan_out is true, which PEFT turns off for matrices like Gemma 2's")
        return tuple(notes)

    def tensors(self, adapter: AdapterConfig, model: ModelConfig, read_base: ReadBase) -> Tensors:
        """The tensors of `table.table_rows` for the adapter, by name.

        Raises ValueError where tensors are missing or unexpected, or have other shapes than the config says, or where
        the embedding and the output matrix would differ.
        """
        self._claim_tensors(model)
        tensors = dict[str, Tensor]()
        for projection in table.match_targets(adapter):
            rows = table.adapter_rows(projection, adapter.stack_rank(projection, model.layers))
            for variable, row in rows.items():
                if variable != "m" or adapter.kind == "dora":
                    tensors |= self._stack(row, variable, model)
        for row in table.table_rows(adapter, model.layers, grown=self.grown):
            if row.path == TOKEN_ROWS:
                self._check_tokens(self.token_ids, model.vocab_size)
                tensors[row.name] = self.stored.by_name[self.parts[EMBEDDING][_TOKENS]]
            elif row.path == "embedding" and self.grown:
                tensors[row.name] = self._tied_weight(None)
        for row in table.MODEL:
            if adapter.replaces(row.path):
                tensors |= {f"{table.PEFT}{name}": x for name, x in self._weights(row, model, read_base).items()}
        return Tensors(tensors)

    def _setting(self, module: str) -> tuple[int, float]:
        return peft_config.module_setting(self.config, self._rule_name(module), self.source)

    def _rule_name(self, module: str) -> str:
        return self.prefix + module.removeprefix("model.") if module != HEAD else module

    def _scale(self, module: str) -> float:
        rank, alpha = self._setting(module)
        return AdapterConfig(kind="lora", rank=rank, alpha=alpha, rslora=bool(self.config.get("use_rslora"))).scale

    @cached_property
    def _saved_weights(self) -> tuple[str, ...]:
        """Names of the weights that it replaces, as `AdapterConfig.modules_to_save` has them."""
        saved = []
        for name, row in _WEIGHTS.items():
            modules = [module for module in self.parts if _split_module(module)[0] == name]
            tied = [module for module in (EMBEDDING, HEAD) if module in self.parts] if name == EMBEDDING else []
            if tied and self.token_ids:
                continue
            if tied or any("weight" in self.parts[module] for module in modules):
                saved.append(weight_name(row.path))
        for name in peft_config.saved_names(self.config, self.source):
            if not any(module.endswith(name) for module, parts in self.parts.items() if "weight" in parts):
                raise ValueError(
                    f"{self.source}: modules_to_save has {name!r}, and the file has no such weight of Gemma 2; leave "
                    "it out if it is not needed, or train without it"
                )
        return tuple(saved)

    def _claim_tensors(self, model: ModelConfig) -> None:
        """Raises ValueError naming tensors that are missing, unexpected, or of another shape than the config says."""
        check_elements(self.stored.shapes, self.folder)
        for name, dtype in self.stored.dtypes.items():
            safetensors.check_dtype(dtype, f"{self.folder}: {name}")
        dora, source = bool(self.config.get("use_dora")), self.source
        expected, actual = Shapes(), Shapes()
        modules = [name.format(L=layer) for name in _PROJECTIONS for layer in range(model.layers)]
        for module in modules:
            if not peft_config.is_targeted(self.config, self._rule_name(module), source):
                continue
            projection = _PROJECTIONS[_split_module(module)[0]]
            for variable, row in table.adapter_rows(projection, self._setting(module)[0]).items():
                if variable != "m" or dora:
                    expected[_full_name(module, _PARTS[variable])] = table.tensor_shape(row, model)
        for module, parts in self.parts.items():
            for part, name in parts.items():
                actual[_full_name(module, part)] = self.stored.shapes[name]
            name, layer = _split_module(module)
            if module in (EMBEDDING, HEAD):
                expected |= self._embedding_shapes(module, model)
            elif "weight" in parts and (layer or 0) < model.layers:
                expected[_full_name(module, "weight")] = table.tensor_shape(_WEIGHTS[name], model)
        table.claim_tensors(expected, actual, self.folder)

    def _embedding_shapes(self, module: str, model: ModelConfig) -> Shapes:
        """The shapes that the parts of the embedding or of the output matrix must have, by name."""
        parts, rows, width = {*self.parts[module]}, self.vocabulary or model.vocab_size, model.width
        if _PARTS["m"] in parts:
            raise ValueError(
                f"{self.folder} has DoRA on {module}, which scales the embedding and the output matrix differently, "
                "and Gemma 2 has one matrix for both; train it with LoRA, or on the projections alone"
            )
        shapes = {"weight": (rows, width), "base_layer": (rows, width)}
        if _TOKENS in parts:
            shapes[_TOKENS] = (len(peft_config.token_indices(self.config, module, self.source)), width)
        first, second = ("lora_embedding_A", "lora_embedding_B") if module == EMBEDDING else ("lora_A", "lora_B")
        # An output matrix that is tied has the rank of the embedding, whatever its config says.
        rank = (*self.stored.shapes[self.parts[module][first]], 0)[0] if first in parts else 0
        low_rank = {first: (rank, rows), second: (width, rank)}
        if module == HEAD:
            low_rank = {first: (rank, width), second: (rows, rank)}
        wanted = parts | low_rank.keys() if parts & low_rank.keys() else parts
        return {_full_name(module, part): shape for part, shape in (shapes | low_rank).items() if part in wanted}

    def _stack(self, row: Row, variable: str, model: ModelConfig) -> dict[str, Tensor]:
        """The tensors of all layers of an adapter's row: stored ones, of this rank, and zeros."""
        shape = table.tensor_shape(row, model)
        stem = row.name.removeprefix(table.PEFT).removesuffix(".weight").removesuffix(f".{_PARTS[variable]}")
        tensors, dtypes = dict[str, Tensor](), list[np.dtype]()
        for layer in range(model.layers):
            parts = self.parts.get(stem.format(L=layer), {})
            if _PARTS[variable] not in parts:
                continue
            stored = self.stored.by_name[parts[_PARTS[variable]]]
            tensors[row.name.format(L=layer)] = stored if stored.shape == shape else PaddedTensor(stored, shape)
            dtypes.append(stored.dtype)
        return {name: tensors.get(name) or ZeroTensor(shape, dtypes[0]) for name in row.names(model.layers)}

    def _weights(self, row: Row, model: ModelConfig, read_base: ReadBase) -> dict[str, Tensor]:
        """The tensors of a row of the model, of which those that the adapter lacks are the model's own."""
        if row.path == "embedding":
            return {row.name: self._embedding(read_base(row, None))}
        tensors = dict[str, Tensor]()
        for layer, name in enumerate(row.names(model.layers)):
            parts = self.parts.get(name.removesuffix(".weight"), {})
            if "weight" in parts:
                tensors[name] = self.stored.by_name[parts["weight"]]
            else:
                tensors[name] = read_base(row, layer if row.stacked else None)
        return tensors

    def _embedding(self, base: Tensor) -> Tensor:
        """The one matrix that the embedding and the output matrix are. Raises ValueError where they differ."""
        tied = self._tied_weight(base)
        embedding, head = self._wrapped_weight(EMBEDDING, tied), self._wrapped_weight(HEAD, tied)
        # What PEFT ties: rows of tokens always, and all else where it was asked to.
        ensured = bool(self.config.get("ensure_weight_tying"))
        if embedding is not tied and head is tied and (ensured or isinstance(embedding, ReplacedRows)):
            head = embedding
        if not are_equal(embedding, head):
            changed = [module for module, x in ((EMBEDDING, embedding), (HEAD, head)) if x is not tied]
            raise ValueError(
                f"{self.folder} makes the embedding and the output matrix differ: PEFT changed "
                f"{' and '.join(changed)}{' alone' if len(changed) == 1 else ', each by itself'}. Gemma 2 has one "
                "matrix for both, and so has this program; train it with ensure_weight_tying=True, or leave "
                "embed_tokens and lm_head out of the adapter"
            )
        return embedding

    def _tied_weight(self, base: Tensor | None) -> Tensor:
        """The matrix that PEFT wraps: the base's, or the one that it saved, since it was grown or asked to."""
        saved = [
            self.stored.by_name[name]
            for module in (EMBEDDING, HEAD)
            for part, name in self.parts.get(module, {}).items()
            if part == "base_layer" or (part == "weight" and not self._is_saved(module))
        ]
        for other in saved[1:]:
            if not are_equal(saved[0], other):
                raise ValueError(
                    f"{self.folder} has an embedding and another output matrix, neither of them in modules_to_save; "
                    "Gemma 2 has one matrix for both, and so has this program"
                )
        tied = saved[0] if saved else base
        assert tied is not None
        return tied

    def _check_tokens(self, indices: Sequence[int], rows: int) -> None:
        """Raises ValueError naming a token whose row is not in an embedding of so many rows."""
        if indices and max(indices) >= rows:
            raise ValueError(
                f"{self.source}: trainable_token_indices has {max(indices)}, and the embedding has {rows} rows; give a "
                "model whose embedding was grown as in training"
            )

    def _is_saved(self, module: str) -> bool:
        """Whether PEFT wraps a module for modules_to_save, in its own name or that of the module it is tied to."""
        names = peft_config.saved_names(self.config, self.source)
        tied = (EMBEDDING, HEAD) if self.config.get("ensure_weight_tying") else (module,)
        return any(module.endswith(name) for module in tied for name in names)

    def _wrapped_weight(self, module: str, tied: Tensor) -> Tensor:
        """The matrix that a wrapped module has; `tied` where it is not wrapped."""
        parts = {part: self.stored.by_name[name] for part, name in self.parts.get(module, {}).items()}
        if "weight" in parts and self._is_saved(module):
            return parts["weight"]
        if _TOKENS in parts:
            indices = peft_config.token_indices(self.config, module, self.source)
            self._check_tokens(indices, tied.shape[0])
            return ReplacedRows(tied, indices, parts[_TOKENS].read((slice(None), slice(None))))
        if "lora_embedding_A" in parts:
            a, b = (read_whole(parts[f"lora_embedding_{letter}"]) for letter in "AB")
            return LowRankSum(tied, np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), self._scale(module))
        if "lora_A" in parts:
            return LowRankSum(tied, read_whole(parts["lora_B"]), read_whole(parts["lora_A"]), self._scale(module))
        return tied


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT's."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (safetensors.ADAPTER, BINARY))


def open_adapter(folder: Path) -> PeftAdapter:
    """Reads the config and the headers of an adapter's files.

    Raises ValueError where a file is damaged, or holds tensors that are none of an adapter to Gemma 2.
    """
    config = read_json(folder / CONFIG)
    peft_config.check_kind(config, folder / CONFIG)
    binary = not (folder / safetensors.ADAPTER).is_file()
    stored = open_tensors(folder, BINARY if binary else safetensors.ADAPTER)
    parts, unknown, adapters, prefix = dict[str, dict[str, str]](), list[str](), set[str](), "model."
    for name in stored.shapes:
        match = _NAME.fullmatch(WRAPPER.sub("", name).removeprefix(table.PEFT))
        module = match["module"] if match else name
        if module.startswith(("layers.", "embed_tokens", "norm")):  # to Gemma2Model, which has no output matrix
            module, prefix = f"model.{module}", ""
        kind, _ = _split_module(module)
        if not match or (kind not in _WEIGHTS and module != HEAD):
            unknown.append(name)
            continue
        adapters |= {match["adapter"]} - {None}
        found = parts.setdefault(module, {})
        match match["part"]:
            case None:
                found["weight"] = name
            case "modules_to_save":  # a copy that PEFT itself does not read, unless it is the only one
                found.setdefault("weight", name)
            case "token_adapter.base_layer":
                found["base_layer"] = name
            case part if part != "original_module":
                found[part] = name
    for sign in HEADS:
        if found := [name for name in unknown if fnmatchcase(name.removeprefix(table.PEFT), sign.pattern)]:
            raise ValueError(
                f"{folder} has {sign.said} ({table.list_names(found)}), which is no part of the language model; train "
                "a LoRA with task_type CAUSAL_LM, which has none"
            )
    if unknown:
        raise ValueError(
            f"{folder} has tensors that are none of an adapter to Gemma 2: {table.list_names(unknown)}; train without "
            "them, or save the adapter alone"
        )
    if len(adapters) > 1:
        listed = " and ".join(sorted(adapters))
        raise ValueError(f"{folder} has the adapters {listed} in one file; save the one that is meant alone")
    return PeftAdapter(folder=folder, config=config, stored=stored, parts=parts, prefix=prefix)


def _split_module(module: str) -> tuple[str, int | None]:
    """A module's name with {L} for the layer, and the layer."""
    match = _LAYER.match(module)
    return (_LAYER.sub("model.layers.{L}.", module, count=1), int(match[2])) if match else (module, None)


def _layer_module(projection: str, layer: int) -> str:
    return table.PROJECTIONS[projection].name.removesuffix(".weight").format(L=layer)


def _full_name(module: str, part: str) -> str:
    """PEFT's name of a part, without an adapter's name."""
    no_suffix = part == "weight" or part.startswith(("lora_embedding", "lora_magnitude", "token_adapter"))
    return f"{table.PEFT}{module}.{part}" + ("" if no_suffix else ".weight")
