"""One batch of streamed completions: when each token came, and what went wrong."""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from jitnorm.benchmark.server.client import Connection, events, split
from jitnorm.benchmark.server.metrics import get_cache_tokens_from_metrics
from jitnorm.benchmark.stats import quantile

_TOKENS = range(1000, 10000)  # ids that every vocabulary has, and that are no special ones


@dataclass
class Request:
    """One of the batch. Times are in seconds since the batch was sent."""

    times: list[float] = field(default_factory=list)  # of each event that brought tokens
    tokens: int = 0
    error: str | None = None

    @property
    def inter_token(self) -> float | None:
        """Seconds between tokens, the mean over the request: an event may bring several tokens."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass
class BatchResult:
    """All requests of the batch, those that failed with what they had got by then."""

    input_len: int
    output_len: int
    requests: list[Request]
    cache_hit_rate: float | None  # of the prompts' tokens; None where the server does not tell

    @property
    def errors(self) -> list[str]:
        return [request.error for request in self.requests if request.error]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; times in seconds, None for what cannot be known."""
        done = [r for r in self.requests if not r.error and r.times]
        first = [r.times[0] for r in done]
        between = [r.inter_token for r in done if r.inter_token is not None]
        gaps = [b - a for r in done for a, b in zip(r.times, r.times[1:], strict=False)]
        last = max((r.times[-1] for r in done), default=0.0)
        return {
            "batch_size": len(self.requests),
            "input_len": self.input_len,
            "output_len": self.output_len,
            "completed": len(done),
            "time_to_first_token": statistics.median(first) if first else None,
            "time_to_first_token_max": max(first, default=None),
            "inter_token_latency": statistics.median(between) if between else None,
            "event_gap_p99": quantile(gaps, 0.99) if gaps else None,
            "output_tokens": sum(r.tokens for r in done),
            "output_tokens_per_second": sum(r.tokens for r in done) / last if last else None,
            "input_tokens_per_second": self.input_len * len(done) / max(first) if first else None,
            "seconds": last or None,
            "cache_hit_rate": self.cache_hit_rate,
            "requests": [asdict(request) for request in self.requests],
        }

    def as_text(self) -> str:
        facts = self.as_dict()

        def show(name: str, factor: float = 1.0, unit: str = "", digits: int = 1) -> str:
            return "unknown" if facts[name] is None else f"{facts[name] * factor:.{digits}f}{unit}"

        head = (
            f"batch of {facts['batch_size']}, {self.input_len} tokens in, {self.output_len} out: "
            f"{facts['completed']} completed"
        )
        figures = [
            f"seconds               {show('seconds', 1, '', 3)} until the last token",
            f"time to first token   {show('time_to_first_token', 1e3, ' ms')} median, "
            f"{show('time_to_first_token_max', 1e3, ' ms')} at most",
            f"inter-token latency   {show('inter_token_latency', 1e3, ' ms', 2)} median over requests; "
            f"between events {show('event_gap_p99', 1e3, ' ms', 2)} at the 99th percentile",
            f"throughput            {show('output_tokens_per_second')} tokens/s out, "
            f"{show('input_tokens_per_second')} tokens/s in until the last first token",
            f"cache hit rate        {show('cache_hit_rate', 100, '%')}",
        ]
        lines = [head, *(figures if facts["completed"] else [])]
        remarks: dict[str, list[int]] = {}  # and the requests that each is of
        for i, request in enumerate(self.requests):
            if request.error:
                remarks.setdefault(f"failed after {request.tokens} tokens: {request.error}", []).append(i)
            elif request.tokens != self.output_len:
                remarks.setdefault(f"brought {request.tokens} tokens instead of {self.output_len}", []).append(i)
        for remark, where in remarks.items():
            lines.append(f"{f'request {where[0]}' if len(where) == 1 else f'{len(where)} requests'} {remark}")
        return "\n".join(lines)


