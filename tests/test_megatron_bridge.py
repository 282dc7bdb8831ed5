"""Every command and snippet of Megatron-Bridge's page on Gemma 2, with the names of its programs and modules changed.

Those that load weights run on a small model whose eight heads take the page's eight tensor shards; those that
configure training of a real size stop before it.
"""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from peers import BITING, hf_model

import gemma2_jax as g2
from gemma2_jax import config_text, generate, megatron_bridge, recipes, train
from gemma2_jax.config import Config
from gemma2_jax.convert import __main__ as convert
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.verify import compare_checkpoints
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B

PAGE = (Path(__file__).parent / "fixtures" / "megatron_bridge_commands.md").read_text()
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", PAGE, flags=re.DOTALL)
TINY = Path(__file__).parents[1] / "assets" / "tiny-gemma2"


def commands(block: str) -> list[list[str]]:
    """The command lines of a block of shell: their module and their arguments."""
    lines = block.replace("\\\n", " ").replace("$SAVE_DIR", "/save").strip().splitlines()
    found = [shlex.split(line) for line in lines if line]
    assert all(words[:2] == ["python", "-m"] for words in found)
    return [words[2:] for words in found]


def blocks(kind: str, word: str) -> list[str]:
    return [block for language, block in BLOCKS if language == kind and word in block]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A Hugging Face folder with eight heads, and a tokenizer, in place of google/gemma-2-9b."""
    folder = tmp_path_factory.mktemp("hf")
    hf_model(replace(BITING["27b"], vocab_size=4096, max_length=256)).save_pretrained(folder)
    load_tokenizer(str(TINY)).save_pretrained(folder)
    return folder


def localize(words: list[str], small: Path, folder: Path) -> list[str]:
    """The same arguments with the page's paths below a folder, and its Hub ids as the small model."""
    replaced = [re.sub(r"^google/gemma-2-\w+$", str(small), word) for word in words]
    return [re.sub(r"^(/models|/results|\.)/", f"{folder}/", word) for word in replaced]


def test_the_page_is_whole():
    assert len(BLOCKS) == 15
    tested = [*blocks("bash", "gemma2_jax.train"), *blocks("python", "_config"), *blocks("python", "AutoBridge")]
    tested += [
        *blocks("bash", "convert import"),
        *blocks("bash", "convert export"),
        *blocks("bash", "gemma2_jax.generate"),
    ]
    assert sorted(tested) == sorted(block for _, block in BLOCKS)


def test_the_first_example_loads_eight_shards(small, capsys, tmp_path):
    """A model in eight tensor shards, which then writes its weights bit for bit."""
    (block,) = blocks("python", "AutoBridge")
    scope: dict = {}
    exec(block.replace("google/gemma-2-9b", str(small)), scope)
    model = scope["model"]
    assert dict(model.mesh.shape) == {"data": 1, "stage": 1, "fsdp": 1, "context": 1, "tensor": 8}
    q_LDNH = model.blocks.attn.q.w[...]
    assert [shard.data.shape for shard in q_LDNH.addressable_shards] == [(2, 40, 1, 8)] * 8
    assert f"becomes gemma2_jax.load('{small}', mesh=gemma2_jax.mesh(tensor=8))" in capsys.readouterr().err
    g2.save(model, tmp_path / "out")
    differences = compare_checkpoints(open_checkpoint(tmp_path / "out"), open_checkpoint(small))
    assert all(difference.within(0) for difference in differences)


def test_pipeline_stages_shard_the_weights(small):
    provider = megatron_bridge.AutoBridge.from_hf_pretrained(str(small)).to_megatron_provider()
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = 4, 2
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    assert len({shard.index for shard in model.embedding[...].addressable_shards}) == 8
    with pytest.raises(ValueError, match="no model is wrapped here"):
        provider.provide_distributed_model(wrap_with_ddp=True)
    provider.context_parallel_size = 0
    with pytest.raises(ValueError, match="context_parallel_size is 0"):
        provider.finalize()


