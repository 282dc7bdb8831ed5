"""Damaged bytes, and what a reader may do with them."""

import random
import re
import resource
import struct
import sys
import time

# The ends of our sentences, which a ValueError of numpy's or Python's has not.
OURS = r"again$|original$|was run|not run|right file$|own folder$|extensions$"


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one thing changed."""
    edit, at = bytearray(data), chance.randrange(len(data))
    if chance.random() < 0.3:  # headers and directories are at the ends
        at = chance.choice(
            [chance.randrange(min(200, len(data))), -1 - chance.randrange(min(600, len(data))) + len(data)]
        )
    match chance.randrange(6):
        case 0:
            del edit[at:]
        case 1:
            edit[at] ^= 1 << chance.randrange(8)
        case 2:
            edit[at] = chance.choice([0, 1, 0x2E, 0x52, 0x62, 0x28, 0x85, 0x94, 0xFF, chance.randrange(256)])
        case 3:
            value = chance.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, chance.getrandbits(32)])
            edit[at : at + 4] = struct.pack("<I", value)
        case 4:
            value = chance.choice([0, (1 << 64) - 1, (1 << 63) - 1, 1 << 63, chance.getrandbits(64)])
            edit[at : at + 8] = struct.pack("<Q", value)
        case 5:
            other, size = chance.randrange(len(data)), chance.randrange(1, 40)
            edit[at : at + chance.choice([0, size])] = data[other : other + size]
    return bytes(edit)


def fuzz(attempt, data: bytes, count: int) -> int:
    """How many of `count` mutations `attempt` read; it raises ValueError of ours, soon, and takes little memory."""
    passed, chance, modules = 0, random.Random(count), set(sys.modules)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        start = time.process_time()
        try:
            attempt(mutated(data, chance))
            passed += 1
        except ValueError as error:
            if not re.search(OURS, str(error)):
                raise
        assert time.process_time() - start < 5, number
    assert set(sys.modules) == modules
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10
    return passed
