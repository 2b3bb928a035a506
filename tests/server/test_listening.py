"""A served application on a real port: sockets, slow clients, and how the process ends."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import threading
import time
from contextlib import closing

import pytest
from processes import Forked
from serving import CHAT, serving, until

pytest.importorskip("uvicorn", reason="needs the serve extra")

from mara_integrations.errors import ConfigError
from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.server.listening import bind, is_loopback, port_of, serve
from mara_integrations.testing import tiny_model, tiny_tokenizer

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def talk(port, *parts, pause_s=0.0, wait_s=10.0) -> bytes:
    """Send parts on a new connection; all that is answered until the server closes it or `wait_s` have passed."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=wait_s)) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
        except (TimeoutError, ConnectionError):
            pass
        return received


def request(body: bytes, *more: bytes) -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in more) + b"content-length: %d\r\n\r\n" % len(body) + body


def error_of(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


# --- sockets


def test_a_free_port_is_found():
    (opened,) = bind("127.0.0.1", 0)
    with opened:
        assert port_of([opened]) > 0


def test_a_port_in_use_is_named():
    (opened,) = bind("127.0.0.1", 0)
    with opened, pytest.raises(ConfigError, match=rf"port {port_of([opened])} of 127\.0\.0\.1 is in use"):
        bind("127.0.0.1", port_of([opened]))


@pytest.mark.parametrize(
    ("host", "said"), [("no.such.host.invalid", "is not known"), ("192.0.2.1", "not an address of this machine")]
)
def test_a_host_that_is_not_this_machine_is_named(host, said):
    with pytest.raises(ConfigError, match=said):
        bind(host, 0)


def test_a_name_of_several_addresses_has_one_port():
    opened = bind("localhost", 0)
    assert len({one.getsockname()[1] for one in opened}) == 1
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("gpu", False)]
)
def test_which_hosts_are_this_machine_alone(host, expected):
    assert is_loopback(host) == expected


# --- clients that are slow or talk no HTTP


@pytest.fixture
def port(engine, heads):
    app = create_app(engine, heads, name="tiny", body_timeout_s=0.5)
    with serving(app, header_timeout_s=0.5) as port:
        yield port


def test_slow_headers_are_given_up(port):
    began = time.monotonic()
    assert talk(port, b"POST /v1/chat", b"/completions") == b""
    assert talk(port, b"") == b""
    assert time.monotonic() - began < 8


def test_headers_that_trickle_in_are_given_up(port):
    began = time.monotonic()
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        with pytest.raises(ConnectionError):
            for _ in range(100):
                connection.sendall(b"x-header: value\r\n")
                time.sleep(0.05)
        assert time.monotonic() - began < 4


def test_headers_of_a_second_request_have_a_limit_too(port):
    began = time.monotonic()
    answer = talk(port, request(json.dumps(CHAT).encode()), b"POST /v1", pause_s=0.2)
    assert answer.count(b"HTTP/1.1 200") == 1 and time.monotonic() - began < 8


def test_slow_bodies_are_given_up(port):
    began = time.monotonic()
    status, error = error_of(talk(port, HEAD + b"content-length: 100\r\n\r\n{"))
    assert status == 408 and "0.5 s" in error["message"] and time.monotonic() - began < 8


