"""The routes: what is asked goes to the engine's service, and what comes of it to the client."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gemma2_jax.inference.http.answers import Answer, ChatForm, CompletionForm
from gemma2_jax.inference.http.errors import ApiError, explain_invalid, explain_value
from gemma2_jax.inference.http.guard import Guard
from gemma2_jax.inference.http.loader import AdapterLoader
from gemma2_jax.inference.http.models import ServedModel
from gemma2_jax.inference.http.planning import plan_chat, plan_completion
from gemma2_jax.inference.http.replies import Reply
from gemma2_jax.inference.http.schema import ChatBody, CompletionBody, LoadBody, Settings, UnloadBody
from gemma2_jax.inference.metrics import Outcome
from gemma2_jax.inference.service import Service

BODY_LIMIT = 4 << 20  # bytes: a context of 8,192 tokens is some 40 KB of text
BODY_SECONDS = 30  # that a body may take to come
_BODIES: dict[str, type[BaseModel]] = {
    "/chat/completions": ChatBody,
    "/completions": CompletionBody,
    "/unload_lora_adapter": UnloadBody,
    "/load_lora_adapter": LoadBody,
}


def make_app(
    service: Service,
    models: Mapping[str, ServedModel],
    *,
    loader: AdapterLoader | None = None,
    key: str | None = None,
    body_limit: int = BODY_LIMIT,
    body_seconds: float = BODY_SECONDS,
) -> FastAPI:
    """The application that answers for these models, by name. With `key`, what is below /v1 asks for it.

    With a loader, which changes the models, adapters can be loaded and unloaded.
    """
    app = FastAPI(title="gemma2_jax", docs_url=None, redoc_url=None)
    routes = _Routes(service, models)
    app.add_middleware(
        Guard, key=key, body_limit=body_limit, body_seconds=body_seconds, refuse=lambda: routes.count("refused")
    )
    app.get("/health")(routes.report_health)
    app.get("/metrics")(routes.report_metrics)
    app.get("/v1/models")(routes.list_models)
    app.get("/v1/models/{name:path}")(routes.show_model)
    app.post("/v1/completions")(routes.complete)
    app.post("/v1/chat/completions")(routes.chat)
    if loader:
        _add_loader(app, loader)
    app.exception_handler(ApiError)(routes.explain_error)
    app.exception_handler(RequestValidationError)(routes.explain_body)
    app.exception_handler(HTTPException)(routes.explain_route)
    app.exception_handler(Exception)(routes.explain_failure)
    return app


def _add_loader(app: FastAPI, loader: AdapterLoader) -> None:
    """vLLM's routes, with its answers."""

    async def load(body: LoadBody) -> Response:
        await loader.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(body: UnloadBody) -> Response:
        loader.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    app.post("/v1/load_lora_adapter")(load)
    app.post("/v1/unload_lora_adapter")(unload)


class _Routes:
    def __init__(self, service: Service, models: Mapping[str, ServedModel]):
        self._service, self._models = service, models

    def count(self, outcome: Outcome) -> None:
        self._service.metrics.requests.labels(outcome).inc()

    async def report_health(self) -> Response:
        is_open = self._service.is_open
        return JSONResponse({"status": "ok" if is_open else "closing"}, 200 if is_open else 503)

    async def report_metrics(self) -> Response:
        return Response(self._service.metrics.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._describe(model) for model in self._models.values()]}

    async def show_model(self, name: str) -> dict[str, Any]:
        return self._describe(self._find_model(name))

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        return await self._answer(body, request, plan_completion)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        return await self._answer(body, request, plan_chat)

    def _describe(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "gemma2_jax",
            "max_model_len": self._service.engine.context,
        }

    def _find_model(self, name: str) -> ServedModel:
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(404, f"there is no model {name}; there are {known}", param="model", code="model_not_found")
        return self._models[name]

    async def _answer(self, body: Any, request: Request, plan: Callable[..., list]) -> Response:
        """Plans the texts, in a thread as a long prompt takes a while, and answers with them whole or as a stream."""
        model = self._find_model(body.model)
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        try:
            choices = await asyncio.to_thread(plan, body, model, self._service.engine.context)
            if self._find_model(body.model) is not model:
                raise ApiError(404, f"{body.model} was unloaded meanwhile", param="model", code="model_not_found")
            for choice in choices:
                self._service.engine.check(choice.request)
        except ValueError as error:
            raise explain_value(error, type(body).model_fields) from error
        if len(choices) > self._service.most_texts:
            raise ApiError(
                400, f"{len(choices)} texts are asked for; ask for {self._service.most_texts} at most", param="n"
            )
        answer = Answer(model=model, form=_choose_form(body, model), choices=choices, samples=body.n or 1)
        has_usage = bool(body.stream_options and body.stream_options.include_usage)
        reply = Reply(self._service, answer)
        return reply.open_stream(has_usage=has_usage) if body.stream else await reply.write_whole(request)

    async def explain_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        self.count(error.outcome)
        return JSONResponse(error.content, error.status, error.headers)

    async def explain_body(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        body = next(body for ending, body in _BODIES.items() if request.url.path.endswith(ending))
        return await self.explain_error(request, explain_invalid(error.errors(), body.model_fields))

    async def explain_route(self, request: Request, error: Exception) -> Response:
        """An address or a method that there is not; or a body that no JSON parser survives."""
        assert isinstance(error, HTTPException)
        message, path = error.detail, request.url.path
        if error.status_code == 404:
            known = sorted({route.path for route in request.app.routes if isinstance(route, APIRoute)})
            message = f"there is no address {path}; there are {', '.join(known)}"
        elif error.status_code == 405:
            message = f"{path} does not take {request.method}; it takes {(error.headers or {}).get('Allow')}"
        return await self.explain_error(request, ApiError(error.status_code, message, headers=error.headers))

    async def explain_failure(self, request: Request, _: Exception) -> Response:
        """A mistake of ours, whose traceback is in the server's log."""
        message = "the server has made a mistake; its log says which"
        return await self.explain_error(request, ApiError(500, message, outcome="failed"))


def _choose_form(body: Settings, model: ServedModel) -> ChatForm | CompletionForm:
    if isinstance(body, CompletionBody):
        return CompletionForm(model=model, echo=bool(body.echo), has_scores=body.logprobs is not None)
    return ChatForm(words=model.words)