def run_batch(
    url: str,
    api: str = "openai",
    model: str = "default",
    batch_size: int = 1,
    input_len: int = 1024,
    output_len: int = 128,
    timeout: float = 120.0,
    seed: int | None = None,
) -> BatchResult:
    """Sends `batch_size` requests at once, and reads their streams to the end or for `timeout` seconds.

    Prompts are `input_len` random token ids, other ones each time; the same with the same `seed`, to meet the server's
    cache. `api` is "openai" (`/v1/completions`) or "sglang" (`/generate`). What goes wrong with a request is in its
    `error`; ValueError for arguments that are not accepted.
    """
    if api not in _APIS:
        raise ValueError(f"api must be one of {', '.join(_APIS)}, got {api!r}")
    for name, value in (("batch_size", batch_size), ("input_len", input_len), ("output_len", output_len)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
    split(url)
    choose = random.Random(seed)
    prompts = [choose.choices(_TOKENS, k=input_len) for _ in range(batch_size)]
    before = get_cache_tokens_from_metrics(url)
    requests = _send(url, _APIS[api](model, output_len), prompts, timeout)
    after = get_cache_tokens_from_metrics(url) if before else None
    rate = None
    if before and after and after[1] > before[1]:
        rate = (after[0] - before[0]) / (after[1] - before[1])
    return BatchResult(input_len, output_len, requests, rate)


@dataclass(frozen=True)
class _Api:
    path: str
    body: Callable[[list[int]], dict[str, Any]]
    read: Callable[[dict[str, Any], Request], bool]  # counts the event's tokens; whether it brought any


def _openai(model: str, output_len: int) -> _Api:
    common = {"model": model, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
    common |= {"stream": True, "stream_options": {"include_usage": True}}

    def read(event: dict[str, Any], request: Request) -> bool:
        brought = bool(event["choices"])
        request.tokens += brought
        if event.get("usage"):
            request.tokens = int(event["usage"]["completion_tokens"])
        return brought

    return _Api("/v1/completions", lambda ids: {"prompt": ids, **common}, read)


def _sglang(model: str, output_len: int) -> _Api:
    sampling = {"max_new_tokens": output_len, "temperature": 0, "ignore_eos": True}

    def read(event: dict[str, Any], request: Request) -> bool:
        before, request.tokens = request.tokens, int(event["meta_info"]["completion_tokens"])
        return request.tokens > before

    return _Api("/generate", lambda ids: {"input_ids": ids, "sampling_params": sampling, "stream": True}, read)


_APIS = {"openai": _openai, "sglang": _sglang}


def _send(url: str, api: _Api, prompts: list[list[int]], timeout: float) -> list[Request]:
    """A thread each. All connect first, then all send; the clock starts when the last has connected, or failed to."""
    requests = [Request() for _ in prompts]
    started: list[float] = []
    barrier = threading.Barrier(len(prompts), action=lambda: started.append(time.perf_counter()))

    def work(request: Request, prompt: list[int]) -> None:
        connection = None
        try:
            connection = Connection(url, timeout)
        except OSError as error:
            request.error = f"cannot connect to {url}: {error}"
        barrier.wait()
        if connection:
            with contextlib.closing(connection):
                try:
                    _stream(connection, api, prompt, request, started[0])
                except Exception as error:  # whatever it is, the others' figures are worth having
                    request.error = str(error) or type(error).__name__

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(requests, prompts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return requests


def _stream(connection: Connection, api: _Api, prompt: list[int], request: Request, start: float) -> None:
    with connection.request("POST", api.path, json.dumps(api.body(prompt)).encode()) as response:
        kind = response.getheader("Content-Type", "")
        if response.status != 200:
            raise ValueError(
                f"HTTP status {response.status}: {_beginning(response.read(1000).decode(errors='replace'))}"
            )
        if "text/event-stream" not in kind:
            raise ValueError(f"answered with {kind or 'no content type'} instead of a stream of events")
        for data in events(response):
            if data == "[DONE]":
                break
            now = time.perf_counter() - start
            if _read(api, data, request):
                request.times.append(now)
        else:
            connection.check()
            raise ValueError(f"the stream ended without [DONE], after {request.tokens} tokens")
        if not request.times:
            raise ValueError("the stream brought no tokens")


def _read(api: _Api, data: str, request: Request) -> bool:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ValueError(f"an event is not JSON: {_beginning(data)}") from error
    try:
        if "error" in event:
            raise ValueError(f"the server reports an error: {_beginning(json.dumps(event['error']))}")
        return api.read(event, request)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an event is not as expected ({error!r}): {_beginning(data)}") from error


def _beginning(text: str) -> str:
    return text[:200].replace("\n", " ")