def test_a_body_that_nobody_reads_does_not_hold_the_connection(port):
    began = time.monotonic()
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        connection.sendall(HEAD + b"content-length: 99999999\r\n\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(100):
                connection.sendall(b"x" * 100)
                time.sleep(0.05)
    assert time.monotonic() - began < 5


def test_beside_slow_clients_others_are_answered(port):
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    for number, connection in enumerate(slow):
        connection.sendall(HEAD if number % 2 else HEAD + b"content-length: 100\r\n\r\n{")
    began = time.monotonic()
    assert b"HTTP/1.1 200" in talk(port, request(json.dumps(CHAT).encode(), b"connection: close"))
    assert time.monotonic() - began < 5
    for connection in slow:
        connection.settimeout(10)
        received = connection.recv(65536)
        assert received == b"" or received.startswith(b"HTTP/1.1 408")
        connection.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nx: \x00\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        request(b"{}").replace(b"content-length: 2", b"content-length: 2\r\ncontent-length: 3"),
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_an_error_of_our_form(port, garbage):
    answer = talk(port, garbage)
    if answer:  # a TLS greeting looks like an unfinished request line
        status, error = error_of(answer)
        assert status == 400 and error["type"] == "invalid_request_error"


def test_a_request_of_two_lengths_is_refused_and_its_connection_closed(port):
    smuggled = HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n"
    answer = talk(port, smuggled)
    assert answer.startswith(b"HTTP/1.1 400") and b"mara_requests" not in answer and answer.count(b"HTTP/1.1") == 1


def test_a_megabyte_too_much_is_refused_and_the_next_request_answered(engine):
    with serving(create_app(engine, name="tiny", max_body_bytes=1000)) as port:
        for lengths in ([b"content-length: 1000000"], [b"transfer-encoding: chunked"]):
            body = b"x" * 1_000_000 if b"length" in lengths[0] else b"F4240\r\n" + b"x" * 1_000_000 + b"\r\n0\r\n\r\n"
            answer = talk(port, HEAD + lengths[0] + b"\r\nconnection: close\r\n\r\n" + body)
            assert answer.startswith(b"HTTP/1.1 413")
        assert b"HTTP/1.1 200" in talk(port, request(json.dumps(CHAT).encode(), b"connection: close"))


async def test_a_client_that_hangs_up_stops_its_generation(engine):
    app = create_app(engine, name="tiny")
    with serving(app) as port:
        for stream in (False, True):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(json.dumps({**CHAT, "max_tokens": 450, "stream": stream}).encode()))
            await until(lambda: app.state.admission.num_running == 1)
            writer.close()
            await until(lambda: app.state.admission.num_running == 0, seconds=5)


# --- the end of the process


def serve_tiny_model():
    logging.basicConfig(format="%(message)s")
    engine = MARAEngine((tiny_model(max_position_embeddings=100_000), tiny_tokenizer())).load()
    engine.generate("warm", max_new_tokens=1)
    sockets = bind("127.0.0.1", 0)
    sys.stdout.write(f"{port_of(sockets)}\n")
    sys.stdout.flush()
    serve(create_app(engine, name="tiny"), sockets)
    sys.stdout.write("ended")


@pytest.fixture
def process():
    process = Forked(serve_tiny_model)
    yield process
    process.close()


def streaming(port, max_tokens) -> tuple[threading.Thread, list[bytes]]:
    """A stream that has begun, and what comes of it."""
    parts, begun = [], threading.Event()

    def read():
        with closing(socket.create_connection(("127.0.0.1", port), timeout=60)) as connection:
            connection.sendall(request(json.dumps({**CHAT, "max_tokens": max_tokens, "stream": True}).encode()))
            try:
                while data := connection.recv(65536):
                    parts.append(data)
                    if b"content" in data:
                        begun.set()
            except ConnectionError:
                pass

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    return thread, parts


@pytest.mark.slow
def test_ctrl_c_waits_for_the_replies_that_run_and_says_so(process):
    port = int(process.stdout.readline())
    thread, parts = streaming(port, 150)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    thread.join(10)
    assert "waiting for 1 reply; press Ctrl-C again to stop it" in err
    assert b"data: [DONE]" in b"".join(parts)
    assert process.returncode == 0 and "ended" in out


def test_a_second_ctrl_c_stops_them(process):
    port = int(process.stdout.readline())
    streams = [streaming(port, 50_000) for _ in range(2)]
    process.send_signal(signal.SIGINT)
    assert "waiting for 2 replies; press Ctrl-C again to stop them" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    for thread, parts in streams:
        thread.join(10)
        assert b"[DONE]" not in b"".join(parts)
    assert "stopping 2 replies" in err and "Traceback" not in err
    assert process.returncode == 0 and "ended" in out


@pytest.mark.slow
def test_without_replies_ctrl_c_ends_at_once_and_silently(process):
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "ended" in out and "waiting" not in err
