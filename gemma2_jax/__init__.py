"""Gemma 2 in JAX and Flax NNX: train, convert, run. The front door for scripts and notebooks:

    import gemma2_jax as g2

    model = g2.load("google/gemma-2-9b", mesh=g2.mesh(tensor=8))
    texts = g2.generate(model, ["What is AI?"], max_new_tokens=100)
    g2.save(model, "out", format="hf")
    result = g2.train(g2.recipe("9b_lora", steps=1000, data=dict(train="my.jsonl")))

`help(g2.load)` and so on have an example each. Importing the package imports no JAX and changes nothing in the process;
each name below is imported when it is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma2_jax.api import (
        Result as Result,
        convert as convert,
        generate as generate,
        load as load,
        mesh as mesh,
        plan as plan,
        recipe as recipe,
        save as save,
        train as train,
    )
    from gemma2_jax.config import (
        ComputeConfig as ComputeConfig,
        Config as Config,
        DataConfig as DataConfig,
        GuardConfig as GuardConfig,
        HostsConfig as HostsConfig,
        MeshConfig as MeshConfig,
        OptimConfig as OptimConfig,
        ProfileConfig as ProfileConfig,
        SampleConfig as SampleConfig,
        TrainConfig as TrainConfig,
    )
    from gemma2_jax.model.gemma2 import Gemma2 as Gemma2
    from gemma2_jax.model_config import AdapterConfig as AdapterConfig, ModelConfig as ModelConfig
    from gemma2_jax.planning.report import Plan as Plan
    from gemma2_jax.training.step import Program as Program

__all__ = [
    "AdapterConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "Gemma2",
    "GuardConfig",
    "HostsConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Plan",
    "ProfileConfig",
    "Program",
    "Result",
    "SampleConfig",
    "TrainConfig",
    "convert",
    "generate",
    "load",
    "mesh",
    "plan",
    "recipe",
    "save",
    "train",
]
# Functions with the name of a module: `g2.train(config)` beside gemma2_jax/train.py, the command.
_CALLABLE_MODULES = ("convert", "generate", "mesh", "plan", "train")
_PLACES = {"Gemma2": "model.gemma2", "Plan": "planning.report", "Program": "training.step"}


class _CallableModule(ModuleType):
    """A module that is called, shown and documented as the function of the same name in `api`."""

    __doc__: Any = property(lambda self: self._function.__doc__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module("gemma2_jax.api"), self.__name__.rpartition(".")[2])

    def __repr__(self) -> str:
        return f"<function {self.__name__}, which is also the module {self.__file__}>"

    @property
    def __signature__(self) -> Any:
        return importlib.import_module("inspect").signature(self._function)


class _Package(ModuleType):
    """This package. Importing a submodule sets it as an attribute here, whoever imports it, and makes it callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE_MODULES and type(value) is ModuleType:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_MODULES:
        return importlib.import_module(f"gemma2_jax.{name}")
    if name in __all__:
        module = _PLACES.get(name, "config" if name.endswith("Config") else "api")
        return getattr(importlib.import_module(f"gemma2_jax.{module}"), name)
    raise AttributeError(f"module 'gemma2_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