def test_import_export_and_generate(small, tmp_path, monkeypatch, capsys):
    """The page's conversions and its inference, one after the other on the same files."""
    (imports,), (exports,), (inference,) = (
        blocks("bash", word) for word in ("convert import", "convert export", "gemma2_jax.generate")
    )
    for module, *words in commands(imports):
        assert module == "gemma2_jax.convert"
        monkeypatch.setattr(sys, "argv", ["convert", *localize(words, small, tmp_path)])
        convert.main()
    assert {path.name for path in tmp_path.iterdir()} == {"gemma-2-2b", "gemma-2-9b", "gemma-2-27b"}

    trained = tmp_path / "gemma2_9b" / "checkpoints" / "iter_00001000"
    trained.parent.mkdir(parents=True)
    (tmp_path / "gemma-2-2b" / "iter_0000000").rename(trained)
    ((module, *words),) = commands(exports)
    monkeypatch.setattr(sys, "argv", ["convert", *localize(words, small, tmp_path)])
    convert.main()
    differences = compare_checkpoints(open_checkpoint(tmp_path / "gemma2-9b-hf-export"), open_checkpoint(small))
    assert all(difference.within(0) for difference in differences)

    ((module, *words),) = commands(inference)
    assert module == "gemma2_jax.generate"
    monkeypatch.setattr(sys, "argv", ["generate", *localize(words, small, tmp_path)])
    capsys.readouterr()
    generate.main()
    said = capsys.readouterr()
    assert f"becomes --checkpoint {tmp_path}/gemma-2-9b --hf-config {small}\n" in said.err
    expected = g2.generate(g2.load(small), ["What is artificial intelligence?"], max_new_tokens=100)
    assert said.out == expected[0] + "\n" and said.out.strip()


def test_inference_takes_the_tokenizer_beside_the_hf_config(small, tmp_path, monkeypatch, capsys):
    """A Megatron checkpoint without one; and without a Megatron checkpoint, the Hugging Face model itself."""
    g2.convert(small, tmp_path / "megatron", to="megatron")
    for file in (tmp_path / "megatron" / "iter_0000000" / "tokenizer").iterdir():
        file.unlink()
    texts = []
    for words in (["--megatron-model-path", f"{tmp_path}/megatron"], []):
        arguments = [f"--hf_model_path={small}", *words, "--prompt", "The", "--max_new_tokens", "4"]
        monkeypatch.setattr(sys, "argv", ["generate", *arguments])
        generate.main()
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


SIZES = {"2b": GEMMA2_2B, "9b": GEMMA2_9B, "27b": GEMMA2_27B}


@pytest.mark.parametrize("block", blocks("python", "pretrain_config"), ids=["2b", "9b", "27b"])
def test_pretraining_recipes(block, capsys):
    scope: dict = {}
    exec(block, scope)
    config: Config = scope["config"]
    (size,) = re.findall(r"import gemma2_(\w+)_pretrain_config", block)
    base = recipes.load_recipe(f"{size}_pretrain")
    assert config == replace(
        base,
        workdir=f"runs/my_gemma2_{size}_pretrain",
        steps=100_000,
        data=replace(base.data, train="path/to/data"),
        train=replace(base.train, global_batch_size=32),
    )
    assert capsys.readouterr().err == (
        f"gemma2_{size}_pretrain_config becomes recipe('{size}_pretrain', data.train='path/to/data', steps=100000, "
        f"train.global_batch_size=32, workdir='runs/my_gemma2_{size}_pretrain')\n"
    )


