# SPDX-License-Identifier: Apache-2.0
"""The server behind HTTP: what it answers, what it refuses, where it listens, what a kill leaves."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import Cli
from safetensors.torch import load, load_file
from served import FLAT, alone, engine, model, network, rms

from paradiff.app.shelf import Shelf
from paradiff.app.web import MOST_BODY, Server, is_loopback
from paradiff.models import load_pipeline
from paradiff.serving import Engine, SampleRequest, served_pipeline

TESTS = Path(__file__).parents[1]
JSON = {"Content-Type": "application/json"}
UNKNOWN = "0123456789abcdef"


@contextmanager
def running(of: Engine, shelf: Shelf | None = None) -> Iterator[Server]:
    with Server("127.0.0.1", 0, shelf) as server:
        server.engine = of
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            of.close()
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(engine()) as found:
        yield found


def asked(server: Server, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """The code and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, (JSON if body is not None else {}) if headers is None else headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def told(server: Server, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    code, data = asked(server, method, path, body)
    return code, json.loads(data)


def test_a_request_is_accepted_solved_and_given_in_each_format(server: Server) -> None:
    request = {"seed": 4, "sampler": "ddpm", "steps": 20, "method": "sequential", "conditioning": {"y": 2}}
    code, accepted = told(server, "POST", "/samples", request)
    assert code == 202
    code, report = told(server, "GET", f"{accepted['url']}?wait=30")
    assert (code, report["state"], report["status"], report["method"]) == (200, "done", "exact", "sequential")
    assert (report["rounds"], report["evaluations"], report["widest"]) == (20, 20, 1)
    expected = alone(SampleRequest.of_json(request))
    tensor = load(asked(server, "GET", f"{accepted['url']}?format=safetensors")[1])["sample"]
    array = np.load(io.BytesIO(asked(server, "GET", f"{accepted['url']}?format=npy")[1]))
    assert rms(tensor, expected) < 2e-5
    assert np.array_equal(array, tensor.numpy())
    picture = Image.open(io.BytesIO(asked(server, "GET", f"{accepted['url']}?format=png")[1]))
    assert (picture.size, picture.mode) == ((4, 4), "L")


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "sentence"),
    [
        ("POST", "/samples", {"sede": 1}, 400, "did you mean 'seed'"),
        ("POST", "/samples", {"sampler": "euler"}, 400, "sampler is 'euler'"),
        ("POST", "/samples", {"steps": 100_000}, 400, "100000 steps were asked"),
        ("POST", "/samples", {"conditioning": {"y": "cat"}}, 400, "the conditioning 'y' is 'cat'"),
        ("POST", "/samples", [1], 400, "the request is [1]; give a JSON object"),
        ("POST", "/samples", b"{", 400, "the body is no JSON"),
        ("POST", "/samples", b'{"tolerance": NaN}', 400, "NaN is no number of JSON"),
        ("POST", "/samples", b'{"seed": 1, "seed": 2}', 400, '"seed" is given twice'),
        ("POST", "/samples", b"[" * 50_000, 400, "the body is no JSON"),
        ("POST", "/samples", b"\xff\xfe\x00", 400, "the body is no JSON"),
        ("POST", "/samples", b" " * (MOST_BODY + 1), 413, f"it may have {MOST_BODY}"),
        ("POST", "/others", {}, 404, "takes no requests; send them to /samples"),
        ("GET", f"/samples/{UNKNOWN}", None, 404, "there is no request"),
        ("GET", f"/samples/{UNKNOWN}?format=png", None, 404, "there is no request"),
        ("GET", "/samples/../../etc/passwd", None, 404, "there is nothing at"),
        ("GET", "/samples/ABC", None, 404, "'ABC' is no id of a request"),
        ("GET", f"/samples/{UNKNOWN}?fromat=png", None, 400, "did you mean 'format'"),
        ("GET", "/", None, 404, "there is nothing at '/'"),
        ("DELETE", f"/samples/{UNKNOWN}", None, 404, "there is no request"),
        ("PUT", "/samples", {}, 405, "PUT is not answered; send GET, POST or DELETE"),
    ],
)
def test_what_cannot_be_is_answered_by_one_sentence(
    server: Server, method: str, path: str, body: Any, code: int, sentence: str
) -> None:
    found, answer = told(server, method, path, body)
    assert found == code
    assert sentence in answer["error"]
    assert "\n" not in answer["error"]
    assert told(server, "GET", "/healthz") == (200, {"status": "ok"})


