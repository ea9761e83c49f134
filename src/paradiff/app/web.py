# SPDX-License-Identifier: Apache-2.0
"""The engine behind HTTP, by the standard library's server: a thread for each connection, of which there are few.

    POST   /samples              a request as JSON; 202 and its id
    GET    /samples/ID           how it stands, as JSON; ?wait=SECONDS waits for its end
    GET    /samples/ID?format=F  its sample: png, npy or safetensors
    DELETE /samples/ID           cancels it
    GET    /metrics              counters, for Prometheus
    GET    /healthz              whether requests are accepted

What is refused is answered by {"error": one sentence} and a code from 400 on. A body has to be named application/json, and on a
loopback address the Host has to be this machine, so that no page in a browser can send requests.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import socket
import socketserver
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import numpy as np
from safetensors.torch import save
from torch import Tensor

from paradiff.app import plots
from paradiff.app.shelf import ID, Shelf
from paradiff.errors import refuse_unknown
from paradiff.serving import Engine, Full, Job, SampleRequest

MOST_BODY = 64 * 1024
"""Bytes of a request's body."""

MOST_CONNECTIONS = 128
"""Connections at once."""

LONGEST_WAIT = 60.0
"""Seconds that a client may wait for an end."""

PATIENCE = 30.0
"""Seconds in which a client has to send what it began."""

KINDS = {"png": "image/png", "npy": "application/octet-stream", "safetensors": "application/octet-stream"}
"""Formats of samples, and their media types."""

NAMES = ("localhost", "localhost.localdomain")


