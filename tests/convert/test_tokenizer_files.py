"""The tokenizer that came with a model, and its defaults of generation, go wherever its weights go, byte for byte."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
from peers import BITING, hf_model
from small_runs import ROOT, small

from gemma2_jax.config import Config
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.job import Format, Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.data.encoding import gemma_chat_template
from gemma2_jax.training.tokenizer import keep_tokenizer, load_run_tokenizer

TINY = ROOT / "assets" / "tiny-gemma2"
# Text that no program would write just so.
FILES = {
    "tokenizer.json": b'{"version":   "1.0"}\r\n',
    "tokenizer.model": b"\x00of SentencePiece\xff",
    "tokenizer_config.json": b'{ "tokenizer_class":"GemmaTokenizer"}',
    "special_tokens_map.json": b"{ }",
    "added_tokens.json": b'{"<bos>" :2}',
    "chat_template.jinja": b"{{ bos_token }}\r\n",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "generation_config.json": b'{"eos_token_id": [1,  107]}',
}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def found(folder: Path) -> dict[str, bytes]:
    """The files beside the weights and what describes them."""
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return {name: (folder / name).read_bytes() for name in names if name in FILES or "token" in name}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    hf_model(BITING["2b"]).save_pretrained(folder)
    return put(folder, FILES)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of PEFT's, which has no tokenizer of its own."""
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(hf_model(BITING["2b"]), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("to", "adapted"),
    [
        ("hf", False),
        ("orbax", False),
        ("megatron", False),
        ("megatron-legacy", False),
        ("peft", True),
        ("megatron-adapter", True),
        ("orbax", True),
    ],
)
def test_exports_carry_them_untouched(model, adapter, tmp_path, to: Format, adapted):
    source = open_checkpoint(adapter, base=model) if adapted else open_checkpoint(model)
    write_checkpoint(Job(source=source, to=to), tmp_path / "to")
    folder = tmp_path / "to" / ("iter_0000000/tokenizer" if to.startswith("megatron") else "")
    assert found(folder) == FILES
    if to.startswith("megatron") and not adapted:
        back = Job(source=open_checkpoint(tmp_path / "to", hf_config=model), to="hf")
        write_checkpoint(back, tmp_path / "back")
        assert found(tmp_path / "back") == FILES


def test_files_of_two_tokenizers_do_not_mix(model, adapter, tmp_path):
    """An adapter's tokenizer is the export's, and no file of the model's lies beside it."""
    own = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    put(Path(shutil.copytree(adapter, tmp_path / "adapter")), own)
    source = open_checkpoint(tmp_path / "adapter", base=model)
    write_checkpoint(Job(source=source, to="hf", merge=True), tmp_path / "merged")
    assert found(tmp_path / "merged") == own | {"generation_config.json": FILES["generation_config.json"]}


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("tokenizer.json", lambda path: path.symlink_to("gone"), "is a link to nothing; copy the file there"),
        ("tokenizer.model", Path.mkdir, "is a folder; copy"),
        ("tokenizer_config.json", os.mkfifo, "is no file; copy"),
        ("generation_config.json", Path.mkdir, "is a folder; copy"),
    ],
)
def test_what_is_no_file_is_not_passed_over(tiny, name, make, said):
    (tiny / name).unlink()
    make(tiny / name)
    with pytest.raises(ValueError, match=f"/{name} {said}"):
        open_checkpoint(tiny)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """The tiny model with every file that there may be beside it; its tokenizer.json works."""
    files = FILES | {path.name: path.read_bytes() for path in TINY.iterdir() if path.name != "README.md"}
    return put(tmp_path / "tiny", files)


def keep(config: Config, source: Checkpoint, *, resumes: bool):
    tokenizer = load_run_tokenizer(config, source, resumes=resumes)
    keep_tokenizer(config, source, tokenizer)
    return tokenizer


def test_a_run_keeps_them_untouched(tiny, tmp_path):
    """Whatever becomes of the model's folder afterwards, until the run is started anew."""
    config = small("tiny_lora", tmp_path / "run", init=str(tiny))
    config = replace(config, data=replace(config.data, tokenizer=""))
    config.output.mkdir()
    given = found(tiny)
    keep(config, open_checkpoint(tiny), resumes=False)
    kept = config.output / "tokenizer"
    assert found(kept) == given
    assert json.loads((kept / "config.json").read_text())["num_hidden_layers"] == config.model.layers
    put(tiny, {"tokenizer_config.json": given["tokenizer_config.json"].replace(b"<pad>", b"<unk>")})
    tokenizer = keep(config, open_checkpoint(tiny), resumes=True)
    assert found(kept) == given and tokenizer.pad_token == "<pad>"
    tokenizer = keep(config, open_checkpoint(tiny), resumes=False)
    assert found(kept) == found(tiny) != given and tokenizer.pad_token == "<unk>"


def test_a_tokenizer_that_is_given_replaces_the_model_s(tiny, tmp_path):
    """Only what the model says of generation stays; the template of the data is added where there is none."""
    files = {name: (TINY / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    other = put(tmp_path / "other", files | {"generation_config.json": b"{}"})
    config = small("tiny_lora", tmp_path / "run", init=str(tiny))
    config = replace(config, data=replace(config.data, tokenizer=str(other)))
    config.output.mkdir()
    keep(config, open_checkpoint(tiny), resumes=False)
    expected = files | {"generation_config.json": FILES["generation_config.json"]}
    assert found(config.output / "tokenizer") == expected | {"chat_template.jinja": gemma_chat_template().encode()}
    config = replace(config, data=replace(config.data, kind="text"))
    keep(config, open_checkpoint(tiny), resumes=False)
    assert found(config.output / "tokenizer") == expected
