"""Adapters that are loaded and unloaded while requests are under way, as vLLM's API has it.

An adapter is read in a thread of its own, and put into its place between steps of the engine, a layer at a time: no
text waits for longer than that takes, and none is changed. One that is unloaded is refused to new requests at once; its
place is free once no text with it is left. What the engine calls an adapter is new each time, so that no row of the
cache serves another adapter of the same name.
"""

import asyncio
from functools import partial
from itertools import count
from pathlib import Path

from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.formats.companions import load_tokenizer
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.inference.adapters import check_adapter, read_adapter
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.http.errors import ApiError, explain_end
from gemma2_jax.inference.http.models import ServedModel, describe_model
from gemma2_jax.inference.service import Service, UnavailableError


class AdapterLoader:
    """Changes the models of a server. Its methods are called in the thread of the server's loop."""

    def __init__(
        self, service: Service, decoder: Decoder, models: dict[str, ServedModel], *, base: Checkpoint, folder: Path
    ):
        """The decoder, that of `base`, has room for more adapters, which lie below the folder.

        `models` are the server's: the base, and adapters that the decoder has.
        """
        self._service, self._decoder, self._models = service, decoder, models
        self._base, self._folder = base, folder.resolve()
        self._tokenizer = next(model.tokenizer for model in models.values() if model.adapter is None)
        self._given = {*decoder.adapters}  # what the engine calls those of the start
        self._numbers = count(1)  # of those that are loaded
        self._lock = asyncio.Lock()

    async def load(self, name: str, path: str) -> None:
        """Loads an adapter under a name, and returns when it answers. Raises ApiError."""
        async with self._lock:
            if name in self._models:
                raise ApiError(
                    400,
                    f"{name} has already been loaded; unload it first, or give this adapter another name",
                    param="lora_name",
                )
            folder = self._locate(path)
            place = self._find_place()
            try:
                model = await asyncio.to_thread(self._load, name, folder, place)
            except UnavailableError as error:
                raise explain_end(error) from error
            except (ValueError, OSError) as error:
                raise ApiError(400, str(error), param="lora_path") from error
            assert model.adapter is not None
            self._decoder.adapters[model.adapter] = place
            self._models[name] = model

    def unload(self, name: str) -> None:
        """Takes an adapter from the models; texts that are under way go on. Raises ApiError."""
        model = self._models.get(name)
        if model is None or model.adapter is None:
            known = ", ".join(name for name, model in self._models.items() if model.adapter is not None) or "none"
            reason = "it is the model itself" if model else "there is none of this name"
            raise ApiError(
                400 if model else 404,
                f"no adapter {name} can be unloaded: {reason}; there are {known}",
                param="lora_name",
                code=None if model else "model_not_found",
            )
        del self._models[name]

    def _locate(self, path: str) -> Path:
        """The place that a path names, which may be relative to the folder. Raises ApiError unless it is below it."""
        try:
            place = (self._folder / path).resolve()
            is_there = place.exists()
        except (OSError, ValueError) as error:  # such as a name that is too long
            reason = error.strerror if isinstance(error, OSError) else error
            raise ApiError(400, f"lora_path cannot be looked up: {reason}", param="lora_path") from error
        if not place.is_relative_to(self._folder):
            raise ApiError(
                400,
                f"{path} is outside {self._folder}, below which adapters may be loaded; copy it there, or start the "
                "server with another --adapter_folder",
                param="lora_path",
            )
        if not is_there:
            raise ApiError(
                404, f"there is no adapter {path} below {self._folder}", param="lora_path", code="adapter_not_found"
            )
        return place

    def _find_place(self) -> int:
        """A place that is free, or whose adapter was unloaded and has no text left. Raises ApiError."""
        loaded = {model.adapter for model in self._models.values()}
        unloaded = [adapter for adapter in self._decoder.adapters if adapter not in loaded]
        for adapter in unloaded:
            if not self._service.is_in_use(adapter):
                self._decoder.remove_adapter(adapter)
        places = self._decoder.free_places()
        if not places:
            left = ", or wait for the texts of those that were unloaded" if unloaded else ""
            names = ", ".join(name for name, model in self._models.items() if model.adapter is not None)
            raise ApiError(
                409,
                f"the {self._decoder.adapter_places} places for adapters are taken, by {names or 'none'}; unload one "
                f"first{left}, or start the server with more --adapter_places",
                code="no_free_place",
            )
        return places[0]

    def _load(self, name: str, folder: Path, place: int) -> ServedModel:
        """Reads an adapter, and puts it into a place. Raises ValueError, OSError and UnavailableError."""
        checkpoint = open_checkpoint(folder, base=self._base)
        check_adapter(checkpoint, self._decoder.bank_shapes)
        has_own = checkpoint.tokenizer is not None and checkpoint.tokenizer != self._base.tokenizer
        tokenizer = load_tokenizer(checkpoint.tokenizer) if has_own and checkpoint.tokenizer else self._tokenizer
        model = describe_model(name, checkpoint, tokenizer, adapter=self._find_unused(name))
        adapter = read_adapter(checkpoint)
        for layer in range(self._decoder.config.layers):
            parts = self._decoder.cut_layer(adapter, layer)
            self._service.run_between_steps(partial(self._decoder.put_layer, place, layer, parts))
        return model

    def _find_unused(self, name: str) -> str:
        """What the engine calls an adapter of this name, which it has called none before."""
        return next(text for number in self._numbers if (text := f"{name} {number}") not in self._given)
