"""Importing the converter leaves the process as it was: what a command needs, the command sets."""

import subprocess
import sys

PROBE = """
import logging, os, pkgutil, signal, sys, warnings


def process_state():
    loggers = {name: log for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)}
    loggers[""] = logging.root
    return {
        "environment": dict(os.environ),
        "loggers": {
            name: (log.level, [*map(repr, log.handlers)], [*map(repr, log.filters)], log.propagate, log.disabled)
            for name, log in loggers.items()
            if name == "" or log.level or log.handlers or log.filters or not log.propagate or log.disabled
        },
        "logging": (logging.root.manager.disable, logging.getLoggerClass(), logging.raiseExceptions),
        "warnings": [*map(repr, warnings.filters)],
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "interpreter": (sys.excepthook, sys.getrecursionlimit(), os.getcwd(), [*sys.path], [*sys.argv]),
    }


before = process_state()
import gemma2_jax.convert, gemma2_jax.convert.__main__
assert process_state() == before
assert "jax" not in sys.modules
# These libraries change the environment and the warnings' filters when they are imported.
import jax, numpy, tensorstore
import gemma2_jax.convert.opening, gemma2_jax.convert.writing
assert "flax" not in sys.modules, "slow, and nothing is merged"
import flax.nnx
before = process_state()
paths = sys.modules["gemma2_jax.convert"].__path__
names = [name for _, name, _ in pkgutil.walk_packages(paths, "gemma2_jax.convert.")]
for name in names:
    __import__(name)
after = process_state()
assert {key for key in after if after[key] != before[key]} == set(), (before, after)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
print(len(names))
"""


def test_importing_changes_nothing_in_the_process():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