@pytest.mark.parametrize(
    "block", blocks("python", "finetune_config"), ids=["2b-full", "2b-lora", "9b-lora", "27b-lora"]
)
def test_finetuning_recipes(block):
    scope: dict = {}
    exec(block, scope)
    config: Config = scope["config"]
    (size,) = re.findall(r"import gemma2_(\w+)_finetune_config", block)
    kind = "sft" if "full" in block else "lora"
    base = recipes.load_recipe(f"{size}_{kind}")
    assert config == replace(
        base,
        workdir=f"runs/gemma2_{size}_{'full' if kind == 'sft' else 'lora'}_finetune",
        init=f"/models/gemma-2-{size}",
        steps=1000,
        train=replace(base.train, global_batch_size=64 if kind == "sft" else 128),
    )
    assert config.model == SIZES[size] and config.adapter.kind == ("none" if kind == "sft" else "lora")


@pytest.mark.parametrize("block", blocks("bash", "gemma2_jax.train"), ids=["2b-full", "9b-full", "27b-full", "2b-lora"])
def test_training_commands(block, capsys):
    ((module, *words),) = commands(block)
    assert module == "gemma2_jax.train"
    config = train.parse(words).run
    (size,) = re.findall(r"--recipe gemma2_(\w+)_finetune_config", block)
    kind = "sft" if "--peft none" in block else "lora"
    base = recipes.load_recipe(f"{size}_{kind}")
    assert config == replace(
        base,
        workdir=f"/save/gemma2_{size}_{'finetune' if kind == 'sft' else 'lora'}",
        init=f"/models/gemma-2-{size}",
        steps=1000 if kind == "sft" else base.steps,
        train=replace(base.train, global_batch_size=64 if kind == "sft" else 128),
    )
    assert f"--recipe gemma2_{size}_finetune_config becomes --config {size}_{kind}" in capsys.readouterr().err


def test_every_argument_and_field_has_a_place():
    """What is translated exists in our config, and takes the value."""
    known = {line.split(" = ")[0] for line in config_text.to_text(recipes.load_recipe("2b_lora")).splitlines()}
    assert {*megatron_bridge._ARGUMENTS.values(), *megatron_bridge._FIELDS.values()} <= known
    config = megatron_bridge.gemma2_27b_finetune_config(
        name="x",
        dir="/runs",
        peft="dora",
        lr=1e-3,
        min_lr=1e-5,
        lr_warmup_iters=7,
        seq_length=1024,
        micro_batch_size=2,
        tensor_parallelism=2,
        pipeline_model_parallel_size=4,
        packed_sequence=False,
    )
    assert (config.workdir, config.adapter.kind, config.optim.lr, config.optim.min_lr) == (
        "/runs/x",
        "dora",
        1e-3,
        1e-5,
    )
    assert (config.optim.warmup_steps, config.train.sequence_length, config.train.micro_batch_size) == (7, 1024, 2)
    assert (config.mesh.tensor, config.mesh.stage, config.data.packing) == (2, 4, False)
    assert megatron_bridge.gemma2_2b_finetune_config(peft=None).adapter.kind == "none"
    assert megatron_bridge.gemma2_2b_finetune_config().adapter.kind == "lora"


@pytest.fixture
def corpora(tmp_path):
    """A folder with the names of two indexed data sets."""
    for name in "ab":
        (tmp_path / f"{name}.idx").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "source"),
    [
        (["30", "{0}/a", "70", "{0}/b"], "30*{0}/a,70*{0}/b"),
        ("0.3 {0}/a 0.7 {0}/b", "0.3*{0}/a,0.7*{0}/b"),
        (["{0}/a", "{0}/b"], "{0}/a,{0}/b"),
        (["{0}/a.bin"], "{0}/a.bin"),
    ],
)
def test_indexed_data_is_read_in_its_order(corpora, paths, source):
    """With the splits of its recipes, unless the held-out data is named."""
    paths = paths.format(corpora) if isinstance(paths, str) else [path.format(corpora) for path in paths]
    data = megatron_bridge.gemma2_2b_pretrain_config(data_paths=paths).data
    assert (data.train, data.order, data.split_shares, data.seed) == (
        source.format(corpora),
        "megatron",
        "9999,8,2",
        1234,
    )
    data = megatron_bridge.gemma2_2b_pretrain_config(train_data_path=paths, valid_data_path=[f"{corpora}/b"]).data
    assert (data.train, data.eval, data.order, data.split_shares) == (
        source.format(corpora),
        f"{corpora}/b",
        "megatron",
        "",
    )


