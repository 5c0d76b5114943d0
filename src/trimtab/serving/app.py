"""The HTTP side of a server: routes, and errors in OpenAI's shape."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from trimtab.serving.adapters import Loaded
from trimtab.serving.gate import PAGE_FILES, Gate
from trimtab.serving.protocol import ChatRequest, CompletionRequest, ErrorAnswer
from trimtab.serving.refusals import invalid, json_response, refusal
from trimtab.serving.service import Service
from trimtab.serving.watch import CONTENT_TYPE

PAGE = Path(__file__).parent / "page"
"""The playground."""

# Nothing from elsewhere, no script in the page itself, and no frame around it.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


# What the document of the interface says beyond the requests; the gate does it.
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is refused"},
    "5XX": {"model": ErrorAnswer, "description": "The server could not answer"},
}
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
# Of a route whose answer is plain text FastAPI would say that its errors are, too.
_JSON_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": told["description"], "content": {"application/json": {}}}
    for code, told in _ERRORS.items()
}


class LoadRequest(BaseModel):
    """POST /admin/adapters."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    path: str


def make_app(service: Service) -> ASGIApp:
    """The application, behind its gate.

    Args:
        service: What answers.
    """
    app = FastAPI(
        title="trimtab",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(RequestValidationError, _told_invalid)
    # Starlette raises what this one has answered again: the gate puts it into the log.
    app.add_exception_handler(Exception, _told)
    _add_models(app, service)
    _add_health(app, service)
    _add_admin(app, service)
    _add_page(app)
    return Gate(
        app,
        doorkeeper=service.doorkeeper,
        watch=service.watch,
        body_bytes=service.config.body_bytes,
        routes=[path for path in _paths(app) if "{" not in path],
    )


def _paths(app: FastAPI) -> list[str]:
    return [path for route in app.routes if (path := getattr(route, "path", None))]


def _keyed(service: Service) -> Sequence[Any]:
    """Lets the document say that a route needs a key; it is the gate that asks for it."""
    return [Depends(HTTPBearer(auto_error=False))] if service.doorkeeper.asks_for_keys else []


async def _told(request: Request, error: Exception) -> Response:
    told = refusal(error)
    request.state.record.fields["code"] = told.code
    return told.response()


async def _told_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _told(request, invalid(error.errors()))


def _add_models(app: FastAPI, service: Service) -> None:
    began, keyed = int(time.time()), _keyed(service)

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "trimtab"}

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> Response:
        host_name, data = service.adapters.host_name, [described(service.adapters.host_name)]
        for one in service.adapters.loaded:
            # What the playground offers to choose from.
            ours = {"adapter": one.name, "carriers": list(one.carriers)}
            data.append({**described(f"{host_name}+{one.name}"), "trimtab": ours})
        return json_response({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}", dependencies=keyed)
    async def model(name: str) -> Response:
        service.adapters.chosen(name, None, None)
        return json_response(described(name))

    @app.post("/v1/completions", dependencies=keyed, responses=_STREAMED)
    async def completions(http: Request, body: CompletionRequest) -> Response:
        return await service.answer(http, body)

    @app.post("/v1/chat/completions", dependencies=keyed, responses=_STREAMED)
    async def chat_completions(http: Request, body: ChatRequest) -> Response:
        return await service.answer(http, body)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        is_well = service.engine.is_alive
        return json_response({"status": "ok" if is_well else "dead"}, 200 if is_well else 503)

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = service.engine.is_alive and not service.is_closing
        return json_response({"ready": is_ready}, 200 if is_ready else 503)

    @app.get(
        "/metrics",
        dependencies=_keyed(service),
        responses=_JSON_ERRORS,
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        return Response(service.watch.metrics(), headers={"content-type": CONTENT_TYPE})


def _add_admin(app: FastAPI, service: Service) -> None:
    adapters, keyed = service.adapters, _keyed(service)

    @app.get("/admin/adapters", dependencies=keyed)
    async def loaded() -> Response:
        return json_response({"data": [_shown(one) for one in adapters.loaded]})

    @app.post("/admin/adapters", dependencies=keyed)
    async def load(body: LoadRequest) -> Response:
        # Not in the engine's thread: answers in the making go on meanwhile.
        loop = asyncio.get_running_loop()
        path = Path(body.path)
        found = await loop.run_in_executor(service.loading, adapters.load, body.name, path)
        service.watch.say("adapter loaded", name=found.name)
        return json_response(_shown(found))

    @app.delete("/admin/adapters/{name}", dependencies=keyed)
    async def unload(name: str) -> Response:
        adapters.unload(name)
        service.watch.say("adapter unloaded", name=name)
        return json_response({"name": name, "deleted": True})


def _shown(loaded: Loaded) -> dict[str, Any]:
    manifest = loaded.mounted.manifest
    return {
        "name": loaded.name,
        "adapter": manifest.name,
        "carriers": list(loaded.carriers),
        "contains_text": "memory" in loaded.carriers,
        "warnings": list(loaded.mounted.warnings),
    }


async def _page_file(name: str) -> Response:
    return FileResponse(PAGE / name, headers=_PAGE_HEADERS)


def _add_page(app: FastAPI) -> None:
    app.get("/", include_in_schema=False)(partial(_page_file, "index.html"))
    for name in sorted(PAGE_FILES):
        app.get(f"/page/{name}", include_in_schema=False)(partial(_page_file, name))
