"""Every shape of adapter that PEFT saves for Gemma 2: read with PEFT's own logits, or refused in a sentence.

PEFT makes each input here. What was read is merged, and the merged model runs in transformers, so that a case costs no
compilation of ours; a few run in ours as well.
"""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peers import BITING
from safetensors.torch import load_file, save_file

from gemma2_jax.convert import verify
from gemma2_jax.convert.checkpoints import Checkpoint, read_array
from gemma2_jax.convert.formats import vllm
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model_config import AdapterConfig

CONFIG = BITING["9b"]  # four layers
TOKENS = torch.arange(3, 27)[None]
FILE = "adapter_model.safetensors"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
TIED = {"ensure_weight_tying": True}
PAIR = ["q_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An adapter: PEFT's options, what is done to the saved folder, and what is expected of reading it."""

    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Path], object] = lambda folder: None
    vocabulary: int = CONFIG.vocab_size
    feature_extraction: bool = False
    loads: bool = False  # whether PEFT's logits are those of the folder once it was changed
    adapter: dict[str, Any] = field(default_factory=dict)  # fields of ours
    note: str = ""
    error: str = ""


def case(**options) -> Case:
    """A case of these fields; all others are options of PEFT's."""
    fields = {name: options.pop(name) for name in Case.__dataclass_fields__ if name in options}
    return Case(options=options, **fields)


def edit_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_names(rename: Callable[[str], str], *, binary: bool = False):
    """Renames the file's tensors, and stores them as older versions of PEFT did if asked."""

    def change(folder: Path) -> None:
        tensors = {rename(name): tensor for name, tensor in load_file(folder / FILE).items()}
        if binary:
            (folder / FILE).unlink()
            torch.save(tensors, folder / "adapter_model.bin")
        else:
            save_file(tensors, folder / FILE)

    return change


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]):
    def change(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        edit(tensors)
        save_file(tensors, folder / FILE)

    return change


def with_adapter_name(name: str) -> str:
    """As a state dict that did not go through PEFT's saving has it."""
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}", f".{part}.default")
    return name.replace("layernorm.weight", "layernorm.modules_to_save.default.weight")


def move_into(*names: str):
    """Leaves the adapter in subfolders of these names, as PEFT saves one that is not called "default"."""

    def change(folder: Path) -> None:
        files = list(folder.iterdir())
        for name in names:
            (folder / name).mkdir()
            for file in files:
                shutil.copyfile(file, folder / name / file.name)
        for file in files:
            file.unlink()

    return change


UNSLOTH = (  # what unsloth writes for a model of several modalities
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|down_proj)))"
)
NORMS = ("pre_attn_norm", "post_attn_norm", "pre_mlp_norm", "post_mlp_norm", "final_norm")
APART = "makes the embedding and the output matrix differ: PEFT changed {}. Gemma 2 has one matrix for both"

