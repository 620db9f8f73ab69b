"""Test the benchmark of one batch and the cache metrics against local servers."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import sys
import threading
import time
import types
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from jitnorm.benchmark.server import batch, client, get_cache_tokens_from_metrics, run_batch
from jitnorm.cli import main

METRICS = """# HELP sglang:prompt_tokens_total Number of prefill tokens processed.
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model="a",rank="0"} 100.0
sglang:prompt_tokens_total{model="a",rank="1"} 28.0
# HELP sglang:cached_tokens_total Number of cached prompt tokens.
# TYPE sglang:cached_tokens_total counter
sglang:cached_tokens_total{model="a",rank="0",source="device"} 30.0
sglang:cached_tokens_total{model="a",rank="1",source="host"} 2.5
# TYPE sglang:cached_tokens_total_gauge gauge
sglang:cached_tokens_total_gauge 7.0
# TYPE sglang:time_to_first_token_seconds histogram
sglang:time_to_first_token_seconds_bucket{le="0.1"} 3.0
sglang:time_to_first_token_seconds_bucket{le="+Inf"} 3.0
sglang:time_to_first_token_seconds_count 3.0
sglang:time_to_first_token_seconds_sum 0.1
"""


class Server(ThreadingHTTPServer):
    """Answer /metrics with `status` and `text`, and completions according to `behaviour`."""

    daemon_threads = True
    status, text, behaviour = 200, METRICS, "good"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that hung up on purpose


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args):
        pass

    def answer(self, status, body, kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path != "/metrics":
            return self.answer(404, b"no such page")
        if self.server.behaviour == "slow metrics":
            self.rfile.read(1)  # until the client hangs up
        text = self.server.text
        if callable(text):
            text = text() if self.server.status == 200 else ""
        return self.answer(self.server.status, text if isinstance(text, bytes) else text.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"path": self.path, **body})
        what = self.server.behaviour
        if what == "refuses":
            return self.answer(503, b'{"error": "overloaded"}', "application/json")
        if what == "no stream":
            return self.answer(200, b'{"choices": []}', "application/json")
        if what == "hangs":
            self.rfile.read(1)  # until the client hangs up
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if what == "drips":
            with contextlib.suppress(OSError):
                while True:
                    self.chunk(b":")  # a comment that never ends
                    time.sleep(0.05)
            return None
        try:
            self.stream(what, body)
        except Stop:
            self.close_connection = True
        return None

    def stream(self, what, body):
        openai = self.path == "/v1/completions"
        count = body["max_tokens"] if openai else body["sampling_params"]["max_new_tokens"]
        for i in range(count):
            event = (
                {"choices": [{"text": "x"}]} if openai else {"text": "x" * i, "meta_info": {"completion_tokens": i + 1}}
            )
            if i == 3:
                if what == "half-way":
                    raise Stop
                if what == "wrong JSON":
                    self.chunk(b"data: {not json\n\n")
                if what == "other JSON":
                    event = {"hello": "world"}
                if what == "reports an error":
                    event = {"error": {"message": "out of memory"}}
                if what == "stalls":
                    self.rfile.read(1)  # until the client hangs up
            self.chunk(f": comment\r\ndata: {json.dumps(event)}\r\n\r\n".encode())
        if openai:
            self.chunk(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % count)
        if what != "without an end":
            self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


class Stop(Exception):
    """Make the server close the connection."""


@pytest.fixture
def server():
    one = Server()
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def unused_url() -> str:
    """Return an address on which no server listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# Metrics


def silently(url):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return get_cache_tokens_from_metrics(url)


def warned(url) -> str:
    with pytest.warns(RuntimeWarning) as caught:
        assert get_cache_tokens_from_metrics(url) is None
    assert len(caught) == 1
    return str(caught[0].message)


def test_metrics_are_summed_over_labels(server):
    assert silently(server.url) == (32.5, 128.0)
    assert silently(server.url + "/") == silently(server.url + "/metrics") == (32.5, 128.0)


