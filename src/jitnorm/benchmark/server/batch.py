"""Send one batch of streamed completions, and record when each token arrived and which requests failed."""

from __future__ import annotations

import contextlib
import json
import operator
import random
import ssl
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from jitnorm.benchmark.results import quantile
from jitnorm.benchmark.server.client import (
    Connection,
    Deadline,
    check_url,
    get_cache_tokens_from_metrics,
    iterate_events,
    one_line,
    read_body,
)

_PROMPT_IDS = [*range(1000, 10000)]  # in every vocabulary, and no special tokens
MAX_BATCH = 4096  # requests; each takes a thread
MAX_TOKENS = 1 << 24  # in all prompts together, and in one completion
MAX_SECONDS = 604800.0


@dataclass
class Request:
    """The outcome of one request of the batch. Times are in seconds since the batch was sent."""

    times: list[float] = field(default_factory=list)  # of each event with tokens
    tokens: int = 0
    error: str | None = None

    @property
    def inter_token(self) -> float | None:
        """Return the mean seconds between tokens; None for fewer than two. An event may contain several tokens."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass
class BatchResult:
    """The outcome of the batch; a failed request keeps the tokens that arrived before its failure."""

    input_len: int
    output_len: int
    requests: list[Request]
    cache_hit_rate: float | None  # the fraction of prompt tokens; None where the server does not report it

    @property
    def errors(self) -> list[str]:
        """Return the errors of the requests that failed."""
        return [request.error for request in self.requests if request.error]

    def as_dict(self) -> dict[str, Any]:
        """Return all statistics as plain data: times in seconds, None for what is unknown."""
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
        """Return the statistics and the failures as lines for a terminal."""
        facts = self.as_dict()

        def show(name: str, factor: float = 1.0, unit: str = "", digits: int = 1) -> str:
            return "unknown" if facts[name] is None else f"{facts[name] * factor:.{digits}f}{unit}"

        head = (
            f"batch of {facts['batch_size']}, {self.input_len} tokens in, {self.output_len} out: "
            f"{facts['completed']} completed"
        )
        statistics_lines = [
            f"seconds               {show('seconds', 1, '', 3)} until the last token",
            f"time to first token   {show('time_to_first_token', 1e3, ' ms')} median, "
            f"{show('time_to_first_token_max', 1e3, ' ms')} at most",
            f"inter-token latency   {show('inter_token_latency', 1e3, ' ms', 2)} median over requests; "
            f"between events {show('event_gap_p99', 1e3, ' ms', 2)} at the 99th percentile",
            f"throughput            {show('output_tokens_per_second')} tokens/s out, "
            f"{show('input_tokens_per_second')} tokens/s in until the last first token",
            f"cache hit rate        {show('cache_hit_rate', 100, '%')}",
        ]
        lines = [head, *(statistics_lines if facts["completed"] else [])]
        remarks: dict[str, list[int]] = {}  # and the indices of their requests
        for i, request in enumerate(self.requests):
            if request.error:
                remarks.setdefault(f"failed after {request.tokens} tokens: {request.error}", []).append(i)
            elif request.tokens != self.output_len:
                remarks.setdefault(f"returned {request.tokens} tokens instead of {self.output_len}", []).append(i)
        for remark, indices in remarks.items():
            lines.append(f"{f'request {indices[0]}' if len(indices) == 1 else f'{len(indices)} requests'} {remark}")
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
    """Send `batch_size` requests at once, and read their streams to the end or for `timeout` seconds.

    The error of a request that fails is in its `error`. The server's metrics are read before and after the batch, each
    for at most 5 seconds.

    Args:
        url: the server, such as `http://localhost:30000`.
        api: "openai" (`/v1/completions`) or "sglang" (`/generate`).
        model: the model name of the OpenAI protocol.
        batch_size: the number of requests, at most 4096.
        input_len: random token ids in a prompt; all prompts together have at most 2^24.
        output_len: tokens to generate for each request, at most 2^24.
        timeout: seconds for the whole batch, at most a week.
        seed: makes the prompts the same in each call, so that the server's cache hits; None for new ones each time.

    Raises:
        ValueError: an argument is outside its limits.
        TypeError: a number of requests or tokens is not an int.
    """
    if api not in _APIS:
        raise ValueError(f"api must be one of {', '.join(_APIS)}, got {api!r}")
    batch_size = _check_count("batch_size", batch_size, MAX_BATCH)
    input_len = _check_count("input_len", input_len, MAX_TOKENS)
    output_len = _check_count("output_len", output_len, MAX_TOKENS)
    if batch_size * input_len > MAX_TOKENS:
        raise ValueError(f"batch_size * input_len must be {MAX_TOKENS} at most, got {batch_size * input_len}")
    if not 0 < timeout <= MAX_SECONDS:  # NaN is neither
        raise ValueError(f"timeout must be above 0 seconds and {MAX_SECONDS:.0f} at most, got {timeout}")
    check_url(url)
    choose = random.Random(seed)
    prompts = [choose.choices(_PROMPT_IDS, k=input_len) for _ in range(batch_size)]
    before = get_cache_tokens_from_metrics(url)
    requests = _send(url, _APIS[api](model, output_len), prompts, timeout)
    after = get_cache_tokens_from_metrics(url) if before else None
    return BatchResult(input_len, output_len, requests, _hit_rate(before, after))


def _check_count(name: str, value: Any, maximum: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if not 1 <= number <= maximum:
        raise ValueError(f"{name} must be from 1 to {maximum}, got {_format_int(number)}")
    return number


def _hit_rate(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """Return the hit rate between two readings; None where they are inconsistent, as after a restart of the server."""
    if not before or not after or not after[1] > before[1]:
        return None
    rate = (after[0] - before[0]) / (after[1] - before[1])
    return rate if 0 <= rate <= 1 else None


@dataclass(frozen=True)
class _Api:
    path: str
    body: Callable[[list[int]], dict[str, Any]]
    read: Callable[[dict[str, Any], Request], bool]  # counts an event's tokens; returns whether it has any
    max_events: int  # events with tokens: one for each token, and some that report the end


def _openai(model: str, output_len: int) -> _Api:
    common = {"model": model, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
    common |= {"stream": True, "stream_options": {"include_usage": True}}

    def read(event: dict[str, Any], request: Request) -> bool:
        has_tokens = bool(event["choices"])
        request.tokens += has_tokens
        if event.get("usage"):
            request.tokens = _check_tokens(event["usage"]["completion_tokens"])
        return has_tokens

    return _Api("/v1/completions", lambda ids: {"prompt": ids, **common}, read, 2 * output_len + 16)


def _sglang(model: str, output_len: int) -> _Api:
    sampling = {"max_new_tokens": output_len, "temperature": 0, "ignore_eos": True}

    def read(event: dict[str, Any], request: Request) -> bool:
        before, request.tokens = request.tokens, _check_tokens(event["meta_info"]["completion_tokens"])
        return request.tokens > before

    def body(ids: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "sampling_params": sampling, "stream": True}

    return _Api("/generate", body, read, 2 * output_len + 16)


def _check_tokens(value: Any) -> int:
    """Return a number of tokens sent by a server; raise ValueError unless it is plausible."""
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        shown = _format_int(value) if type(value) is int else repr(value)
        raise ValueError(f"completion_tokens must be a whole number from 0 to {MAX_TOKENS}, got {one_line(shown)}")
    return value


def _format_int(number: int) -> str:
    """Return `number` as text, which `str` refuses for thousands of digits."""
    return str(number) if abs(number) < 10**20 else f"{'-' * (number < 0)}2^{number.bit_length() - 1} or more"


_APIS = {"openai": _openai, "sglang": _sglang}


def _send(url: str, api: _Api, prompts: list[list[int]], timeout: float) -> list[Request]:
    """Send each prompt in a thread of its own; return the outcomes, at the deadline at the latest.

    All threads connect before any sends. The clock starts when the last one has connected or failed to.
    """
    requests = [Request() for _ in prompts]
    deadline = Deadline(timeout)
    ssl_context = ssl.create_default_context() if check_url(url).scheme == "https" else None
    connected, go = threading.Semaphore(0), threading.Event()
    start = 0.0

    def wait_for_the_others() -> None:
        connected.release()
        go.wait()

    def work(request: Request, prompt: list[int]) -> None:
        try:
            connection = Connection(url, deadline, ssl_context)
            with (
                contextlib.closing(connection),
                connection.request("POST", api.path, api.body(prompt), wait_for_the_others) as response,
            ):
                _read_stream(response, api, request, start)
        except Exception as error:  # of any kind: the other requests are still worth measuring
            request.error = one_line(str(error) or type(error).__name__)
        finally:
            connected.release()  # for a request that did not connect; for others nobody waits any more

    threads: dict[threading.Thread, int] = {}
    try:
        for i, pair in enumerate(zip(requests, prompts, strict=True)):
            thread = threading.Thread(target=work, args=pair, daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:  # the limit on processes is reached
                requests[i].error = f"cannot start its thread: {error}"
            else:
                threads[thread] = i
        for _ in threads:
            connected.acquire(timeout=deadline.left())
        start = time.perf_counter()
        go.set()
        deadline.wait(threads)
    finally:  # after Ctrl-C too, no thread keeps waiting
        deadline.cut()
        go.set()
    for thread, i in threads.items():
        if thread.is_alive():  # it is resolving a host name, which cannot be interrupted; its outcome is ignored
            requests[i] = Request(error=deadline.message)
    return requests


def _read_stream(response: httpx.Response, api: _Api, request: Request, start: float) -> None:
    """Record the events of a stream in `request`; raise ValueError unless it is complete."""
    content_type = response.headers.get("Content-Type", "")
    if response.status_code != 200:
        body = one_line(read_body(response, 1000).decode(errors="replace"))
        raise ValueError(f"HTTP status {response.status_code}: {body}")
    if "text/event-stream" not in content_type:
        raise ValueError(f"answered with {content_type or 'no content type'} instead of a stream of events")
    try:
        for data in iterate_events(response):
            if data == "[DONE]":
                break
            now = time.perf_counter() - start
            if _count_tokens(api, data, request):
                request.times.append(now)
                if len(request.times) > api.max_events:
                    raise ValueError(f"the stream went on after {len(request.times)} events with tokens")
        else:
            raise ValueError(f"the stream ended without [DONE], after {request.tokens} tokens")
    except httpx.RemoteProtocolError as error:
        raise ValueError(f"the stream ended without [DONE], after {request.tokens} tokens: {error}") from error
    if not request.times:
        raise ValueError("the stream had no tokens")


def _count_tokens(api: _Api, data: str, request: Request) -> bool:
    """Add the tokens of an event to `request`; return whether it has any."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"an event is not JSON: {one_line(data)}") from error
    try:
        if "error" in event:
            raise ValueError(f"the server reports an error: {one_line(json.dumps(event['error']))}")
        return api.read(event, request)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an event is not as expected ({error!r}): {one_line(data)}") from error