@pytest.mark.parametrize(
    ("words", "source"),
    [
        (["dataset.data_path=0.3 {0}/a 0.7 {0}/b"], "0.3*{0}/a,0.7*{0}/b"),
        (["dataset.blend=[['{0}/a','{0}/b'],[0.3,0.7]]"], "0.3*{0}/a,0.7*{0}/b"),
        (["dataset.blend=[['{0}/a'],None]"], "{0}/a"),
    ],
)
def test_commands_name_indexed_data(corpora, words, source):
    words = [word.format(corpora) for word in words]
    data = train.parse(["--recipe", "gemma2_2b_pretrain_config", *words]).run.data
    assert (data.train, data.order, data.split_shares) == (source.format(corpora), "megatron", "9999,8,2")
    words += ['dataset.split="90,10,0"', "dataset.random_seed=7"]
    data = train.parse(["--recipe", "gemma2_2b_pretrain_config", *words]).run.data
    assert (data.order, data.split_shares, data.seed) == ("megatron", "90,10,0", 7)
    with pytest.raises(SystemExit):
        train.parse(["--recipe", "gemma2_2b_pretrain_config", "dataset.blend=[1,2,3]"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(global_batchsize=3),
            r"takes no global_batchsize here; did you mean global_batch_size\? It takes name, dir",
        ),
        (dict(peft="ia3"), "peft is ia3; it may be lora, dora or none"),
    ],
)
def test_unknown_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        megatron_bridge.gemma2_2b_finetune_config(**arguments)
    if "peft" in arguments:
        with pytest.raises(ValueError, match=r"gemma2_2b_pretrain_config takes no peft here"):
            megatron_bridge.gemma2_2b_pretrain_config(**arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--recipe gemma2_2b_finetune",
            "there is no recipe gemma2_2b_finetune; did you mean gemma2_2b_finetune_config",
        ),
        ("--recipe gemma2_2b_pretrain_config --peft lora", "trains all weights, and peft is lora"),
        (
            "--recipe gemma2_2b_finetune_config checkpoint.async_save=true",
            "checkpoint.async_save has no counterpart here",
        ),
    ],
)
def test_unknown_fields_end_with_a_sentence(words, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(words.split())
    assert message in capsys.readouterr().err


def test_other_commands_are_left_alone(capsys):
    words = ["--config", "2b_lora", "train.global_batch_size=64"]
    assert megatron_bridge.translate_arguments(words) == words
    assert megatron_bridge.translate_generate_arguments(["--checkpoint", "x"]) == ["--checkpoint", "x"]
    assert capsys.readouterr().err == ""


def test_what_is_given_in_another_way(capsys):
    """None is not given, a folder alone is taken, and sequence parallelism is said to be always on."""
    config = megatron_bridge.gemma2_9b_finetune_config(dir="/d", finetune_lr=None, sequence_parallel=True)
    assert config == replace(recipes.load_recipe("9b_lora"), workdir="/d/9b_lora")
    with pytest.raises(ValueError, match="sequence_parallel is False; here it is part of tensor parallelism"):
        megatron_bridge.gemma2_9b_finetune_config(sequence_parallel=False)
    with pytest.raises(AttributeError, match="tensor_paralel"):
        megatron_bridge.AutoBridge.from_hf_pretrained("x").to_megatron_provider().tensor_paralel = 3
    with pytest.raises(ValueError, match="both name a recipe; give one of them"):
        megatron_bridge.translate_arguments(["--config", "tiny_lora", "--recipe", "gemma2_2b_finetune_config"])
