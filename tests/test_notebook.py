"""The notebook runs from its first cell to its last, and is committed with what it showed."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/finetune_tiny.ipynb"


def shown(cell: nbformat.NotebookNode) -> str:
    """The text that a cell printed, and `<picture>` for each of its pictures."""
    parts = []
    for output in cell.get("outputs", []):
        parts.append(output.get("text", ""))
        parts += ["<picture>"] * ("image/png" in output.get("data", {}))
    return "".join(parts)


def check_story(notebook: nbformat.NotebookNode) -> None:
    """Two pictures, adapters that changed every projection, answers that changed, and both exports."""
    texts = [shown(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert [text.count("<picture>") for text in texts].count(1) == 2
    before, after = (text for text in texts if "json.dumps" in text and "getcwd" in text)
    assert before != after
    assert "merged chat_template.jinja config.json model.safetensors" in texts[-1]
    assert "peft adapter_config.json adapter_model.safetensors" in texts[-1]


# What is trained on is short; one of the modules beside this one.
PREPARATION = "import pytest, small_runs; small_runs.shorten_python_docs(pytest.MonkeyPatch())"


@pytest.mark.usefixtures("compiled_once")
def test_notebook_runs(monkeypatch):
    """As it is committed, with a fifth of its steps, on a twentieth of its documents."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.source = cell.source.replace("steps=30", "steps=6")
    check = "assert change.min() > 0 and result.eval_losses[6] < result.eval_losses[0] - 0.2"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PREPARATION))
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    notebook.cells = notebook.cells[1:-1]
    check_story(notebook)


def test_committed_outputs_are_whole_and_small():
    check_story(nbformat.read(NOTEBOOK, as_version=4))
    assert NOTEBOOK.stat().st_size < 150_000
