"""The data of the tasks beside it, which lm_eval's `!function` reads; run as a program, it writes them anew.

    python examples/evaluation/python_docs.py

They are questions on Python's standard library, each with four answers of which one is right, and whole documents. Both
are of the documentation inside Python 3.12, which other releases change; the files say the same wherever they are read.
"""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = Path(__file__).parent
QUESTIONS, DOCUMENTS = 64, 8


def questions(**metadata) -> "dict[str, Dataset]":
    """The questions as a data set of the harness, which passes the task's metadata."""
    return {"test": read("questions.jsonl")}


def documents(**metadata) -> "dict[str, Dataset]":
    """The documents as a data set of the harness."""
    return {"test": read("documents.jsonl")}


def read(name: str) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list([json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()])


def write(name: str, records: list[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (FOLDER / name).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    from gemma2_jax.data.python_docs import python_documents, python_instructions

    draw = random.Random(0)
    talks = [record["messages"] for name, record in python_instructions().items() if not name.startswith("topic")]
    pairs = [(question["content"], answer["content"].split("\n\n")[0]) for question, answer in talks]
    pairs = [(question, " ".join(answer.split())) for question, answer in pairs if len(answer) <= 160]
    chosen = draw.sample(pairs, 4 * QUESTIONS)
    records = []
    for question, answer in chosen[:QUESTIONS]:
        choices = [answer, *(other for _, other in draw.sample(chosen[QUESTIONS:], 3))]
        draw.shuffle(choices)
        records.append({"question": question, "choices": choices, "label": choices.index(answer)})
    write("questions.jsonl", records)
    texts = [text for _, text in sorted(python_documents().items()) if 500 < len(text) < 4000]
    write("documents.jsonl", [{"text": text} for text in draw.sample(texts, DOCUMENTS)])


if __name__ == "__main__":
    main()
