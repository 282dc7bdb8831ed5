"""The model and its adapters as frozen dataclasses, and the sizes that Gemma 2 comes in; standard library alone.

`config` has the other choices of a run.
"""

import dataclasses
import fnmatch
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16"]
FileDType = Literal["float32", "bfloat16", "float16", "q8_0"]  # that weights are written in; the last two in GGUF alone
_MOST_LAYERS = 10_000  # so that a damaged config costs little: every layer has names


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the numerics of one Gemma 2 model (Gemma Team 2024, arXiv:2408.00118, table 1)."""

    layers: int  # transformer blocks; even ones (0-based) are local, odd ones global
    width: int  # width of the residual stream
    mlp_width: int  # width of gate and up
    heads: int  # query heads
    kv_heads: int  # key/value heads
    head_width: int  # width of one head
    query_pre_attn_scalar: float  # scores are q.k times this to the power -1/2
    vocab_size: int = 256_000  # rows of the embedding, tied to the output
    window: int = 4096  # tokens a local layer attends to, itself included
    max_length: int = 8192  # trained context length
    attn_softcap: float | None = 50.0  # attention scores are squashed to (-cap, cap)
    final_softcap: float | None = 30.0  # logits are squashed to (-cap, cap)
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # epsilon of every RMSNorm

    def __post_init__(self) -> None:
        _check_numbers(self, "model")
        for name in (
            "layers",
            "width",
            "mlp_width",
            "heads",
            "kv_heads",
            "head_width",
            "vocab_size",
            "window",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.layers > _MOST_LAYERS:
            raise ValueError(f"model.layers is {self.layers}; no model has more than {_MOST_LAYERS:,}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}; "
                "each key/value head serves a whole number of query heads"
            )
        if self.head_width % 2:
            raise ValueError(f"model.head_width {self.head_width} is odd; RoPE rotates pairs, use an even width")
        for name in ("query_pre_attn_scalar", "rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be positive")
        for name in ("attn_softcap", "final_softcap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; use a positive cap, or None for no cap")

    @property
    def query_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def layer_windows(self, length: int) -> list[int]:
        """How many tokens back, itself included, each layer sees in a sequence of `length` tokens."""
        return [min(self.window, length) if layer % 2 == 0 else length for layer in range(self.layers)]

    def parameter_count(self) -> int:
        """Parameters of the model; the tied embedding counts once."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_width * self.width
        block = attention + 3 * self.width * self.mlp_width + 4 * self.width
        return self.vocab_size * self.width + self.layers * block + self.width

    def forward_flops(self, length: int) -> float:
        """FLOPs of one forward pass per token of a `length`-token sequence.

        A multiply-add is two. Logits are counted, the embedding lookup is not; attention counts the causal half,
        within the window, as in the PaLM paper's MFU (arXiv:2204.02311, appendix B) less its masked half.
        """
        matrices = self.parameter_count() - (4 * self.layers + 1) * self.width
        return 2 * matrices + self.attention_flops(length)

    def attention_flops(self, length: int) -> float:
        """The part of `forward_flops` that multiplies no weights: queries by keys, and scores by values."""
        pairs = sum(_causal_pairs(length, window) for window in self.layer_windows(length))
        return 4 * self.heads * self.head_width * pairs / length