def test_metrics_without_a_prefix_and_before_the_first_hit(server):
    server.text = METRICS.replace("sglang:", "")
    assert silently(server.url) == (32.5, 128.0)
    server.text = "prompt_tokens_total 5\n"
    assert silently(server.url) == (0.0, 5.0)


@pytest.mark.parametrize("status", [400, 401, 404, 405, 500, 503])
def test_an_http_error_means_that_metrics_are_not_served(server, status):
    server.status = status
    assert silently(server.url) is None


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (200, "<html>hello</html>", "no cache metrics from"),
        (200, "sglang:prompt_tokens_total{ 1", "no cache metrics from"),
        (200, "sglang:prompt_tokens_total many\n", "many"),
        (200, b"\xff\xfe", "utf-8"),
        (200, "", "has no prompt_tokens_total"),
        (200, "prompt_tokens_total NaN\n", "not finite"),
        (204, "", "HTTP status 204"),
        (302, METRICS, "HTTP status 302"),
    ],
)
def test_anything_unexpected_warns_once(server, status, text, words):
    server.status, server.text = status, text
    assert words in warned(server.url)


def test_no_server_and_no_url(unused_url):
    assert "refused" in warned(unused_url)
    assert "url must be such as http://localhost:30000" in warned("localhost:30000")


def test_metrics_timeout(server, monkeypatch):
    monkeypatch.setattr(client, "_METRICS_TIMEOUT", 0.2)
    server.behaviour = "slow metrics"
    assert "not finished within 0.2 s" in warned(server.url)