def test_requests_of_other_pages_are_refused(server: Server) -> None:
    assert asked(server, "POST", "/samples", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert asked(server, "GET", "/healthz", None, {"Host": "attacker.example"})[0] == 403
    assert asked(server, "GET", "/healthz", None, {"Host": "localhost:80"})[0] == 200
    assert asked(server, "POST", "/samples", None, JSON | {"Transfer-Encoding": "chunked"})[0] == 411


def test_what_is_no_http_is_answered_and_ended(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as line:
        line.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
        assert b'"error": "Bad request' in line.recv(4096)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as line:
        line.sendall(b"POST /samples HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf")  # and goes away
    assert told(server, "GET", "/healthz")[0] == 200


def test_formats_waits_and_cancels_of_requests_that_are_not_there_yet() -> None:
    gate = threading.Event()

    def slow(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert gate.wait(30)
        return network(x, t, y)

    with running(engine(served=model(denoiser=slow), active=1, queue=1)) as found:
        ids = [told(found, "POST", "/samples", {"seed": s})[1]["id"] for s in range(2)]
        code, answer = told(found, "POST", "/samples", {})
        assert (code, answer["error"]) == (429, "2 requests run or wait, the most that may; send the request again later")
        code, answer = told(found, "GET", f"/samples/{ids[1]}?format=png&wait=0.01")
        assert code == 409
        assert "is queued; its sample is there once it is done" in answer["error"]
        assert told(found, "GET", f"/samples/{ids[1]}?format=gif")[1]["error"].startswith("the format is 'gif'")
        assert told(found, "GET", f"/samples/{ids[1]}?wait=soon")[0] == 400
        threading.Timer(0.2, gate.set).start()
        code, report = told(found, "DELETE", f"/samples/{ids[1]}")
        assert (code, report["state"]) == (200, "cancelled")
        code, answer = told(found, "GET", f"/samples/{ids[1]}?format=npy")
        assert (code, answer["error"]) == (410, f"request {ids[1]} has no sample: it was cancelled, as asked")
        assert told(found, "GET", f"/samples/{ids[0]}?wait=30")[1]["state"] == "done"
        code, answer = told(found, "DELETE", f"/samples/{ids[0]}")
        assert (code, answer["error"]) == (409, f"request {ids[0]} cannot be cancelled: it has ended as done")
        text = asked(found, "GET", "/metrics")[1].decode()
        assert 'paradiff_ended_total{how="cancelled"} 1' in text
        assert "paradiff_refused_total 1" in text
        found.engine.close()
        assert told(found, "POST", "/samples", {})[0] == 503
        assert told(found, "GET", "/healthz") == (503, {"status": "closing"})


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *((own, True) for own in ("127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost")),
        *((other, False) for other in ("0.0.0.0", "::", "192.168.0.3", "example.com", "")),
    ],
)
def test_loopback_addresses_are_known(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_an_address_that_is_taken_is_refused_by_a_sentence(server: Server) -> None:
    with pytest.raises(ValueError, match="cannot be listened on"):
        Server("127.0.0.1", server.server_port)


def test_results_lie_whole_in_the_folder_and_are_told_after_memory_forgot_them(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "out")
    with shelf.claimed(), running(engine(sink=shelf.keep, keep=1), shelf) as found:
        ids = [told(found, "POST", "/samples", {"seed": s, "steps": 5})[1]["id"] for s in range(4)]
        reports = [told(found, "GET", f"/samples/{id}?wait=30")[1] for id in ids]
        assert [report["state"] for report in reports] == ["done"] * 4
        told(found, "GET", f"/samples/{ids[-1]}?wait=30")
        assert found.engine.job(ids[0]) is None
        tensor = load(asked(found, "GET", f"/samples/{ids[0]}?format=safetensors")[1])["sample"]
        assert torch.equal(tensor, load_file(shelf.path / f"{ids[0]}.safetensors")["sample"])
        assert told(found, "GET", f"/samples/{ids[0]}")[1]["state"] == "done"
        with pytest.raises(ValueError, match="another server writes to"), Shelf(tmp_path / "out").claimed():
            pass
        told(found, "POST", "/samples", {"sampler": "euler"})  # which is not accepted
        assert shelf.left() == []
    assert [*(tmp_path / "out").glob("**/*.part")] == []


def test_a_request_that_cannot_be_written_down_is_not_accepted(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "nowhere")
    with running(engine(sink=shelf.keep), shelf) as found:
        code, answer = told(found, "POST", "/samples", {})
        assert code == 400
        assert "cannot be written" in answer["error"]


ODD_FILES: list[Callable[[Path], Any]] = [
    os.mkfifo,
    os.mkdir,
    lambda file: file.symlink_to(file),
    lambda file: file.symlink_to("/dev/zero"),
    lambda file: file.write_text("[" * 100_000),
    lambda file: file.write_bytes(b"x" * 50),
]


@pytest.mark.parametrize("make", ODD_FILES)
def test_what_lies_in_a_folder_and_is_no_file_of_a_server_is_told_in_a_sentence(
    tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    shelf = Shelf(tmp_path)
    with shelf.claimed():
        make(tmp_path / "requests" / f"{UNKNOWN}.json")
        with pytest.raises(ValueError, match=r"is no request \(.*\); remove it"):
            shelf.left()
    make(tmp_path / f"{UNKNOWN}.json")
    make(tmp_path / f"{UNKNOWN}.safetensors")
    assert shelf.report(UNKNOWN) is None
    assert shelf.sample(UNKNOWN) is None


def test_a_file_of_many_bytes_is_no_request(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with shelf.claimed():
        (tmp_path / "requests" / f"{UNKNOWN}.json").write_text('{"seed": 0' + " " * 2**20 + "}")
        with pytest.raises(ValueError, match="it is too large to be one of ours"):
            shelf.left()


def test_a_sample_that_was_spoilt_is_gone(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    (tmp_path / f"{UNKNOWN}.json").write_text('{"state": "done", "message": "converged"}')
    (tmp_path / f"{UNKNOWN}.safetensors").write_bytes(b"x" * 50)
    with shelf.claimed(), running(engine(), shelf) as found:
        code, answer = told(found, "GET", f"/samples/{UNKNOWN}?format=npy")
    assert (code, answer["error"]) == (410, f"request {UNKNOWN} has no sample: its file is gone, or is none of a sample")


def test_requests_that_another_model_left_are_named(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / f"{UNKNOWN}.json").write_text('{"sampler": "nothing"}')
    sentence = cli("serve", "digits", "--steps", "5", "--port", "0", "--out", str(tmp_path)).sentence
    assert f"has request {UNKNOWN} left, which does not fit 'digits' (sampler is 'nothing'" in sentence
    assert (tmp_path / "requests" / f"{UNKNOWN}.json").exists()


KILLED = """
import sys, time, threading, torch
from pathlib import Path
from served import engine, model, network
from paradiff.app.shelf import Shelf
from paradiff.app.web import Server
torch.set_num_threads(1)
def slow(x, t, y):
    time.sleep(0.005)
    return network(x, t, y)
shelf = Shelf(Path(sys.argv[1]))
with shelf.claimed(), Server("127.0.0.1", 0, shelf) as server:
    server.engine = engine(served=model(denoiser=slow), active=4, sink=shelf.keep)
    print(server.server_port, flush=True)
    server.serve_forever()
"""


def test_a_kill_loses_nothing_that_was_accepted(tmp_path: Path) -> None:
    line = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=TESTS)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    ids = []
    for seed in range(30):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/samples", json.dumps({"seed": seed, "steps": 10}), JSON)
        ids.append(json.loads(connection.getresponse().read())["id"])
        connection.close()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shelf = Shelf(tmp_path / "out")
    whole = [id for id in ids if (shelf.path / f"{id}.json").exists()]
    assert {*whole, *(id for id, _ in shelf.left())} == {*ids}
    assert len(whole) < 30
    with shelf.claimed():
        found = engine(sink=shelf.keep)
        for id, request in shelf.left():
            found.submit(request, id, anew=True)
        assert found.close(drain=60) == []
    for seed, id in enumerate(ids):
        sample = load_file(shelf.path / f"{id}.safetensors")["sample"]
        assert rms(sample, alone(SampleRequest(seed=seed, steps=10))) < 4e-3
    assert shelf.left() == []


def test_the_command_serves_the_bundled_digits_on_this_machine_alone_and_ends_cleanly(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "paradiff", "serve", "digits", "--steps", "10", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*line, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.fullmatch(r"digits is served on http://127\.0\.0\.1:([0-9]+)\n", said)
    assert found, said
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    connection.request("POST", "/samples", json.dumps({"seed": 3}), JSON)
    id = json.loads(connection.getresponse().read())["id"]
    connection.close()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert error.splitlines()[-1] == "terminated: 1 sample was made; nothing that was accepted is lost"
    assert process.returncode == 143
    report = json.loads((tmp_path / "out" / f"{id}.json").read_text())
    assert report["state"] == "done"
    assert load_file(tmp_path / "out" / f"{id}.safetensors")["sample"].shape == (1, 8, 8)


def test_a_pipeline_is_served_whose_pictures_are_those_of_its_own_calls() -> None:
    pipeline = load_pipeline("shapes")
    pipeline.set_progress_bar_config(disable=True)
    with running(Engine(served_pipeline(pipeline, steps=10), curve=FLAT)) as server:
        requests = [
            {"prompt": "a red circle", "guidance": 4, "seed": 3, "method": "sequential"},
            {"prompt": "a blue square", "negative_prompt": "a circle", "seed": 4, "steps": 12, "method": "sequential"},
        ]
        urls = [told(server, "POST", "/samples", request)[1]["url"] for request in requests]
        reports = [told(server, "GET", f"{url}?wait=60")[1] for url in urls]
        pictures = [Image.open(io.BytesIO(asked(server, "GET", f"{url}?format=png")[1])) for url in urls]
        code, refused = told(server, "POST", "/samples", {"seed": 1})
    assert [report["state"] for report in reports] == ["done", "done"]
    assert reports[0]["request"]["prompt"] == "a red circle"
    assert (code, refused["error"][:25]) == (400, "the request has no prompt")
    calls = [
        ({"prompt": "a red circle", "guidance_scale": 4.0, "num_inference_steps": 10}, 3),
        ({"prompt": "a blue square", "negative_prompt": "a circle", "num_inference_steps": 12}, 4),
    ]
    for (given, seed), picture in zip(calls, pictures, strict=True):
        expected = pipeline(**given, generator=torch.Generator().manual_seed(seed)).images[0]
        difference = np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int))
        assert difference.max() <= 1  # grey levels: rounding, on one side of a half or the other


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["points-policy"], "'points-policy' is a policy"),
        (["shapes", "--grid", "uniform"], "--grid was given, but 'shapes' is called through its own pipeline"),
        (["shapes", "--sampler", "ddmi"], "sampler is 'ddmi'; it must be one of"),
        (["digits", "--port", "70000"], "--port is 70000"),
        (["digits", "--active", "0"], "--active is 0"),
        (["digits", "--drain", "-1"], "--drain, in seconds, is -1"),
        (["digits", "--sampler", "eular"], "did you mean 'euler'"),
        (["digits", "--host", "256.1.1.1", "--port", "0"], "cannot be listened on"),
        *((["digits", "--host", host, "--port", "0"], "is no address; give one") for host in ("[::", "::]", "[]", "[[::1]]")),
        (["digits", "--out", __file__, "--port", "0"], "cannot be written"),
        (["digits", "--prompt", "a cat"], "No such option"),
    ],
)
def test_options_that_cannot_be_are_refused(cli: Cli, options: list[str], sentence: str) -> None:
    result = cli("serve", *options)
    assert sentence in result.sentence