CASES = {
    # Which modules have an adapter.
    "layers": case(layers_to_transform=[0, 2], adapter={"layers": (0, 2)}),
    "one layer": case(layers_to_transform=3, layers_pattern="layers", adapter={"layers": (3,)}),
    "layers by patterns": case(layers_to_transform=[1, 2], layers_pattern=["h", "layers"], adapter={"layers": (1, 2)}),
    "first layers": case(layers_to_transform=[0, 1], adapter={"layers": (0, 1)}),
    "layers with DoRA": case(layers_to_transform=[1, 3], use_dora=True, adapter={"layers": (1, 3), "kind": "dora"}),
    "excluded names": case(exclude_modules=["layers.1.mlp.down_proj"], adapter={"layers": (0, 1, 2, 3)}),
    "excluded expression": case(exclude_modules=r".*\.[13]\..*", adapter={"layers": (0, 2)}),
    "expression": case(target_modules=r".*\.layers\.[02]\.(self_attn\.q|mlp\.down)_proj", adapter={"layers": (0, 2)}),
    "unsloth's expression": case(target_modules=UNSLOTH, adapter={"layers": ()}),
    "full names": case(
        target_modules=["model.layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"],
        use_dora=True,
        adapter={"layers": (0, 2), "targets": ("attn/q", "mlp/up")},
    ),
    "every layer once": case(
        target_modules=r"model\.layers\.(0\.self_attn\.k_proj|[123]\.self_attn\.v_proj)",
        use_dora=True,
        adapter={"layers": (0, 1, 2, 3), "targets": ("attn/k", "attn/v")},
    ),
    "all linear": case(target_modules="all-linear", adapter={"layers": (), "modules_to_save": ()}),
    # Ranks and scales.
    "rank by projection": case(rank_pattern={"down_proj": 5}, adapter={"rank": 3, "rank_pattern": (("mlp/down", 5),)}),
    "rank by layer": case(
        rank_pattern={"layers.1.self_attn.q_proj": 2, r"layers\.[23]\.mlp\.down_proj": 7, "q_proj": 4},
        adapter={
            "rank": 3,
            "rank_pattern": (("1/attn/q", 2), ("attn/q", 4), ("2/mlp/down", 7), ("3/mlp/down", 7)),
        },
    ),
    "alpha by projection": case(alpha_pattern={"q_proj": 1.5}, adapter={"alpha_pattern": (("attn/q", 1.5),)}),
    "alpha by layer": case(
        alpha_pattern={"^model.layers.2.mlp.down_proj": 20, "layers.1.*q_proj": 1},
        adapter={"alpha": 6, "alpha_pattern": (("1/attn/q", 1), ("2/mlp/down", 20))},
    ),
    "both by layer": case(
        rank_pattern={"0.self_attn.q_proj": 6}, alpha_pattern={".*0.*": 12, "3.mlp.down_proj": 9}, use_rslora=True
    ),
    "rank by layer with DoRA": case(
        rank_pattern={"layers.0.mlp.down_proj": 1}, alpha_pattern={"down_proj": 2}, use_dora=True
    ),
    "no scale in one layer": case(
        rank_pattern={"0.self_attn.q_proj": 6}, alpha_pattern={"0.self_attn.q_proj": 0},
        adapter={"alpha": 6, "rank_pattern": (("0/attn/q", 6),), "alpha_pattern": (("0/attn/q", 0),)},
    ),
    "every rank another": case(rank_pattern={"q_proj": 8, "down_proj": 8}, adapter={"rank": 8, "rank_pattern": ()}),
    # Weights that are saved whole.
    "norms": case(modules_to_save=["input_layernorm", "norm"], adapter={"modules_to_save": NORMS}),
    "a norm of one layer": case(
        modules_to_save=["layers.1.input_layernorm", "model.norm"],
        adapter={"modules_to_save": ("pre_attn_norm", "final_norm")},
    ),
    "a projection of one layer": case(
        target_modules=["v_proj"], modules_to_save=["2.self_attn.q_proj"], adapter={"modules_to_save": ("attn/q",)}
    ),
    "embedding, tied": case(modules_to_save=["embed_tokens"], **TIED, adapter={"modules_to_save": ("embedding",)}),
    "head, tied": case(modules_to_save=["lm_head"], **TIED, adapter={"modules_to_save": ("embedding",)}),
    "embedding and head, tied": case(modules_to_save=["embed_tokens", "lm_head", "norm"], **TIED),
    "embedding": case(modules_to_save=["embed_tokens"], error=APART.format("model.embed_tokens alone")),
    "head": case(modules_to_save=["lm_head"], error=APART.format("lm_head alone")),
    "embedding and head": case(
        modules_to_save=["embed_tokens", "lm_head"], error="changed model.embed_tokens and lm_head, each by itself. G"
    ),
    "embedding and head that agree": case(
        modules_to_save=["embed_tokens", "lm_head"],
        change=edit_tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()})),
        loads=True,
        adapter={"modules_to_save": ("embedding",)},
    ),
    # Rows of the embedding.
    "tokens": case(
        trainable_token_indices=[300, 7, 9], adapter={"modules_to_save": (), "trainable_tokens": (300, 7, 9)}
    ),
    "tokens by name": case(
        trainable_token_indices={"embed_tokens": [7, 9]}, modules_to_save=["model.norm"],
        adapter={"modules_to_save": ("final_norm",), "trainable_tokens": (7, 9)},
    ),
    "tokens of both": case(
        trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [5, 6]}, **TIED,
        adapter={"modules_to_save": (), "trainable_tokens": (5, 6)},
    ),
    "a token twice": case(
        trainable_token_indices=[7, 9], change=edit_config(trainable_token_indices=[7, 7]),
        error="give every token once",
    ),
    "tokens of the head": case(trainable_token_indices={"lm_head": [5, 6]}, error=APART.format("lm_head alone")),
    "other tokens of both": case(
        trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [6]}, error="lm_head, each by itself"
    ),
    # LoRA on the embedding and the output matrix.
    "LoRA on the embedding, tied": case(target_modules=["q_proj", "embed_tokens"], **TIED),
    "LoRA on the head, tied": case(target_modules=["q_proj", "lm_head"], **TIED),
    "LoRA of two scales": case(target_modules=["lm_head"], rank_pattern={"embed_tokens": 2}, **TIED, error="by itself"),
    "LoRA on both, tied": case(target_modules=["embed_tokens", "lm_head"], **TIED, adapter={"targets": ()}),
    "LoRA on the embedding": case(
        target_modules=["q_proj", "embed_tokens"], error=APART.format("model.embed_tokens alone")
    ),
    "LoRA on the head": case(target_modules=["q_proj", "lm_head"], error=APART.format("lm_head alone")),
    "DoRA on the embedding": case(
        target_modules=["q_proj", "embed_tokens"], use_dora=True, error="has DoRA on model.embed_tokens, which scales"
    ),
    # A vocabulary that grew.
    "grown": case(vocabulary=390, note="embedding of 390 tokens in place of 384, as its vocabulary was grown"),
    "grown, its tokens trained": case(
        vocabulary=390, trainable_token_indices=[389, 384], note="390 tokens in place",
        adapter={"modules_to_save": (), "trainable_tokens": (389, 384)},
    ),
    "grown, the embedding trained": case(vocabulary=390, modules_to_save=["embed_tokens"], **TIED, note="390 tokens"),
    "grown, LoRA on the embedding": case(vocabulary=390, target_modules=["v_proj", "embed_tokens"], **TIED),
    # Options that change nothing.
    "biases": case(bias="all", note="its bias is 'all', and Gemma 2 has no biases"),
    "biases of LoRA": case(bias="lora_only", note="its bias is 'lora_only'"),
    "fan_in_fan_out": case(change=edit_config(fan_in_fan_out=True), note="PEFT turns off for matrices like Gemma 2's"),
    # Files and names.
    "binary": case(modules_to_save=["norm"], change=edit_names(str, binary=True)),
    "binary with names": case(use_dora=True, change=edit_names(with_adapter_name, binary=True)),
    "adapter's name": case(use_dora=True, modules_to_save=["input_layernorm"], change=edit_names(with_adapter_name)),
    "wrapped": case(change=edit_names(lambda name: f"module._orig_mod.{name}".replace("mlp", "mlp._orig_mod"))),
    "in a subfolder": case(change=move_into("mine")),
    "without an output matrix": case(
        feature_extraction=True, target_modules=r"layers\.2\.mlp.*_proj", adapter={"layers": (2,)}
    ),
    # What is wrong with them.
    "several subfolders": case(change=move_into("one", "two"), error="holds the adapters one, two; name one of them"),
    "two adapters in a file": case(
        change=edit_tensors(
            lambda t: t.update({with_adapter_name(n).replace("default", "b"): x.clone() for n, x in t.items()})
            or [t.update({with_adapter_name(n): t.pop(n)}) for n in [*t] if ".b." not in n]
        ),
        error="has the adapters b and default in one file",
    ),
    "classifier": case(
        change=edit_tensors(lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, CONFIG.width)})),
        error=r"has a classifier's or reward model's head \(base_model\.model\.score\.weight\), .*task_type CAUSAL_LM",
    ),
    "a module is missing": case(
        change=edit_tensors(lambda t: [t.pop(name) for name in [*t] if "layers.2.self_attn" in name]),
        error=r"lacks .*layers\.2\.self_attn\.q_proj\.lora_A\.weight, .*lora_B\.weight;",
    ),
    "a module is not a target": case(change=edit_config(layers_to_transform=[0, 1, 2]), error="unexpected .*layers.3"),
    "another rank": case(
        change=edit_config(rank_pattern={"q_proj": 9}), error=r"has shape \(3, 56\) where its config expects \(9, 56\)"
    ),
    "half of a LoRA on the embedding": case(
        target_modules=["q_proj", "embed_tokens"], **TIED,
        change=edit_tensors(lambda t: t.pop("base_model.model.model.embed_tokens.lora_embedding_B")),
        error=r"lacks .*embed_tokens\.lora_embedding_B",
    ),
    "not gathered": case(
        change=edit_tensors(lambda t: t.update({name: torch.zeros(0) for name in t})),
        error="16 of 16 tensors have no elements, such as .*: DeepSpeed ZeRO-3 saved them without gathering",
    ),
    "double precision": case(
        modules_to_save=["embed_tokens", "lm_head"],
        change=edit_tensors(lambda t: t.update({HEAD: t[HEAD].double()})),
        error="lm_head.weight is stored as float64; this program reads BF16, F16, F32",
    ),
    "a saved module is missing": case(change=edit_config(modules_to_save=["score"]), error="'score', and the file"),
    "tokens that are not there": case(
        trainable_token_indices=[7, 9], change=edit_config(trainable_token_indices=[7, 384]), error="has 384 rows"
    ),
    "fewer tokens": case(
        trainable_token_indices=[7, 9], change=edit_config(trainable_token_indices=[7]), error=r"has shape \(2, 56\)"
    ),
    "expression without end": case(
        change=edit_config(target_modules="(.*)*x"), error="target_modules has .* that could take for ever; name the"
    ),
    "expression that is none": case(change=edit_config(rank_pattern={"(": 3}), error="which is no regular expression"),
    "another kind": case(change=edit_config(peft_type="LOHA"), error="this program has 'LORA' only: bring what PEFT's"),
    "prompts": case(change=edit_config(peft_type="PREFIX_TUNING"), error="so that nothing merges it; train a LoRA"),
    "biases of its own": case(lora_bias=True, error="lora_bias is True, .* train without it, or bring what PEFT's me"),
    "invocations": case(change=edit_config(alora_invocation_tokens=[5]), error="does not have; train without it$"),
    "layers that are none": case(change=edit_config(layers_to_transform=["a"]), error="must be numbers of layers"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(base) -> transformers.Gemma2ForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.numpy()


def make_adapter(case: Case, plain: transformers.Gemma2ForCausalLM, folder: Path) -> np.ndarray:
    """Saves the case's adapter as PEFT does, and returns PEFT's logits with it."""
    model = copy.deepcopy(plain)
    adapted: Any = model.model if case.feature_extraction else model
    task = "FEATURE_EXTRACTION" if case.feature_extraction else "CAUSAL_LM"
    options = {"r": 3, "lora_alpha": 6, "target_modules": PAIR} | case.options
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT's, about embeddings that are not tied
        if case.vocabulary != CONFIG.vocab_size:
            model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
        wrapped = peft.get_peft_model(adapted, peft.LoraConfig(**options, task_type=task))
        generator = torch.Generator().manual_seed(0)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = logits_of(model if case.feature_extraction else wrapped)
        wrapped.save_pretrained(folder)
    case.change(folder)
    return peft_logits(plain, folder) if case.loads else expected


def peft_logits(plain: transformers.Gemma2ForCausalLM, folder: Path, vocabulary: int = CONFIG.vocab_size) -> np.ndarray:
    """The logits of the adapter in a folder as PEFT loads it. Raises where PEFT finds other tensors than it expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy(plain)
        if vocabulary != CONFIG.vocab_size:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        loaded = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder))
        result = loaded.load_adapter(folder, "default")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key or "modules_to_save" in key]
    return logits_of(loaded)


@pytest.mark.parametrize("name", CASES)
def test_every_shape_is_peft_s_or_refused(base, plain, tmp_path, name):
    case = CASES[name]
    expected = make_adapter(case, plain, tmp_path / "adapter")
    if case.error:
        with pytest.raises(ValueError, match=case.error):
            open_checkpoint(tmp_path / "adapter", base=base)
        return
    source = open_checkpoint(tmp_path / "adapter", base=base)
    assert {key: getattr(source.adapter, key) for key in case.adapter} == case.adapter
    assert case.note in " ".join(source.notes)
    assert bool(case.note) == bool(source.notes) or case.vocabulary != CONFIG.vocab_size
    write_checkpoint(Job(source=source, to="hf", merge=True), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert merged.config.vocab_size == case.vocabulary
    found = logits_of(merged)
    # Caps and attention amplify the last bits of float32: 1e-4 of logits up to 30.
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    changes_nothing = logits_of(plain)[..., : found.shape[-1]]
    assert np.abs(found[..., : CONFIG.vocab_size] - changes_nothing).max() > 0.01


@pytest.mark.parametrize("name", ["full names", "both by layer", "a norm of one layer", "grown, its tokens trained"])
def test_ours_and_orbax(base, plain, tmp_path, name):
    """Beside the weights, and through Orbax, it is the same, and so is what is written for PEFT of both."""
    expected = make_adapter(CASES[name], plain, tmp_path / "adapter")
    source = open_checkpoint(tmp_path / "adapter", base=base)
    write_checkpoint(Job(source=source, to="orbax"), tmp_path / "orbax")
    stored = open_checkpoint(tmp_path / "orbax")
    assert stored.adapter == source.adapter and stored.model == source.model
    assert stored.shapes == source.shapes
    for path, shape in source.shapes.items():
        every = (slice(None),) * len(shape.shape)
        np.testing.assert_array_equal(read_array(stored, path, every), read_array(source, path, every), err_msg=path)
    for name, whole in (("direct", source), ("again", stored)):
        write_checkpoint(Job(source=whole, to="peft"), tmp_path / name)
    for file in (tmp_path / "direct").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    shutil.rmtree(tmp_path / "orbax" / "weights")
    alone = open_checkpoint(tmp_path / "orbax", base=base)
    assert alone.adapter == source.adapter and alone.shapes == source.shapes
    np.testing.assert_allclose(verify.compute_logits(alone, TOKENS[0].tolist())[None], expected, atol=1e-4, rtol=0)


# What is written of some cases: fields of PEFT's config.
WRITTEN = {
    "layers": {"layers_to_transform": [0, 2], "target_modules": PAIR},
    "layers with DoRA": {"layers_to_transform": [1, 3], "use_dora": True},
    "every layer once": {
        "layers_to_transform": None,
        "target_modules": [
            f"layers.{n}.self_attn.{name}" for name, n in (("k_proj", 0), *(("v_proj", n) for n in (1, 2, 3)))
        ],
    },
    "rank by projection": {"r": 3, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {}},
    "rank by layer": {
        "r": 3,
        "rank_pattern": {
            "layers.1.self_attn.q_proj": 2,
            "q_proj": 4,
            "layers.2.mlp.down_proj": 7,
            "layers.3.mlp.down_proj": 7,
        },
        "alpha_pattern": {},
    },
    "both by layer": {
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {"layers.0.self_attn.q_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 12, "layers.0.mlp.down_proj": 12, "layers.3.mlp.down_proj": 9},
        "use_rslora": True,
    },
    "rank by layer with DoRA": {"rank_pattern": {"layers.0.mlp.down_proj": 1}, "alpha_pattern": {"down_proj": 2}},
    "a norm of one layer": {"modules_to_save": ["input_layernorm", "model.norm"]},
    "a projection of one layer": {"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]},
    "tokens": {"modules_to_save": None, "trainable_token_indices": [300, 7, 9]},
    "tokens by name": {"modules_to_save": ["model.norm"], "trainable_token_indices": [7, 9]},
    "grown, its tokens trained": {"modules_to_save": None, "trainable_token_indices": [389, 384]},
    "LoRA on both, tied": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": []},
    "grown": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "LoRA on both, tied"])
def test_peft_loads_what_is_written(base, plain, tmp_path, name):
    """With the same logits, and nothing is written of layers that have no adapter."""
    case = CASES[name]
    expected = make_adapter(case, plain, tmp_path / "adapter")
    source = open_checkpoint(tmp_path / "adapter", base=base)
    write_checkpoint(Job(source=source, to="peft"), tmp_path / "written")
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert {key: config[key] for key in WRITTEN[name]} == WRITTEN[name]
    found = peft_logits(plain, tmp_path / "written", case.vocabulary)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    again = open_checkpoint(tmp_path / "written", base=base)
    assert again.adapter == source.adapter and again.shapes == source.shapes
    original, written = (load_file(tmp_path / folder / FILE) for folder in ("adapter", "written"))
    exact = {key: tensor for key, tensor in written.items() if "lora_" in key or "embed_tokens.token_adapter" in key}
    assert exact.keys() == {key for key in original if "lora_" in key or "embed_tokens.token_adapter" in key}
    assert all(torch.equal(tensor, original[key]) for key, tensor in exact.items())


def test_an_adapter_alone_is_described(plain, tmp_path):
    """Without its model nothing but the config and the names of tensors is known."""
    make_adapter(CASES["layers"], plain, tmp_path / "adapter")
    edit_config(base_model_name_or_path="google/gemma-2-2b")(tmp_path / "adapter")
    source = open_checkpoint(tmp_path / "adapter")
    assert source.model is None and source.adapter == AdapterConfig(
        kind="lora", rank=3, alpha=6, targets=("attn/q", "mlp/down"), layers=(0, 2)
    )


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"kind": "dora"}, ["it is a DoRA, which vLLM refuses to load"]),
        ({"modules_to_save": ("final_norm",)}, ["weights in place of the model's (by modules_to_save"]),
        ({"trainable_tokens": (3,)}, ["it has rows of the embedding (trainable_tokens), which vLLM refuses to load"]),
        (
            {"rank_pattern": (("attn/q", 4),)},
            ["ranks or alphas of their own, and vLLM scales all by one lora_alpha / r"],
        ),
        ({"rank": 600, "kind": "dora"}, ["it is a DoRA", "its rank is above 512, the largest --max-lora-rank"]),
        ({"after_norm": True}, ["added after the post-norm (adapter.after_norm), and vLLM adds it before"]),
    ],
)
def test_what_vllm_cannot_serve_is_named(fields, reasons):
    adapter = AdapterConfig(**{"kind": "lora", "rank": 3} | fields)
    source = Checkpoint(format="peft", path=Path("mine"), model=CONFIG, adapter=adapter, base="google/gemma-2-9b")
    with pytest.raises(ValueError, match=r"^vLLM cannot serve mine: ") as caught:
        Job(source=source, to="peft", reader="vllm")
    assert all(reason in str(caught.value) for reason in reasons)
    merge = "python -m gemma2_jax.convert google/gemma-2-9b MERGED --adapter mine --merge --to hf"
    assert (merge in str(caught.value)) == (not adapter.after_norm)


def test_what_vllm_serves(base, plain, tmp_path):
    """Layers without an adapter, and rank-stabilized ones."""
    adapter = AdapterConfig(kind="lora", rank=33, layers=(0, 2), rslora=True, targets=("attn/q",))
    assert vllm.broken_rules(adapter) == [] and vllm.max_lora_rank(adapter) == 64
    make_adapter(CASES["layers"], plain, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"--for vllm is about adapters, and --to hf writes none"):
        Job(source=open_checkpoint(tmp_path / "adapter", base=base), to="hf", merge=True, reader="vllm")


@pytest.mark.parametrize(
    ("to", "fields", "message"),
    [
        (
            "megatron-adapter",
            {"rank_pattern": (("attn/q", 4),)},
            "ranks of their own .*, and an adapter of Megatron-Br",
        ),
        (
            "megatron-adapter",
            {"kind": "dora", "layers": (0,)},
            "layers without DoRA .*merge it: --merge --to megatron$",
        ),
        (
            "megatron-adapter",
            {"trainable_tokens": (3, 4)},
            r"rows of the embedding \(adapter.trainable_tokens\), and .* --merge --to megatron$",
        ),
        ("gguf-adapter", {"trainable_tokens": (3,)}, "rows of the embedding .*: --merge --to gguf$"),
        ("gguf-adapter", {"modules_to_save": ("embedding",)}, "weights trained whole .*merge it: --merge --to gguf$"),
        (
            "gguf-adapter",
            {"alpha_pattern": (("attn/q", 4.0),)},
            "alphas of their own .*, and an adapter of llama.cpp's",
        ),
    ],
)
def test_adapters_of_other_programs_have_one_rank_and_one_scale(to, fields, message):
    adapter = AdapterConfig(**{"kind": "lora", "rank": 3} | fields)
    source = Checkpoint(format="peft", path=Path("mine"), model=CONFIG, adapter=adapter)
    with pytest.raises(ValueError, match=message):
        Job(source=source, to=to)
