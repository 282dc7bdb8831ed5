"""Megatron-Bridge's adapters of Gemma 2 by PEFT's names, both ways.

Projections that Megatron fuses share one A, and their B are fused as the matrices are. A canonical LoRA has an A and a
B for each projection instead. Megatron-Bridge saves the rows of its gate and of its up as if each were gate and up
together: the first halves of all tensor-parallel ranks, then the second halves. Reading undoes that, so it must be
known how many ranks there were.
"""

import itertools

from gemma2_jax.convert.files.tensors import Tensors
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.megatron import Opened, StoredTensor, layer_free_name, split_fused
from gemma2_jax.convert.formats.megatron_tensors import Fused, Rows
from gemma2_jax.model_config import AdapterConfig, ModelConfig

_L = "decoder.layers.{L}"

# For each fused module its projections, each with its name in a canonical adapter, and the rows of its matrix.
_MODULES: dict[str, tuple[dict[str, str], Rows]] = {
    f"{_L}.self_attention.linear_qkv": ({"attn/q": "q", "attn/k": "k", "attn/v": "v"}, "heads"),
    f"{_L}.self_attention.linear_proj": ({"attn/o": ""}, "one"),
    f"{_L}.mlp.linear_fc1": ({"mlp/gate": "gate", "mlp/up": "up"}, "halves"),
    f"{_L}.mlp.linear_fc2": ({"mlp/down": ""}, "one"),
}


def adapter_fusings(opened: Opened) -> tuple[tuple[Fused, ...], list[str]]:
    """The fused tensors of this checkpoint's adapters, and the projections that have an adapter."""
    names = {layer_free_name(name) for name in opened.tensors}
    dora = any(name.endswith("weight_magnitude") for name in names)
    fusings, projections = list[Fused](), list[str]()
    for module, (parts, _) in _MODULES.items():
        if f"{module}.adapter.linear_in.weight" in names:
            fusings += fuse_adapter(module, list(parts), dora=dora, canonical=False)
            projections += parts
        canonical = [
            projection
            for projection, name in parts.items()
            if f"{module}.adapter.adapter_{name}.linear_in.weight" in names
        ]
        if canonical:
            fusings += fuse_adapter(module, canonical, dora=False, canonical=True)
            projections += canonical
    return tuple(fusings), projections


def is_adapter(opened: Opened) -> bool:
    """Whether a checkpoint holds adapters alone."""
    return bool(opened.tensors) and all(".adapter." in name for name in opened.tensors)


def adapter_tensors(opened: Opened, fusings: tuple[Fused, ...], adapter: AdapterConfig, model: ModelConfig) -> Tensors:
    """The adapter's tensors by PEFT's names, of a checkpoint that `opened.ranks` tensor-parallel ranks saved.

    Raises ValueError as `model_tensors` does, and where the order of the rows of gate and up is not certain.
    """
    shapes = table.tensor_shapes(table.table_rows(adapter, model.layers), model)
    tensors = split_fused(opened, fusings, shapes, model)
    for fused in fusings:
        if fused.rows == "half_ranks":
            _check_half_ranks(opened, fused, model)
    return tensors


def _check_half_ranks(opened: Opened, fused: Fused, model: ModelConfig) -> None:
    """Raises ValueError where the rows of a tensor cannot be those of `opened.ranks` tensor-parallel ranks."""
    ranks, said = opened.ranks, f"run_config.yaml says that {opened.folder} was saved at TP {opened.ranks}"
    if model.mlp_width % (2 * ranks):
        raise ValueError(
            f"{said}, and {fused.key} has {model.mlp_width} rows, of which each rank cannot have two halves; copy the "
            "run_config.yaml that was saved with it"
        )
    for layer in range(model.layers):
        tensor = opened.tensors.get(fused.name.format(L=layer))
        chunks = len(tensor.row_starts) if isinstance(tensor, StoredTensor) else 1
        # Megatron-Bridge saves two chunks of each rank. One chunk, or an odd number of them, is of another program.
        if chunks % 2 == 0 and chunks != 2 * ranks:
            raise ValueError(
                f"{said}, and {fused.key} has the {chunks} chunks of TP {chunks // 2}: the order of its rows is "
                "not certain; copy the run_config.yaml that was saved with it"
            )


def fuse_adapter(module: str, projections: list[str], *, dora: bool, canonical: bool) -> list[Fused]:
    """The tensors of a module's adapter. In a canonical adapter each projection has an A of its own."""
    canonical_names, rows = _MODULES[module]
    adapter_rows = {projection: table.adapter_rows(projection) for projection in projections}
    if canonical and any(canonical_names.values()):
        orders: dict[str, Rows] = {"linear_in": "one", "linear_out": "half_ranks" if rows == "halves" else "one"}
        return [
            Fused(
                f"{module}.adapter.adapter_{canonical_names[projection]}.{end}.weight",
                (row[variable].name,),
                rows=orders[end],
            )
            for projection, row in adapter_rows.items()
            for end, variable in (("linear_in", "a"), ("linear_out", "b"))
        ]
    names = {variable: tuple(row[variable].name for row in adapter_rows.values()) for variable in "abm"}
    fusings = [
        Fused(f"{module}.adapter.linear_in.weight", names["a"], rows="shared"),
        Fused(f"{module}.adapter.linear_out.weight", names["b"], rows=rows),
    ]
    # Megatron-Core reorders the halves of matrices alone, so that a vector keeps the order of the ranks that saved it.
    magnitude_rows: Rows = "rank_halves" if rows == "halves" else rows
    return fusings + [Fused(f"{module}.adapter.weight_magnitude", names["m"], rows=magnitude_rows)] * dora


def written_adapter(adapter: AdapterConfig, *, canonical: bool) -> tuple[Fused, ...]:
    """The fused tensors of a checkpoint that is written of an adapter."""
    targets, dora = table.match_targets(adapter), adapter.kind == "dora"
    modules = {module: [name for name in parts if name in targets] for module, (parts, _) in _MODULES.items()}
    fusings = (
        fuse_adapter(module, names, dora=dora, canonical=canonical) for module, names in modules.items() if names
    )
    return tuple(itertools.chain.from_iterable(fusings))


def shared_tensors(adapter: AdapterConfig) -> list[list[str]]:
    """Groups of projections that share one A in a fused adapter, which then must have all projections of a group."""
    targets = table.match_targets(adapter)
    return [list(parts) for parts, _ in _MODULES.values() if len(parts) > 1 and not set(targets).isdisjoint(parts)]


def unadapted_projections(adapter: AdapterConfig) -> list[str]:
    """The projections without an adapter that Megatron fuses with ones that have one."""
    targets = set(table.match_targets(adapter))
    return [name for group in shared_tensors(adapter) for name in group if name not in targets]
