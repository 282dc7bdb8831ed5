"""Which split of a data set a file is of, by its name or its folder's: train, validation, test, or one of its own."""

import re

# What data sets call their splits, as whole words of names.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "heldout"),
    "test": ("test", "testing"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
_SHARD = re.compile(r"(.+?)[-._]\d+[-_]of[-_]\d+")  # train_sft-00000-of-00003
HELD_OUT = "validation"


def name_split(split: str) -> str:
    """A split's usual name: validation for val and dev. One that has none keeps its own."""
    return _SPLITS.get(re.sub(r"held[-_. ]out", "heldout", split.lower()), split)


def find_split(below: str, asked: str) -> str:
    """The split of a file, from its path below the folder of its data set; "" where no name tells.

    `asked` is a split that is asked for: a folder or file of exactly that name is of it, whatever its words are.
    """
    *parts, name = below.split("/")
    shard = _SHARD.match(name)
    stem = shard[1] if shard else name.partition(".")[0]
    parts.append(stem)
    if asked and asked in parts:
        return name_split(asked)
    # The Hub writes the shards of a split train_sft as train_sft-00000-of-00003.parquet.
    if shard and re.fullmatch(r"[a-z]+(_\w+)+", stem) and stem.partition("_")[0] in _SPLITS:
        return name_split(stem)
    for part in reversed(parts):
        words = re.split(r"[^a-z]+", re.sub(r"held[-_. ]out", "heldout", part.lower()))
        found = [_SPLITS[word] for word in words if word in _SPLITS]
        if found:
            return "train" if "train" in found else found[0]
    return ""


def has_split(name: str) -> bool:
    """Whether a name has the word of a split in it."""
    return bool(find_split(name, ""))