def test_server_of_another_protocol():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with listener.accept()[0] as one:
                one.recv(1000)
                one.sendall(b"220 smtp here\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert "220 smtp" in warned(f"http://127.0.0.1:{listener.getsockname()[1]}")


# The batch


@pytest.mark.parametrize(("api", "path"), [("openai", "/v1/completions"), ("sglang", "/generate")])
def test_a_batch(server, api, path, monkeypatch):
    ticks = itertools.count()  # a clock that advances by 20 ms with each reading, however busy the machine is
    monkeypatch.setattr(batch, "time", types.SimpleNamespace(perf_counter=lambda: 0.02 * next(ticks)))
    result = run_batch(server.url, api, "m", batch_size=3, input_len=7, output_len=6, timeout=20)
    assert not result.errors and [r.tokens for r in result.requests] == [6] * 3
    assert all(len(r.times) == 6 and r.times == sorted(r.times) for r in result.requests)
    facts = result.as_dict()
    assert facts["completed"] == 3 and facts["output_tokens"] == 18
    readings = 3 * (6 + (api == "openai"))  # of the clock after the start: one an event, of which OpenAI's has one more
    assert 0.02 <= facts["time_to_first_token"] <= facts["time_to_first_token_max"] <= 0.0201 * readings
    assert 0.0199 <= facts["inter_token_latency"] <= 0.02 * readings and facts["event_gap_p99"] >= 0.0199
    assert facts["seconds"] == max(r.times[-1] for r in result.requests) <= 0.0201 * readings
    assert facts["output_tokens_per_second"] == pytest.approx(18 / facts["seconds"])
    assert facts["input_tokens_per_second"] == pytest.approx(21 / facts["time_to_first_token_max"])
    assert facts["cache_hit_rate"] is None, "its counters did not move"
    assert {request["path"] for request in server.seen} == {path}
    prompts = [request.get("prompt") or request["input_ids"] for request in server.seen]
    assert all(len(prompt) == 7 for prompt in prompts) and len({*map(tuple, prompts)}) == 3
    assert "3 completed\n" in result.as_text() and "failed" not in result.as_text()


def test_the_cache_hit_rate_is_of_this_batch(server):
    texts = iter(
        ["cached_tokens_total 100\nprompt_tokens_total 1000\n", "cached_tokens_total 130\nprompt_tokens_total 1040\n"]
    )
    server.text = lambda: next(texts)
    result = run_batch(server.url, output_len=1, input_len=40, seed=1)
    assert result.cache_hit_rate == 0.75 and "75.0%" in result.as_text()
    server.status = 404
    again = run_batch(server.url, output_len=1, input_len=40, seed=1)
    assert again.cache_hit_rate is None and "cache hit rate        unknown" in again.as_text()
    assert server.seen[0]["prompt"] == server.seen[1]["prompt"], "the same seed, the same prompts"


@pytest.mark.parametrize("api", ["openai", "sglang"])
@pytest.mark.parametrize(
    # Only the last three reach the timeout, before which "stalls" has to send three events on any machine.
    ("behaviour", "words", "tokens"),
    [
        ("half-way", "the stream ended without [DONE], after 3 tokens", 3),
        ("without an end", "the stream ended without [DONE], after 6 tokens", 6),
        ("wrong JSON", "an event is not JSON: {not json", 3),
        ("other JSON", "an event is not as expected", 3),
        ("reports an error", 'the server reports an error: {"message": "out of memory"}', 3),
        ("refuses", 'HTTP status 503: {"error": "overloaded"}', 0),
        ("no stream", "answered with application/json instead of a stream", 0),
        ("stalls", "not finished within 2 s", 3),
        ("hangs", "not finished within 0.3 s", 0),
        ("drips", "not finished within 0.3 s", 0),
    ],
)
def test_failures_are_reported_within_the_timeout(server, api, behaviour, words, tokens):
    server.behaviour = behaviour
    timeout = float(words.split()[-2]) if words.startswith("not finished") else 60
    result = run_batch(server.url, api, batch_size=2, input_len=3, output_len=6, timeout=timeout)
    assert [r.tokens for r in result.requests] == [tokens] * 2
    assert all(words in error for error in result.errors) and len(result.errors) == 2, result.errors
    assert result.as_dict()["completed"] == 0 and result.as_dict()["time_to_first_token"] is None
    assert f"2 requests failed after {tokens} tokens: {words}" in result.as_text()


def test_batch_without_a_server(unused_url):
    with pytest.warns(RuntimeWarning, match="refused"):
        result = run_batch(unused_url, batch_size=2, timeout=60)
    assert len(result.errors) == 2 and all("cannot connect" in error for error in result.errors)
    assert result.as_text().count("cannot connect") == 1 and "2 requests failed after 0 tokens" in result.as_text()


@pytest.mark.parametrize(
    "bad", [{"api": "grpc"}, {"batch_size": 0}, {"input_len": 0}, {"output_len": 0}, {"timeout": 0}, {"url": "there"}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        run_batch(**{"url": "http://localhost:1", **bad})


def test_command(server):
    words = ["bench", "server", "--url", server.url, "--batch-size", "2", "--output-len", "5", "--input-len", "9"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and "batch of 2, 9 tokens in, 5 out: 2 completed\n" in done.stdout, done.output
    done = CliRunner().invoke(main, [*words, "--api", "sglang", "--format", "json"])
    assert json.loads(done.stdout)["output_tokens"] == 10
    server.behaviour = "half-way"
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1 and "2 requests failed after 3 tokens" in done.stdout
    assert CliRunner().invoke(main, ["bench", "server", "--url", "there"]).stderr.startswith("Error: url must be")


@pytest.mark.parametrize("package", ["httpx", "httpx_sse"])
def test_missing_packages_are_one_line(package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jitnorm.benchmark.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    done = CliRunner().invoke(main, ["bench", "server", "--url", "http://localhost:1"])
    assert done.exit_code == 1 and done.stderr == (
        "Error: jitnorm.benchmark.server needs httpx and httpx-sse: pip install 'jitnorm[bench]'\n"
    )