class Refused(Exception):
    """A request that is answered by a code and a sentence, which is the text.

    Attributes:
        code: The code.
    """

    def __init__(self, code: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def _bare(host: str) -> str:
    """An address without the brackets that stand around one with colons."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, where nobody else can come in."""
    try:
        return ip_address(_bare(host)).is_loopback
    except ValueError:
        return host in NAMES


class Server(ThreadingHTTPServer):
    """Listens for requests.

    Args:
        host: The address.
        port: The port; 0 for a free one.
        shelf: Where results are kept beside the engine; None for nowhere.

    Attributes:
        engine: What solves them; set before the server is run.
        shelf: As given.
        loopback: Whether the address is this machine's own.

    Raises:
        ValueError: If the address cannot be listened on.
    """

    daemon_threads = True
    engine: Engine
    server_name: str
    server_port: int
    address_family: int = socket.AF_INET

    def __init__(self, host: str, port: int, shelf: Shelf | None = None) -> None:
        self.shelf, self.loopback = shelf, is_loopback(host)
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        if not (bare := _bare(host)) or "[" in bare or "]" in bare:  # an empty one would be every address
            raise ValueError(f"--host {host!r} is no address; give one, such as 127.0.0.1 or [::1]")
        try:
            super().__init__((bare, port), Handler)
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or error
            raise ValueError(f"{host}:{port} cannot be listened on ({said}); give another --host or --port") from error

    def server_bind(self) -> None:
        """Binds the address, without asking who it belongs to."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives a connection a thread; one too many is closed."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no matter of the server's."""


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "paradiff", ""
    close_connection: bool
    timeout = PATIENCE
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """Tells of a request, or of the server."""
        self._answered({"/metrics": self._metrics, "/healthz": self._health}.get(urlsplit(self.path).path, self._told))

    def do_POST(self) -> None:
        """Takes a request."""
        self._answered(self._taken)

    def do_DELETE(self) -> None:
        """Cancels one."""
        self._answered(self._cancelled)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: /metrics counts."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what is no request of HTTP's, or of another method."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code, message = HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not answered; send GET, POST or DELETE"
        self.close_connection = True
        self._send(HTTPStatus(code), _json({"error": message or HTTPStatus(code).phrase}))

    def _answered(self, answer: Any) -> None:
        """Sends what an answer gives, or why it is refused."""
        try:
            self._refuse_foreign()
            answer()
        except Refused as refused:
            self._send(refused.code, _json({"error": str(refused)}))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            self.close_connection = True
            text = f"the server failed ({type(error).__name__}: {error}); please report it"
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, _json({"error": text}))

    def _refuse_foreign(self) -> None:
        host = self.headers.get("Host", "")
        name = re.sub(r":[0-9]+$", "", host)
        if self.server.loopback and host and not is_loopback(name):
            raise Refused(
                HTTPStatus.FORBIDDEN,
                f"the Host is {host[:100]!r}; this server answers to this machine alone: use {self.server.url}",
            )

    # -- the answers -------------------------------------------------------------------------------------------------------

    def _metrics(self) -> None:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        self._send(HTTPStatus.OK, self.server.engine.text().encode(), kind)

    def _health(self) -> None:
        ready = self.server.engine.ready
        code = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        self._send(code, _json({"status": "ok" if ready else "closing"}))

    def _taken(self) -> None:
        """Accepts a request."""
        body = self._body()
        if urlsplit(self.path).path != "/samples":
            raise Refused(HTTPStatus.NOT_FOUND, f"{self.path[:100]!r} takes no requests; send them to /samples")
        engine, shelf, id = self.server.engine, self.server.shelf, secrets.token_hex(8)
        try:
            request = SampleRequest.of_json(_parsed(body))
            engine.stepwise.method(request)
            if shelf is not None:
                shelf.accept(id, request)
            job = engine.submit(request, id)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        except Full as error:
            if shelf is not None:
                shelf.forget(id)
            code = HTTPStatus.TOO_MANY_REQUESTS if engine.ready else HTTPStatus.SERVICE_UNAVAILABLE
            raise Refused(code, str(error)) from error
        place = f"/samples/{job.id}"
        answer = {"id": job.id, "state": job.state, "url": place}
        self._send(HTTPStatus.ACCEPTED, _json(answer), extra={"Location": place})

    def _told(self) -> None:
        """Tells how a request stands, or gives its sample."""
        asked = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        for name in asked:
            _refuse(lambda name=name: refuse_unknown("a parameter", name, ["format", "wait"]))
        id = self._id()
        job = self.server.engine.job(id)
        if job is not None and "wait" in asked:
            self.server.engine.wait(job, _seconds(asked["wait"][-1]))
        report = self._report(id, job)
        if "format" not in asked:
            self._send(HTTPStatus.OK, _json(report))
            return
        kind = asked["format"][-1]
        _refuse(lambda: refuse_unknown("the format", kind, [*KINDS]))
        state, sample = report["state"], None
        if state in ("queued", "running"):
            raise Refused(HTTPStatus.CONFLICT, f"request {id} is {state}; its sample is there once it is done: ask again later")
        if state == "done":
            sample = job.finished.sample if job is not None and job.finished is not None else self._kept(id)
        if sample is None:
            why = "its file is gone, or is none of a sample" if state == "done" else report.get("message", state)
            raise Refused(HTTPStatus.GONE, f"request {id} has no sample: {why}")
        self._send(HTTPStatus.OK, _packed(kind, sample), KINDS[kind])

    def _kept(self, id: str) -> Tensor | None:
        return None if self.server.shelf is None else self.server.shelf.sample(id)

    def _report(self, id: str, job: Job | None) -> dict[str, Any]:
        found = None if job is None else job.to_json()
        if found is None and self.server.shelf is not None:
            found = self.server.shelf.report(id)
        if found is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no request {id}, or it is no longer kept")
        return found

    def _cancelled(self) -> None:
        """Cancels a request."""
        id, engine = self._id(), self.server.engine
        if engine.cancel(id):
            job = engine.job(id)
            if job is not None:
                engine.wait(job, LONGEST_WAIT)
        report = self._report(id, engine.job(id))
        if report["state"] != "cancelled":
            raise Refused(HTTPStatus.CONFLICT, f"request {id} cannot be cancelled: it has ended as {report['state']}")
        self._send(HTTPStatus.OK, _json(report))

    # -- what was sent -----------------------------------------------------------------------------------------------------

    def _id(self) -> str:
        """The id that the path names."""
        path = urlsplit(self.path).path
        place, _, id = path.rpartition("/")
        if place != "/samples":
            raise Refused(
                HTTPStatus.NOT_FOUND, f"there is nothing at {path[:100]!r}; /samples/ID, /metrics and /healthz are here"
            )
        if not ID.fullmatch(id):
            raise Refused(HTTPStatus.NOT_FOUND, f"{id[:100]!r} is no id of a request; the answer to POST /samples names it")
        return id

    def _body(self) -> bytes:
        """What was sent."""
        self.close_connection = True  # unless all of it is read
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,12}", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the body's length is not given; send it with a Content-Length")
        if int(length) > MOST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has {length} bytes; it may have {MOST_BODY}")
        body = self.rfile.read(int(length))
        self.close_connection = self.headers.get("Connection", "").lower() == "close"
        kind = self.headers.get("Content-Type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body's Content-Type is {kind[:100]!r}; send application/json"
            )
        return body

    def _send(
        self, code: HTTPStatus, data: bytes, kind: str = "application/json", extra: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Content-Type-Options": "nosniff", **(extra or {})}
        if code in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            headers["Retry-After"] = "1"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _parsed(body: bytes) -> Any:
    """The JSON of a body."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name!r} is given twice")
            found[name] = value
        return found

    try:
        return json.loads(body, parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the body is no JSON ({str(error)[:100]}); send an object, such as {{'seed': 0}}".replace("'", '"')
        ) from error


def _refuse(check: Any) -> None:
    """Makes a refusal of what is wrong with a request's address."""
    try:
        check()
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error


def _seconds(text: str) -> float:
    """Seconds to wait."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        raise Refused(HTTPStatus.BAD_REQUEST, f"wait is {text[:100]!r}; give seconds, such as 10")
    return min(float(text), LONGEST_WAIT)


def _packed(kind: str, sample: Tensor) -> bytes:
    """A sample as a file."""
    if kind == "safetensors":
        return save({"sample": sample.contiguous()})
    out = io.BytesIO()
    if kind == "npy":
        np.save(out, cast(Any, sample.numpy()))
        return out.getvalue()
    try:
        plots.to_image(sample).save(out, format="PNG")
    except (ValueError, IndexError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"the sample is no picture ({error}); ask for npy or safetensors") from error
    return out.getvalue()