def _check_numbers(config, group: str) -> None:
    """Raises ValueError naming a field that is not a number of its type, or one that no model can have."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type is int and not (type(value) is int and abs(value) < 2**31):
            raise ValueError(f"{group}.{f.name} is {reprlib.repr(value)}; it must be a whole number below 2**31")
        real = f.type is float or (f.type == float | None and value is not None)
        # Neither NaN nor infinity.
        if real and (isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53):
            raise ValueError(f"{group}.{f.name} is {reprlib.repr(value)}; it must be a number below 2**53")


def _causal_pairs(length: int, window: int) -> int:
    """Pairs (i, j) with 0 <= i - j < window in a sequence of `length` tokens."""
    window = min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


GEMMA2_2B = ModelConfig(
    layers=26, width=2304, mlp_width=9216, heads=8, kv_heads=4, head_width=256, query_pre_attn_scalar=256.0
)
GEMMA2_9B = ModelConfig(
    layers=42, width=3584, mlp_width=14336, heads=16, kv_heads=8, head_width=256, query_pre_attn_scalar=256.0
)
GEMMA2_27B = ModelConfig(
    layers=46, width=4608, mlp_width=36864, heads=32, kv_heads=16, head_width=128, query_pre_attn_scalar=144.0
)
# Small enough to train on a laptop, with every trait of the large ones: heads times head width is not the model
# width (as in 9B), and the window is shorter than the sequence.
GEMMA2_TINY = ModelConfig(
    layers=6,
    width=192,
    mlp_width=576,
    heads=4,
    kv_heads=2,
    head_width=64,
    query_pre_attn_scalar=64.0,
    vocab_size=4096,
    window=128,
    max_length=512,
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters: LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353), rank-stabilized (arXiv:2312.03732)."""

    kind: Literal["none", "lora", "dora"] = "none"  # none trains the model's own weights
    rank: int = 32  # columns of A, rows of B
    alpha: float = 32.0  # the update is scaled by alpha / rank
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    dropout: float = 0.0  # chance that an input of A is dropped in training
    targets: tuple[str, ...] = ("attn/*", "mlp/*")  # patterns over attn/{q,k,v,o} and mlp/{gate,up,down}
    after_norm: bool = False  # of o and down: added after the post-norm, as Megatron-Bridge trains them
    layers: tuple[int, ...] = ()  # layers that have adapters, counted from 0; empty: all
    # Other ranks, by patterns as in targets, or of one layer: 3/attn/q; the first that fits counts.
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()  # other alphas, likewise
    # Patterns of weights that are trained whole beside the adapters: embedding, pre_attn_norm, '*_norm', attn/k, ...
    modules_to_save: tuple[str, ...] = ()
    # Tokens whose rows of the embedding are trained beside the adapters: ids, texts that are one token, and the word
    # added for the tokens that the tokenizer has beyond the model's.
    trainable_tokens: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        _check_numbers(self, "adapter")
        self._check_tokens()
        if self.rank < 1:
            raise ValueError(f"adapter.rank is {self.rank}; it must be at least 1")
        if any(rank < 1 for _, rank in self.rank_pattern):
            raise ValueError(f"adapter.rank_pattern is {self.rank_pattern}; every rank must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout is {self.dropout}; it must be at least 0 and below 1")
        if not any(self.targets) and not self.modules_to_save and not self.trainable_tokens:
            raise ValueError("adapter.targets is empty; name at least one, for instance 'attn/q'")
        if list(self.layers) != sorted({layer for layer in self.layers if 0 <= layer < _MOST_LAYERS}):
            raise ValueError(f"adapter.layers is {self.layers}; give layers once each, in order, counted from 0")

    def _check_tokens(self) -> None:
        """Raises ValueError where `trainable_tokens` cannot be meant."""
        tokens = self.trainable_tokens
        if tokens and self.kind == "none":
            raise ValueError(
                f"adapter.trainable_tokens is {reprlib.repr(tokens)}, and adapter.kind is none, which trains every row "
                "of the embedding; leave it out, or set adapter.kind to lora or dora"
            )
        if len({*tokens}) < len(tokens) or any(isinstance(token, int) and not 0 <= token < 2**31 for token in tokens):
            raise ValueError(
                f"adapter.trainable_tokens is {reprlib.repr(tokens)}; give every token once, an id counted from 0"
            )

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by, where no pattern says otherwise."""
        return self._scale(self.rank, self.alpha)

    def layer_rank(self, projection: str, layer: int) -> int:
        """The rank of the adapter that a projection such as "attn/q" has in a layer."""
        return _match_pattern(self.rank_pattern, projection, layer, self.rank)

    def layer_alpha(self, projection: str, layer: int) -> float:
        """The alpha of the adapter of a projection in a layer."""
        return _match_pattern(self.alpha_pattern, projection, layer, self.alpha)

    def layer_scale(self, projection: str, layer: int) -> float:
        """What the low-rank product of a projection is multiplied by in a layer."""
        return self._scale(self.layer_rank(projection, layer), self.layer_alpha(projection, layer))

    def stack_rank(self, projection: str, layers: int) -> int:
        """The rank of the arrays of all of a model's layers: the largest of those that have an adapter."""
        return max(self.layer_rank(projection, layer) for layer in self.layers or range(layers))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of `trainable_tokens`, in order. Raises ValueError where there are texts, which take a tokenizer."""
        texts = [token for token in self.trainable_tokens if isinstance(token, str)]
        if texts:
            raise ValueError(
                f"adapter.trainable_tokens has {reprlib.repr(texts[0])}, and only training has a tokenizer to say its "
                "id; give the id"
            )
        return tuple(token for token in self.trainable_tokens if isinstance(token, int))

    def replaces(self, path: str) -> bool:
        """Whether the weight with that path, such as "blocks/pre_attn_norm/w", is trained whole: `modules_to_save`."""
        if self.kind == "none" or is_adapter_path(path):
            return False
        return any(fnmatch.fnmatch(weight_name(path), pattern) for pattern in self.modules_to_save)

    @property
    def unmergeable_targets(self) -> list[str]:
        """Projections whose adapter no weight can take in, as a norm stands between."""
        if self.kind == "none" or not self.after_norm:
            return []
        after = "attn/o", "mlp/down"
        return [name for name in after if any(fnmatch.fnmatch(name, target) for target in self.targets)]


def _match_pattern[Number: (int, float)](
    patterns: tuple[tuple[str, Number], ...], projection: str, layer: int, default: Number
) -> Number:
    """The number of the first pattern that fits a projection, or a projection in a layer."""
    names = projection, f"{layer}/{projection}"
    return next(
        (number for pattern, number in patterns if any(fnmatch.fnmatch(name, pattern) for name in names)), default
    )


def list_patterns[Number: (int, float)](
    numbers: Mapping[str, Mapping[int, Number]], default: Number
) -> tuple[tuple[str, Number], ...]:
    """The shortest patterns, as `rank_pattern` has them, of numbers by projection and layer, beside a default.

    What most layers of a projection have is said of the projection, and what is otherwise, before it, of each layer.
    """
    patterns = []
    for projection, by_layer in numbers.items():
        counts = Counter(by_layer.values())
        usual = max(counts, key=lambda number: (counts[number], number == default))
        patterns += [(f"{layer}/{projection}", number) for layer, number in by_layer.items() if number != usual]
        patterns += [(projection, usual)] if usual != default else []
    return tuple(patterns)


TOKEN_ROWS = "token_rows/w"  # the path of the rows that `trainable_tokens` trains


def is_adapter_path(path: str) -> bool:
    """Whether the array with this path is an adapter's own, and not one that it has in place of the model's."""
    return "/adapter/" in path or path == TOKEN_ROWS


def weight_name(path: str) -> str:
    """What `modules_to_save` calls the weight with this path: "blocks/pre_attn_norm/w" is pre_attn_norm."""
    return path.removeprefix("blocks/").removesuffix("/w")
