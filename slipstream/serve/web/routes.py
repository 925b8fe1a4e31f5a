"""The page's files and their headers. They hold nothing secret, so they need no key; what they ask for does."""

import hashlib
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

# Nothing but these files and this server; no text becomes markup or code (trusted types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked about each time: an update of the server is one of the page
}

_CONTENTS = {
    file.name: file.read_bytes()
    for file in files("slipstream.serve.web").joinpath("files").iterdir()
    if file.name.rpartition(".")[2] in MEDIA_TYPES
}
PATHS = frozenset(["/", *(f"/web/{name}" for name in _CONTENTS)])


def web_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _file("index.html", request)

    @router.api_route("/web/{name}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        if name not in _CONTENTS:
            raise HTTPException(404, f"The page has no file {name!r}; it is at /.")
        return _file(name, request)

    return router


def _file(name: str, request: Request) -> Response:
    content = _CONTENTS[name]
    headers = HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=MEDIA_TYPES[name.rpartition(".")[2]])
