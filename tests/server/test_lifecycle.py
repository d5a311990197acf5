from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from vattention.errors import ConfigError
from vattention.server.lifecycle import bind, url_of

ROOT = Path(__file__).parents[2]

Process = subprocess.Popen[str]
Start = Callable[..., tuple[Process, str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts server processes: start(step_s=..., ...) -> (process, url)."""
    processes: list[Process] = []

    def run(*, step_s: float = 0.01, drain_timeout_s: float = 10.0, flush_s: float = 5.0) -> tuple[Process, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.serve_fake", str(step_s), str(drain_timeout_s), str(flush_s)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def stream_events(url: str, max_tokens: int, begun: list[float]) -> list[str]:
    """The events of a streamed completion; `begun` gets an entry with the first."""
    body = {"prompt": "a", "max_tokens": max_tokens, "stream": True}
    events = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        for line in response.iter_lines():
            if line:
                begun.append(time.monotonic())
                events.append(line.removeprefix("data: "))
    return events


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def health(url: str) -> int:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code
    return 0


def metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics", timeout=60).text


def test_sigterm_drains(start: Start) -> None:
    process, url = start()
    begun: list[float] = []
    with ThreadPoolExecutor() as pool:
        running = pool.submit(stream_events, url, 100, begun)
        wait_for(lambda: begun)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: health(url) == 503)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_stopped"
        events = running.result()
    assert events[-1] == "[DONE]"
    assert len(events) == 101
    assert process.wait(60) == 0
    assert process.stdout is not None
    assert process.stdout.read() == "ended\n"


def test_what_runs_beyond_the_timeout_ends_with_an_error(start: Start) -> None:
    process, url = start(drain_timeout_s=0.3)
    begun: list[float] = []
    with ThreadPoolExecutor() as pool:
        running = pool.submit(stream_events, url, 500, begun)
        wait_for(lambda: begun)
        process.send_signal(signal.SIGTERM)
        last = json.loads(running.result()[-1])
    assert last["error"]["code"] == "engine_stopped"
    assert process.wait(60) == 0


def test_clients_that_do_not_read_hold_up_nothing(start: Start) -> None:
    process, url = start(drain_timeout_s=600, flush_s=0.5)
    address = urlsplit(url).hostname, urlsplit(url).port
    body = {"prompt": ["x" * 400] * 250, "max_tokens": 1, "echo": True, "logprobs": 5, "stream": True}
    with closing(socket.socket()) as deaf, closing(socket.socket()) as half_sent:
        deaf.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 4096
        )  # 6 MB of events are then more than the kernel keeps
        for client, text in ((deaf, json.dumps(body)), (half_sent, "{")):
            client.connect(address)
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (max(len(text), 99), text.encode())
            )
        wait_for(lambda: 'engine="0",finished_reason="length",model_name="fake"} 250.0' in metrics(url))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "2 connections are cut" in errors
    assert "Traceback" not in errors


def test_a_second_signal_stops_at_once(start: Start) -> None:
    process, url = start(drain_timeout_s=600)
    begun: list[float] = []
    with ThreadPoolExecutor() as pool:
        running = pool.submit(stream_events, url, 500, begun)
        wait_for(lambda: begun)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: health(url) == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT
        with pytest.raises(httpx.TransportError):
            running.result()


def test_idle_it_uses_no_processor_and_ends_at_once(start: Start) -> None:
    process, url = start(drain_timeout_s=600)
    assert health(url) == 200

    def cpu_ticks() -> int:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def is_idle() -> bool:
        before = cpu_ticks()
        time.sleep(2)
        return cpu_ticks() - before <= 1

    # On a busy machine it may still be starting.
    assert any(is_idle() for _ in range(10))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.mark.parametrize("port", [-1, 65_536, 99_999])
def test_ports_that_cannot_be_are_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=f"must be 0 to 65535, not {port}"):
        bind("127.0.0.1", port).close()


def test_a_port_in_use_is_a_clear_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*choose another"):
            bind("127.0.0.1", port)


def test_a_host_that_is_none_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="choose another --host"):
        bind("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")],
)
def test_the_url_is_one_a_client_here_can_use(host: str, url: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("no IPv6 on this machine")
    with bind(host, 0) as listener:
        assert url_of(listener) == f"{url}{listener.getsockname()[1]}"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
