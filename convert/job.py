"""A conversion, described by an immutable object: its source, its format, its options, and the arrays to be written.

`opening` opens the source, `checkpoints` reads its arrays, `merging` merges and `writing` writes. Arrays are read
part by part. While a part is written the next ones are read, so that a few parts are in memory at a
time. The largest part is a matrix of a layer, or as many rows of the embedding as make up a chunk of `files.orbax`.
"""

import math
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax import dims
from gemma2_jax.convert.checkpoints import Checkpoint, read_array
from gemma2_jax.convert.files import orbax
from gemma2_jax.convert.files.memory import Index, contiguous_copy, copy_array, reuse_memory
from gemma2_jax.convert.formats import (
    companions,
    gguf,
    gguf_tokenizer,
    megatron_adapters,
    megatron_tensors,
    table,
    vllm,
)
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.dims import Abstract
from gemma2_jax.model_config import TOKEN_ROWS, AdapterConfig, FileDType, ModelConfig

Format = Literal["orbax", "hf", "peft", "megatron", "megatron-legacy", "megatron-adapter", "gguf", "gguf-adapter"]
# Formats that hold an adapter and no weights, and where the same programs have weights.
_ADAPTER_FORMATS = {"peft": "hf", "megatron-adapter": "megatron", "gguf-adapter": "gguf"}
# Formats that hold weights and no adapter, and where the same programs have an adapter.
MODEL_FORMATS = {weights: adapter for adapter, weights in _ADAPTER_FORMATS.items()} | {
    "megatron-legacy": "megatron-adapter"
}
_Q8_0_BYTES = 34 / 32  # of an element: a block of 32 has a scale of two bytes
# Adapters that have one rank and one scale, and nothing but low-rank matrices.
_UNIFORM_ADAPTERS = {"megatron-adapter": "an adapter of Megatron-Bridge's", "gguf-adapter": "an adapter of llama.cpp's"}
_READ_AHEAD = 1  # how many parts reading runs ahead of writing; the largest, a matrix of 27B, has 340 MB

Progress = Callable[[float], None]  # is called with the number of bytes written since the last call


