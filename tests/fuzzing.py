"""Damages bytes at random, and checks that a reader refuses them in a sentence, soon and with little memory."""

import random
import re
import resource
import struct
import sys
import time

# The ends of this program's sentences; errors of NumPy and Python end otherwise.
OURS = r"again$|original$|was run|not run|right file$|own folder$|extensions$"


def mutate(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one thing changed."""
    edit, position = bytearray(data), chance.randrange(len(data))
    if chance.random() < 0.3:  # headers and directories are at the ends
        position = chance.choice(
            [chance.randrange(min(200, len(data))), -1 - chance.randrange(min(600, len(data))) + len(data)]
        )
    match chance.randrange(6):
        case 0:
            del edit[position:]
        case 1:
            edit[position] ^= 1 << chance.randrange(8)
        case 2:
            edit[position] = chance.choice([0, 1, 0x2E, 0x52, 0x62, 0x28, 0x85, 0x94, 0xFF, chance.randrange(256)])
        case 3:
            value = chance.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, chance.getrandbits(32)])
            edit[position : position + 4] = struct.pack("<I", value)
        case 4:
            value = chance.choice([0, (1 << 64) - 1, (1 << 63) - 1, 1 << 63, chance.getrandbits(64)])
            edit[position : position + 8] = struct.pack("<Q", value)
        case 5:
            other, size = chance.randrange(len(data)), chance.randrange(1, 40)
            edit[position : position + chance.choice([0, size])] = data[other : other + size]
    return bytes(edit)


def fuzz(attempt, data: bytes, count: int) -> int:
    """How many of `count` mutations `attempt` accepts.

    Asserts that it refuses the others with a sentence of this program, soon, and takes little memory.
    """
    accepted, chance, modules = 0, random.Random(count), set(sys.modules)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        start = time.process_time()
        try:
            attempt(mutate(data, chance))
            accepted += 1
        except ValueError as error:
            if not re.search(OURS, str(error)):
                raise
        assert time.process_time() - start < 5, number
    assert set(sys.modules) == modules
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10
    return accepted
