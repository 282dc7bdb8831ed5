"""Links in folders and globs: around in circles, to nowhere, and to a file that has another name too."""

import errno
import os

import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data import batches
from gemma2_jax.data.reading import files, places


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder that is the current one, with a link to itself in each of its folders."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "a/train", "a/b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text("{}")
        (tmp_path / folder / "up").symlink_to(tmp_path)
    return tmp_path


def choose(source, **choices):
    """The paths that are trained on, and what is said of others."""
    choice, _ = places.choose_training(DataConfig(train=source, **choices))
    return [place.path for place in choice.places], choice.notes


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/*.jsonl", ["a/b/x.jsonl", "a/train/x.jsonl", "a/x.jsonl"]),
        ("**", ["a/b/x.jsonl", "a/train/x.jsonl", "a/x.jsonl"]),
        ("a/**/b/**", ["a/b/up/a/train/x.jsonl", "a/b/up/a/x.jsonl", "a/b/x.jsonl"]),
        ("a/*/x.jsonl", ["a/b/x.jsonl", "a/train/x.jsonl"]),
        ("*/x.*", ["a/x.jsonl"]),
        ("a/[bc]", ["a/b/up/a/train/x.jsonl", "a/b/up/a/x.jsonl", "a/b/x.jsonl"]),
        ("a/**/up/a/x.jsonl", ["a/up/a/x.jsonl"]),
        ("b*", []),
    ],
)
def test_globs_do_not_go_around_in_circles(tree, pattern, found):
    assert [file.path for file in files.list_files(pattern).files] == found
    absolute = files.list_files(f"{tree}/{pattern}").files
    assert [file.path for file in absolute] == [f"{tree}/{path}" for path in found]
    assert files.has_match(pattern) == bool(found)


def test_each_document_is_read_once(tree):
    (tree / "a" / "other.jsonl").symlink_to("x.jsonl")
    note = "{}: a/other.jsonl is a/x.jsonl by another name, and is read once"
    assert choose("a/*.jsonl") == (["a/x.jsonl"], (note.format("a/*.jsonl"),))
    paths, notes = choose("a")
    assert sorted(paths) == ["a/b/x.jsonl", "a/train/x.jsonl", "a/x.jsonl"] and notes == (note.format("a"),)
    (tree / "a" / "third.jsonl").symlink_to("x.jsonl")
    assert choose("a")[1] == ("a: a/other.jsonl is a/x.jsonl by another name (2 such names), and is read once",)
    assert choose("a/other.jsonl") == (["a/other.jsonl"], ())


def test_a_link_to_another_split_is_of_its_own(tree):
    (tree / "s").mkdir()
    (tree / "s" / "train.jsonl").write_text("{}")
    (tree / "s" / "test.jsonl").symlink_to("train.jsonl")
    assert choose("s", split="test")[0] == ["s/test.jsonl"] and choose("s")[0] == ["s/train.jsonl"]


@pytest.mark.parametrize("target", ["nowhere", "dead.jsonl"])
def test_links_to_nowhere_are_said(tree, target):
    (tree / "a" / "dead.jsonl").symlink_to(target)
    for source, found in (("a", 3), ("a/**/*.jsonl", 3), ("a/*.jsonl", 1)):
        paths, notes = choose(source)
        assert len(paths) == found
        assert notes == (f"{source}: 1 link to nowhere passed over, such as a/dead.jsonl",)
    for source in ("a/dead.jsonl", "a/d*.jsonl"):
        with pytest.raises(ValueError, match=f"a/dead.jsonl is a link to {target}, which leads nowhere; mend it"):
            choose(source)
    (tree / "a" / "owner").symlink_to("owner")  # as the name of a data set of the Hub
    with pytest.raises(ValueError, match="a/owner is a link to owner, which leads nowhere"):
        choose("a/owner")


def test_a_file_of_several_sources_is_said(tree):
    (tree / "link.jsonl").symlink_to("a/x.jsonl")
    (tree / "other.jsonl").write_text("{}")
    file = tree / "a" / "x.jsonl"
    for source in ("0.5*a/x.jsonl,0.5*link.jsonl", "a/x.jsonl,./a/x.jsonl", "link.jsonl,a"):
        said = batches.describe_repeated(DataConfig(train=source))
        assert said.startswith("several sources (")
        assert said.endswith(f") have {file}; it is trained on in each of them")
    assert batches.describe_repeated(DataConfig(train="a/x.jsonl,other.jsonl")) == ""
    assert batches.find_shared(DataConfig(train="a/x.jsonl", eval="link.jsonl")) == [str(file)]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tree, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*/b"):
        choose("a")
