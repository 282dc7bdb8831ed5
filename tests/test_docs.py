"""The README and docs: commands are run or parsed by their own parsers, snippets are run, and named files are there.

A comment on the line before a fenced block of shell commands says what is done with it here; it does not show on the
page. One of these is required:

    <!-- run -->           the commands are run, in the folder that the earlier ones of the page left behind;
                           those that train take two short steps
    <!-- parsed: why -->   the commands' own parsers take the arguments, and nothing is run, for this reason
    <!-- not run: why -->  nothing is done: somebody else's program, or one that needs a GPU

Blocks of Python are run, all of a page in one namespace, unless they are marked `not run: why`. A block of text marked
`<!-- printed -->` must be what the commands of the page printed before it; numbers and absolute paths may differ.
"""

import contextlib
import importlib
import io
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
import tyro
import yaml
from small_runs import shorten_python_docs

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "assets/tiny-gemma2/README.md", *DOCS]
LANGUAGES = {"sh", "python", "text", "json", "yaml", "toml"}
MARKS = ("run", "parsed", "not run", "printed")
SHORT = (
    "--steps 2 --optim.warmup_steps 1 --train.eval_batches 2 --train.sequence_length 64 --train.global_batch_size 4 "
    "--train.micro_batch_size 4"
)
OPERATORS = {"&&", "||", "|", ";", "&", ">", "<", ">>"}
FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n\n?)?(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# Folders of the repository that a path written in backticks may begin with.
FOLDERS = ("gemma2_jax", "configs", "convert", "tests", "docs", "examples", "benchmarks", "assets", ".ci", ".github")


@dataclass(frozen=True, kw_only=True)
class Fence:
    """One fenced block of a page."""

    where: str  # page:line
    language: str
    mark: str  # of MARKS; empty: none
    rest: str  # what follows the mark after a colon
    text: str


def read_fences(page: Path) -> list[Fence]:
    """The fenced blocks of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        mark, _, rest = (match["note"] or "").partition(":")
        line = text.count("\n", 0, match.start("language")) + 1
        known = mark if mark in MARKS else ""
        body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(
            Fence(where=f"{name_of(page)}:{line}", language=match["language"], mark=known, rest=rest.strip(), text=body)
        )
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def split_commands(text: str) -> list[list[str]]:
    """The simple commands of a block of shell, as words; what is redirected is left out."""
    lexer = shlex.shlex(text.replace("\\\n", " ").replace("\n", " ; "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word in OPERATORS:
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def own_command(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) of a command of this repository, whatever launcher stands before it; None for others."""
    for place, word in enumerate(words):
        if word == "gemma2-jax":
            return "gemma2_jax.__main__", words[place + 1 :]
        if word == "-m" and re.match(r"(gemma2_jax|benchmarks)\b", words[place + 1]):
            module = words[place + 1]
            folder = ROOT / module.replace("gemma2_jax.convert", "convert").replace(".", "/")
            return f"{module}.__main__" if folder.is_dir() else module, words[place + 2 :]
    return None


class Parsed(BaseException):
    """Raised in place of the work of a command whose arguments were understood."""


def parse_only(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a command parse its arguments, and do nothing else."""
    parse = tyro.cli

    def parse_and_stop(*positional, **named):
        parse(*positional, **named)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(tyro, "cli", parse_and_stop)
        with pytest.raises(Parsed):
            call_main(module, arguments, patch)


def call_main(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    importlib.import_module(module).main()


def run_shell(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a block's commands in this process."""
    for words in split_commands(fence.text):
        found = own_command(words)
        if found is None:
            if words[0] in ("python3.12", ".venv/bin/pip"):
                continue  # the environment is that of the tests
            pytest.fail(f"{fence.where}: {words[0]} is not run here; mark the block as not run")
        module, arguments = found
        trains = module == "gemma2_jax.train" or arguments[:1] == ["train"]
        added = SHORT.split() if trains else []
        try:
            call_main(module, arguments + added, monkeypatch)
        except SystemExit as ended:
            if ended.code:
                pytest.fail(f"{fence.where}: {' '.join(words)} ended with {ended.code}")


def loose(line: str) -> str:
    """A printed line without numbers, absolute paths, spaces, plurals and names of documents, which differ by run."""
    line = re.sub(r"(?<!\S)~?/\S+", "#", line.replace("batches", "batch"))
    line = re.sub(r"\(python-docs: [^)]*\)", "(python-docs: #)", line)
    line = re.sub(r"\d[\d,]*(\.\d+)?(e-?\d+)?", "#", line)
    return re.sub(r"[\s━╸╺]+", "", line)


@pytest.fixture
def working_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that has the repository's files where commands expect them.

    The machine has one device, and Python's documentation is short.
    """
    for name in ("assets", "configs", "examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    shorten_python_docs(monkeypatch)
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    return tmp_path


def is_run(fence: Fence) -> bool:
    return fence.mark == "run" or (fence.language == "python" and fence.mark != "not run")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_is_done_with_it(page):
    for fence in read_fences(page):
        assert fence.language in LANGUAGES, f"{fence.where}: a block is one of {', '.join(sorted(LANGUAGES))}"
        if fence.language == "sh":
            assert fence.mark in MARKS[:3], f"{fence.where}: say how it is tested; see the head of tests/test_docs.py"
        if fence.mark in ("parsed", "not run"):
            assert fence.rest, f"{fence.where}: {fence.mark} needs a colon and a reason"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_understood(page, working_copy, monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for fence in read_fences(page):
        if fence.mark != "parsed":
            continue
        for words in split_commands(fence.text):
            for named in re.findall(r"\.\[([\w,-]+)\]", " ".join(words)):
                assert set(named.split(",")) <= set(extras), f"{fence.where}: pyproject.toml has no extra {named}"
            if found := own_command(words):
                try:
                    parse_only(*found, monkeypatch)
                except SystemExit as ended:
                    pytest.fail(f"{fence.where}: {' '.join(words)} is not understood: {ended.code}")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(is_run(fence) for fence in read_fences(page))], ids=name_of
)
@pytest.mark.usefixtures("compiled_once")
def test_blocks_run(page, working_copy, monkeypatch):
    namespace: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        for fence in read_fences(page):
            if fence.mark == "run":
                run_shell(fence, monkeypatch)
            elif is_run(fence):
                exec(compile("\n" * int(fence.where.split(":")[1]) + fence.text, str(page), "exec"), namespace)
            elif fence.mark == "printed":
                everything = loose(printed.getvalue())
                for line in fence.text.splitlines():
                    assert loose(line) in everything, f"{fence.where}: not printed: {line}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"https?:|#", target):
            file, _, anchor = target.partition("#")
            assert (page.parent / file).exists(), f"{name_of(page)} links to {target}"
            if anchor and file.endswith(".md"):
                assert anchor in anchors(page.parent / file), f"{name_of(page)} links to {target}"
    for word in re.findall(r"`([^`\s]+)`", prose):
        file = re.split(r"::|:\d", word)[0]
        if re.match(rf"({'|'.join(map(re.escape, FOLDERS))})/", file) and not re.search(r"[<>{*A-Z]{2,}|[*{]", file):
            assert (ROOT / file).exists(), f"{name_of(page)} names {word}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as Markdown renderers make them."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_readme_is_short_and_sets_up_the_tests():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    found = [line for line in lines if re.search(r"^python3.12 -m venv .* -m pytest$", line)]
    assert len(found) == 1, ".ci/run takes the first such line, and there must be one"


def test_site_has_every_page():
    """The pages in mkdocs.yml are those in docs/."""
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    listed = re.findall(r"[\w/-]+\.md", str(config["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


def test_documented_names_exist():
    """What the API page has generated from docstrings is there, and has one."""
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"gemma2_jax.api.{verb}" for verb in ("load", "generate", "save", "train", "convert")} <= set(names)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_workflow_runs_what_the_project_runs():
    workflow = yaml.load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(".ci/run" in step for step in steps) and any("mkdocs build --strict" in step for step in steps)


def test_dockerfile_is_of_this_project():
    """It copies what there is, installs an extra that there is, and does not run as root."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert steps[0][0] in ("FROM", "ARG")
    for word, rest in steps:
        if word == "COPY":
            for source in [part for part in rest.split()[:-1] if not part.startswith("--")]:
                assert (ROOT / source).exists(), source
        if word == "FROM":
            assert re.search(r"[:@][\w.-]*\d", rest), "the base image has no version"
    installed = " ".join(rest for word, rest in steps if word in ("RUN", "ARG"))
    assert "cuda13" in installed and "cuda13" in extras
    users = [rest for word, rest in steps if word == "USER"]
    assert users and users[-1] not in ("root", "0")