@dataclass(frozen=True)
class Part:
    """A part of an array that is read and written at a time: a layer of a stack, or some rows of another array."""

    row: Row
    index: Index


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion: its source, its format and its options. Raises ValueError where they do not go together.

    The arrays are read in parts, as `array_part` in our layouts or as `tensor_part` in those of the format.
    """

    source: Checkpoint
    to: Format
    merge: bool = False  # add the adapter into the weights
    # Tensor-parallel ranks and pipeline stages: those that megatron-legacy has files for, or a megatron-adapter is for.
    ranks: tuple[int, int] = (1, 1)
    dtype: FileDType | None = None  # None: as stored; for a full training run, the dtype of its starting weights
    reader: Literal["vllm"] | None = None  # a program that must be able to load what is written

    def __post_init__(self) -> None:
        self._check_base()
        adapted = self.source.adapter.kind != "none"
        if self.to in _ADAPTER_FORMATS and not adapted:
            reason = (
                "trained the whole weights, so there is no adapter to write"
                if self.source.format == "run"
                else f"has no adapter, and --to {self.to} writes nothing else"
            )
            raise ValueError(f"{self.source.path} {reason}; write its weights with --to {_ADAPTER_FORMATS[self.to]}")
        if self.merge and not adapted:
            raise ValueError(f"{self.source.path} has no adapter; leave out --merge")
        if self.to in _ADAPTER_FORMATS and self.merge:
            raise ValueError(
                f"--to {self.to} writes the adapter alone, and --merge adds it into the weights; choose one of the two"
            )
        if self.source.adapter.unmergeable_targets and (self.merge or self.to in MODEL_FORMATS):
            from gemma2_jax.model import lora

            lora.check_mergeable(self.source.adapter.unmergeable_targets)
        if self.to in MODEL_FORMATS and adapted and not self.merge:
            raise ValueError(
                f"{self.source.path} has an adapter, which --to {self.to} has no place for; "
                f"choose --merge for one model, or --to {MODEL_FORMATS[self.to]} for the adapter alone"
            )
        if self.to in _UNIFORM_ADAPTERS:
            self._check_uniform_adapter()
        if self.reader == "vllm":
            self._check_vllm()
        assert self.source.model is not None
        self._check_ranks(self.source.model)
        self._check_dtype(self.source.model)

    def _check_base(self) -> None:
        """Raises ValueError where the source is an adapter alone and the format needs its model, or its model's config.

        Checked first, before anything that may be wrong with the adapter.
        """
        source = self.source
        if self.to not in _ADAPTER_FORMATS and source.lacks_base:
            raise ValueError(
                f"{source.describe_missing_base()}, and --to {self.to} writes them too; give that model as SRC and "
                f"this adapter as --adapter {shlex.quote(str(source.path))}"
            )
        if source.model is None:
            raise ValueError(
                f"{source.describe_missing_base()}; give that model as SRC and this adapter as --adapter "
                f"{shlex.quote(str(source.path))}, or the folder of the model's config.json as --hf-config"
            )

    def _check_uniform_adapter(self) -> None:
        """Raises ValueError where the format has no place for what the adapter has."""
        adapter = self.source.adapter
        lacking = {
            "ranks of their own (adapter.rank_pattern)": adapter.rank_pattern,
            "alphas of their own (adapter.alpha_pattern)": adapter.alpha_pattern,
            "weights trained whole (adapter.modules_to_save)": adapter.modules_to_save,
            "rows of the embedding (adapter.trainable_tokens)": adapter.trainable_tokens,
            "layers without DoRA (adapter.layers)": adapter.layers if adapter.kind == "dora" else (),
        }
        for what, value in lacking.items():
            if value:
                raise ValueError(
                    f"{self.source.path} has {what}, and {_UNIFORM_ADAPTERS[self.to]} has none; merge it: --merge --to "
                    f"{_ADAPTER_FORMATS[self.to]}"
                )

    def _check_vllm(self) -> None:
        """Raises ValueError where vLLM could not serve the adapter, for each reason."""
        if self.to != "peft":
            raise ValueError(f"--for vllm is about adapters, and --to {self.to} writes none for it; use --to peft")
        broken = vllm.broken_rules(self.source.adapter)
        if not broken:
            return
        base, path = self.source.base or "MODEL", str(self.source.path)
        merge = shlex.join(["python", "-m", "gemma2_jax.convert", base, "MERGED", "--adapter", path])
        remedy = f"Merge it into its model, and serve that: {merge} --merge --to hf"
        if not all(rule.mergeable for rule in broken):
            remedy = "Train one that vLLM can serve, or run this one with python -m gemma2_jax.generate"
        raise ValueError(f"vLLM cannot serve {path}: {'; '.join(rule.sentence for rule in broken)}. {remedy}")

    def _check_ranks(self, model: ModelConfig) -> None:
        tensor, stages = self.ranks
        if self.ranks != (1, 1) and self.to != "megatron-legacy":
            if not self.depends_on_ranks:
                raise ValueError(f"--to {self.to} is read at any parallelism; leave out --tp and --pp")
            if stages != 1:
                raise ValueError(f"--to {self.to} is read at any pipeline parallelism, so that --pp must be 1")
        sizes = {f"the model's {name}": getattr(model, name) for name in ("kv_heads", "mlp_width", "vocab_size")}
        if self.to == "megatron-adapter":
            sizes |= {"the adapter's rank": self.adapter.rank, "half of the model's mlp_width,": model.mlp_width // 2}
        for name, size, shards in (
            *((name, size, tensor) for name, size in sizes.items()),
            ("the model's layers", model.layers, stages),
        ):
            if shards < 1 or size % shards:
                fitting = [n for n in range(1, size + 1) if size % n == 0 and n <= 64]
                raise ValueError(f"{name} {size} cannot be divided into {shards}; {fitting} are possible")

    def _check_dtype(self, model: ModelConfig) -> None:
        """Raises ValueError where the dtype is GGUF's alone, or GGUF or llama.cpp has no place for what is written."""
        if self.dtype in ("float16", "q8_0") and not self.to.startswith("gguf"):
            raise ValueError(f"--dtype {self.dtype} goes with --to gguf only; choose float32 or bfloat16")
        if self.to == "gguf-adapter":
            gguf.check_adapter(self.adapter, self.dtype, self.source.path)
        if self.to == "gguf":
            gguf.check_model(model, self.dtype, self.source.path)
            if self.source.tokenizer is None:
                raise ValueError(
                    f"{self.source.path} has no tokenizer, and a GGUF file has one in it; copy tokenizer.json and "
                    "tokenizer_config.json of its model there"
                )

    @property
    def warnings(self) -> list[str]:
        """Sentences about what the format cannot hold, and what programs that read it compute differently."""
        if self.to == "gguf":
            return gguf_tokenizer.merge_warnings(self.tokenizer_metadata)
        if self.to in ("peft", "gguf-adapter"):
            return self._after_norm_warnings("PEFT" if self.to == "peft" else "llama.cpp")
        return self._megatron_adapter_warnings() if self.to == "megatron-adapter" else []

    def _after_norm_warnings(self, reader: str) -> list[str]:
        after_norm = self.adapter.unmergeable_targets
        if not after_norm:
            return []
        return [
            f"the adapter of {' and '.join(after_norm)} was trained to be added after the post-norm "
            f"(adapter.after_norm), and {reader} adds it before: the tensors are the same, the logits are not. Run it "
            f"with python -m gemma2_jax.generate, or train one without after_norm for {reader}"
        ]

    def _megatron_adapter_warnings(self) -> list[str]:
        targets, found = table.match_targets(self.adapter), list[str]()
        before_norm = [name for name in ("attn/o", "mlp/down") if name in targets and not self.adapter.after_norm]
        if before_norm:
            found.append(
                f"the adapter of {' and '.join(before_norm)} was trained to be added before the post-norm, and "
                "Megatron-Bridge adds it after: the tensors are the same, the logits are not. Merge it (--merge --to "
                "megatron), or train one with adapter.after_norm for Megatron-Bridge"
            )
        if self.zero_projections:
            found.append(
                f"{' and '.join(self.zero_projections)} had no adapter, without which Megatron-Bridge loads none for "
                "the projections that it fuses with them; an adapter of zeros, which adds nothing, is written for each"
            )
        if self.depends_on_ranks:
            found.append(
                "mlp/gate and mlp/up have an A each, and Megatron-Bridge then reads the rows of their B in an order "
                f"that depends on its TP; these are for TP {self.ranks[0]} alone, and --tp says another"
            )
        return found

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter in the output; none when it is merged."""
        if self.merge:
            return AdapterConfig()
        source = self.source.adapter
        return replace(source, targets=(*source.targets, *self.zero_projections)) if self.zero_projections else source

    @cached_property
    def zero_projections(self) -> list[str]:
        """Projections that get an adapter of zeros, as Megatron-Bridge loads no LoRA on a part of what it fuses."""
        is_lora = self.to == "megatron-adapter" and self.source.adapter.kind == "lora"
        return megatron_adapters.unadapted_projections(self.source.adapter) if is_lora else []

    @cached_property
    def separate_a(self) -> bool:
        """True if projections that Megatron fuses have different A's, so that one is written for each.

        That is Megatron-Bridge's canonical LoRA. Raises ValueError for a DoRA, of which it has no such form.
        """
        return self.to == "megatron-adapter" and not self._is_fusable()

    @property
    def depends_on_ranks(self) -> bool:
        """Whether a Megatron adapter has rows in the order of one tensor parallelism."""
        return self.separate_a and "mlp/gate" in table.match_targets(self.adapter)

    @cached_property
    def groups(self) -> dict[str, tuple[Row, ...]]:
        """The rows that are written, of the weights and of the adapter; Orbax has a folder for each."""
        assert self.source.model is not None
        grown = self.source.grown and not self.merge
        adapter_rows = table.table_rows(self.adapter, self.source.model.layers, grown=grown)
        if self.to == "peft" and self.adapter.replaces("embedding"):  # PEFT has it twice
            adapter_rows += (replace(table.MODEL[0], name=f"{table.PEFT}{table.HEAD}"),)
        adapter = {"adapter": adapter_rows} if adapter_rows else {}
        return adapter if self.to in _ADAPTER_FORMATS else {"weights": table.MODEL} | adapter

    @cached_property
    def shapes(self) -> Abstract:
        """The shape of every array, and the dtype that it is written in."""
        stored = self._stored_shapes
        hf = self.source.hf or {}
        start_dtype = hf.get("dtype") or hf.get("torch_dtype")
        fully_trained = self.source.format == "run" and self.source.adapter.kind == "none"
        wanted = "float32" if self.dtype == "q8_0" else self.dtype  # it is quantized when it is written
        dtype = wanted or (start_dtype if fully_trained else None)
        paths = {row.name: row.path for rows in self.groups.values() for row in rows}
        own = {path: shape.dtype for path, shape in stored.items()}
        if self.merge:  # what replaces a weight takes that weight's dtype, as in PEFT
            for source in reversed(self.source.sources):
                own |= {path: shape.dtype for path, shape in source.shapes.items()}
        shapes = {path: jax.ShapeDtypeStruct(stored[path].shape, dtype or own[path]) for path in paths.values()}
        if self.to == "gguf":
            shapes |= {path: stored[path] for path in shapes if gguf.is_norm(path)}
        if self.to.startswith("megatron"):  # a fused tensor has one dtype, which holds the values of all its parts
            for fused in (*megatron_tensors.MODEL, *megatron_adapters.written_adapter(self.adapter, canonical=False)):
                parts = [shapes[paths[name]] for name in fused.parts if name in paths]
                for name in fused.parts if len(parts) > 1 else ():
                    shapes[paths[name]] = shapes[paths[name]].update(dtype=jnp.result_type(*parts))
        return shapes

    @cached_property
    def _stored_shapes(self) -> Abstract:
        """The shape and the stored dtype of every array of the source, and of the zeros that are added to it."""
        stored, model = self.source.shapes, self.source.model
        assert model is not None
        added = [row for name in self.zero_projections for row in table.adapter_rows(name).values()]
        dtypes = [x.dtype for path, x in stored.items() if "/adapter/" in path]
        return stored | {
            row.path: jax.ShapeDtypeStruct(dims.weight_shape(row.letters, model, self.adapter.rank), dtypes[0])
            for row in added
        }

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        copies = ["embedding"] if self.ranks[1] > 1 else []  # the last pipeline stage has it too
        dtypes = {path: self.written_dtype(path) for path in self.shapes}
        each = {path: _Q8_0_BYTES if dtype == "q8_0" else jnp.dtype(dtype).itemsize for path, dtype in dtypes.items()}
        return int(sum(math.prod(self.shapes[path].shape) * each[path] for path in [*self.shapes, *copies]))

    def written_dtype(self, path: str) -> str:
        """The name of the dtype that an array has in the files. It differs from that in `shapes` only in GGUF."""
        if self.to == "gguf" and gguf.is_norm(path):
            return "float32"
        return "q8_0" if self.dtype == "q8_0" else self.shapes[path].dtype.name

    @cached_property
    def tokenizer_metadata(self) -> dict[str, gguf_tokenizer.Written]:
        """The tokenizer for a GGUF file. Raises ValueError if llama.cpp has none that works like the model's."""
        source, model = self.source, self.source.model
        assert source.tokenizer is not None and model is not None
        try:
            tokenizer = companions.load_tokenizer(source.tokenizer)
            return gguf_tokenizer.tokenizer_metadata(tokenizer, model.vocab_size)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from error

    def parts(self, rows: tuple[Row, ...]) -> Iterator[Part]:
        """The parts of the arrays of these rows, in order."""
        for row in rows:
            want = self.shapes[row.path]
            step = 1 if row.stacked else orbax.rows_at_once(want, stacked=False)
            projection = row.path.removeprefix("blocks/").partition("/adapter/")[0]
            for start in range(0, want.shape[0], step):
                if self.to == "peft" and start not in self.adapted_layers.get(projection, (start,)):
                    continue
                stop = min(start + step, want.shape[0])
                yield Part(row, (slice(start, stop), *[slice(None)] * (len(want.shape) - 1)))

    @cached_property
    def adapted_layers(self) -> dict[str, tuple[int, ...]]:
        """The layers of each projection that have an adapter; in the others its arrays are zero."""
        assert self.source.model is not None
        layers = range(self.source.model.layers)
        if not self.adapter.layers:
            return {name: tuple(layers) for name in table.match_targets(self.adapter)}
        return {
            name: tuple(layer for layer in layers if any(np.any(x) for x in self._adapter_layer(name, layer)))
            for name in table.match_targets(self.adapter)
        }

    def _adapter_layer(self, projection: str, layer: int) -> Iterator[np.ndarray]:
        """The arrays that a layer's adapter of this projection consists of."""
        for row in table.adapter_rows(projection).values():
            if row.path in self.source.shapes:
                every = [slice(None)] * (len(row.letters) - 1)
                yield read_array(self.source, row.path, (slice(layer, layer + 1), *every))

    def array_part(self, part: Part) -> np.ndarray:
        """A part in our layout and the dtype that is written, merged if asked for; not necessarily C-contiguous."""
        row = part.row
        projection = row.path.removeprefix("blocks/").removesuffix("/w")
        if self.merge and projection in table.match_targets(self.source.adapter):
            return self._merged_part(projection, part)
        if self.merge and row.path == "embedding" and self.source.adapter.trainable_tokens:
            return self._merged_rows(part)
        want = self.shapes[row.path]
        if row.path not in self.source.shapes:  # an adapter of zeros
            shape = [len(range(size)[span]) for size, span in zip(want.shape, part.index, strict=True)]
            return np.zeros(shape, want.dtype)
        return read_array(self.source, row.path, part.index).astype(want.dtype, copy=False)

    def ordered_part(self, part: Part) -> np.ndarray:
        """What `array_part` gives, in C order."""
        matrix = self._transposed_matrix(part, part.row.letters[-2]) if part.row.stacked else None
        return contiguous_copy(self.array_part(part)) if matrix is None else matrix[None]

    def tensor_part(self, part: Part) -> np.ndarray:
        """A part as Hugging Face's or PEFT's tensor of one layer, or as some rows of the tensor, in C order."""
        matrix = self._transposed_matrix(part, part.row.groups[0]) if part.row.stacked else None
        if matrix is None:
            array = self.array_part(part)
            matrix = part.row.to_tensor(array[0] if part.row.stacked else array)
        if part.row.stacked:
            matrix = matrix[tuple(map(slice, self.part_shape(part).shape))]
        return contiguous_copy(matrix)

    def _transposed_matrix(self, part: Part, first: str) -> np.ndarray | None:
        """A layer's matrix with a row for each of the letter `first`, where it is stored with a column for each.

        It is transposed a block at a time while it is read, so that it is in memory once. None where it is stored
        otherwise, is no matrix of two letters, or is computed.
        """
        path, letters = part.row.path, part.row.letters[1:]
        if self.merge or len(letters) != 2 or {*letters} != {*part.row.groups} or path not in self.source.shapes:
            return None
        source = self.source.find_source(path)
        dim, step = source.stored_rows(path)
        sizes = dict(zip(letters, self.shapes[path].shape[1:], strict=True))
        if letters[dim - 1] == first:
            return None
        other = letters[dim - 1]
        matrix = reuse_memory((sizes[first], sizes[other]), self.shapes[path].dtype)
        for start in range(0, sizes[other], step):
            columns = slice(start, min(start + step, sizes[other]))
            index = (part.index[0], *(columns if letter == other else slice(None) for letter in letters))
            block = source.read(path, index, source.shapes[path].dtype)[0]
            copy_array(matrix[:, columns], block if letters[0] == first else block.T)
        return matrix

    def tensor_shape(self, row: Row) -> jax.ShapeDtypeStruct:
        """The shape and the dtype of a row's tensor; for a stacked row, of one layer's."""
        assert self.source.model is not None
        return jax.ShapeDtypeStruct(table.tensor_shape(row, self.source.model), self.shapes[row.path].dtype)

    def part_shape(self, part: Part) -> jax.ShapeDtypeStruct:
        """The shape and the dtype of the tensor that a part belongs to. PEFT's has the rank of its layer."""
        row = part.row
        if self.to == "peft" and row.rank and row.stacked:
            projection = row.path.removeprefix("blocks/").partition("/adapter/")[0]
            row = replace(row, rank=self.adapter.layer_rank(projection, part.index[0].start))
        return self.tensor_shape(row)

    def _is_fusable(self) -> bool:
        """Whether projections that Megatron-Bridge fuses share one A. Raises ValueError for a DoRA if they do not."""
        rows = {row.path: row for row in self.groups["adapter"]}

        def read_parts(path: str) -> Iterator[bytes]:
            return (self.array_part(part).tobytes() for part in self.parts((rows[path],)))

        for projections in megatron_adapters.shared_tensors(self.adapter):
            first, *others = (table.adapter_rows(name)["a"].path for name in projections)
            if rows.keys() >= {first, *others} and all(
                expected == part
                for path in others
                for expected, part in zip(read_parts(first), read_parts(path), strict=True)
            ):
                continue
            if self.adapter.kind == "dora":
                raise ValueError(
                    f"{self.source.path} is a DoRA with an A of its own for each of {', '.join(projections)}, and "
                    "Megatron-Bridge's has one for all of them; merge it (--merge --to megatron), or train a LoRA"
                )
            return False
        return True

    def _merged_rows(self, part: Part) -> np.ndarray:
        """A part of the embedding, with the rows that the adapter has in their place."""
        rows, dtype = range(self.shapes["embedding"].shape[0])[part.index[0]], self.shapes["embedding"].dtype
        merged = np.array(read_array(self.source, "embedding", part.index), dtype)
        for number, token in enumerate(self.source.adapter.token_ids):
            if token in rows:
                row = read_array(self.source, TOKEN_ROWS, (slice(number, number + 1), part.index[1]))
                merged[token - rows.start] = row[0].astype(dtype)
        return merged

    def _merged_part(self, projection: str, part: Part) -> np.ndarray:
        stored = self.source.shapes
        adapter_paths = {variable: row.path for variable, row in table.adapter_rows(projection).items()}
        paths = {variable: path for variable, path in {"w": part.row.path, **adapter_paths}.items() if path in stored}
        layers, *rest = part.index
        variables = {
            variable: contiguous_copy(
                read_array(self.source, path, (layers, *[slice(None)] * (len(stored[path].shape) - 1)))
            )
            for variable, path in paths.items()
        }
        merged = self._merge(projection, self.shapes[part.row.path].dtype, layers.start, **variables)
        return np.asarray(merged)[(slice(None), *rest)]

    @cached_property
    def _merge(self) -> Callable[..., jax.Array]:
        from gemma2_jax.convert import merging

        assert self.source.model is not None
        return merging.create_merge(self.source.model, self.source.adapter)


def read_ahead[X, Y](function: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
    """Yields `function` of each item in order, while another thread runs ahead by a few items."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Y]] = deque()
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
