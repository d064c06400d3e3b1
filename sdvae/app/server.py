"""The playground as a server for this machine alone: one page, three questions, one answer at a time."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from sdvae.app.work import DTYPES, METRICS, SIZES, Choice, Playground
from sdvae.errors import ConfigError, ImageError, SdvaeError
from sdvae.evaluate.probes import TRIPS
from sdvae.report.render import asset, content_policy, environment

HOST = "127.0.0.1"
MAX_UPLOAD_BYTES = 2**26  # of one photo
_MOST_WAITING = 8
_NAME_CHARACTERS = 200
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class _Server:
    """Handlers of the routes, and the one thread that computes."""

    def __init__(self, playground: Playground) -> None:
        self._playground = playground
        self._templates = environment("sdvae.app")
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._num_waiting = 0

    def page(self) -> str:
        styles, scripts = (
            [asset("page.css"), asset("app.css", "sdvae.app")],
            [asset("page.js"), asset("app.js", "sdvae.app")],
        )
        return self._templates.get_template("app.html").render(
            page={"title": "Playground", "footer": "Photos stay on this machine: the page talks to it alone."},
            vaes=self._playground.names, dtypes=DTYPES, sizes=SIZES, trips=TRIPS,
            styles=styles, scripts=scripts, policy=content_policy(styles, scripts, "'self'"),
        )  # fmt: skip

    async def home(self, request: Request) -> Response:
        return HTMLResponse(self.page())

    async def photo(self, request: Request) -> Response:
        name = request.query_params.get("name", "photo")[:_NAME_CHARACTERS]
        data = await _body(request, MAX_UPLOAD_BYTES)
        judged = await self._compute(partial(self._playground.judge, data, name, self._choice(request)))
        return self._fragment("photo.html", judged=judged, metrics=METRICS)

    async def between(self, request: Request) -> Response:
        data = await _body(request, 2 * MAX_UPLOAD_BYTES)
        split = request.query_params.get("first", "")
        if not split.isdecimal() or not 0 < int(split) < len(data):
            raise ConfigError("the request does not say where the second photo begins")
        first, second = data[: int(split)], data[int(split) :]
        made = await self._compute(partial(self._playground.between, first, second, self._choice(request)))
        return self._fragment("frames.html", made=made, is_reel=True, title="Between two photos")

    async def sample(self, request: Request) -> Response:
        made = await self._compute(partial(self._playground.sample, self._choice(request)))
        return self._fragment("frames.html", made=made, is_reel=False, title="Samples of the prior")

    def _choice(self, request: Request) -> Choice:
        return Choice.of_query(request.query_params.multi_items(), len(self._playground.names))

    async def _compute(self, work: Callable[[], T]) -> T:
        if self._num_waiting >= _MOST_WAITING:
            raise ConfigError(f"{_MOST_WAITING} requests are waiting already; try again when they are done")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._num_waiting -= 1

    def _fragment(self, template: str, **values: object) -> Response:
        return HTMLResponse(self._templates.get_template(template).render(**values))


def build(playground: Playground) -> Starlette:
    """The application; it answers to this machine's own name alone, and to no page but its own."""
    server = _Server(playground)
    server.page()  # a missing library is told before the server starts
    routes = [Route("/", _guarded(server.home))]
    routes += [
        Route(f"/{name}", _guarded(handler), methods=["POST"])
        for name, handler in (("photo", server.photo), ("between", server.between), ("sample", server.sample))
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts])


def bind(port: int) -> socket.socket:
    """A socket of this machine alone; ConfigError where the port is taken."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot use port {port}: {error.strerror}; give --port another one, or 0") from error
    found.listen()  # a page that is asked for before the server answers waits, and is not refused
    return found


def serve(playground: Playground, listening: socket.socket) -> None:
    """Answer until a signal comes."""
    import uvicorn

    config = uvicorn.Config(build(playground), log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def _guarded(handler: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        response = await _answer(handler, request)
        response.headers.update(_HEADERS)
        return response

    return guarded


async def _answer(handler: Handler, request: Request) -> Response:
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers["host"]:
        return PlainTextResponse("this page is another site's", 403)
    try:
        return await handler(request)
    except SdvaeError as error:
        return PlainTextResponse(str(error), 400)


async def _body(request: Request, most_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most_bytes:
            raise ImageError(f"the upload is larger than {most_bytes // 2**20} MiB; send a smaller photo")
    return bytes(data)
