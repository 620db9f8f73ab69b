"""One batch of streamed completions: when each token came, and what went wrong."""

from __future__ import annotations

import contextlib
import json
import operator
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from jitnorm.benchmark.server.client import Connection, Deadline, events, one_line, split
from jitnorm.benchmark.server.metrics import get_cache_tokens_from_metrics
from jitnorm.benchmark.stats import quantile

_TOKENS = [*range(1000, 10000)]  # ids that every vocabulary has, and that are no special ones
MAX_BATCH = 4096  # requests, of which each takes a thread
MAX_TOKENS = 1 << 24  # of all prompts, and of an answer
MAX_SECONDS = 604800.0


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
    `error`. The server's metrics are read before and after, for 5 seconds at most each.

    Raises:
        ValueError: an argument that is not accepted: `batch_size` is at most 4096, `output_len` and all prompts
            together are at most 2^24 tokens, `timeout` is at most a week.
        TypeError: a number is of another type.
    """
    if api not in _APIS:
        raise ValueError(f"api must be one of {', '.join(_APIS)}, got {api!r}")
    batch_size = _whole("batch_size", batch_size, MAX_BATCH)
    input_len = _whole("input_len", input_len, MAX_TOKENS)
    output_len = _whole("output_len", output_len, MAX_TOKENS)
    if batch_size * input_len > MAX_TOKENS:
        raise ValueError(f"batch_size * input_len must be {MAX_TOKENS} at most, got {batch_size * input_len}")
    if not 0 < timeout <= MAX_SECONDS:  # NaN is neither
        raise ValueError(f"timeout must be above 0 seconds and {MAX_SECONDS:.0f} at most, got {timeout}")
    split(url)
    choose = random.Random(seed)
    prompts = [choose.choices(_TOKENS, k=input_len) for _ in range(batch_size)]
    before = get_cache_tokens_from_metrics(url)
    requests = _send(url, _APIS[api](model, output_len), prompts, timeout)
    after = get_cache_tokens_from_metrics(url) if before else None
    return BatchResult(input_len, output_len, requests, _hit_rate(before, after))


def _whole(name: str, value: Any, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if not 1 <= number <= most:
        raise ValueError(f"{name} must be from 1 to {most}, got {_digits(number)}")
    return number


def _hit_rate(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """Of the prompts' tokens between two readings; None where they tell none, as after a restart of the server."""
    if not before or not after or not after[1] > before[1]:
        return None
    rate = (after[0] - before[0]) / (after[1] - before[1])
    return rate if 0 <= rate <= 1 else None


@dataclass(frozen=True)
class _Api:
    path: str
    body: Callable[[list[int]], dict[str, Any]]
    read: Callable[[dict[str, Any], Request], bool]  # counts the event's tokens; whether it brought any
    max_events: int  # that bring tokens: one for each token, and some that say how it ended


def _openai(model: str, output_len: int) -> _Api:
    common = {"model": model, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
    common |= {"stream": True, "stream_options": {"include_usage": True}}

    def read(event: dict[str, Any], request: Request) -> bool:
        brought = bool(event["choices"])
        request.tokens += brought
        if event.get("usage"):
            request.tokens = _count(event["usage"]["completion_tokens"])
        return brought

    return _Api("/v1/completions", lambda ids: {"prompt": ids, **common}, read, 2 * output_len + 16)


def _sglang(model: str, output_len: int) -> _Api:
    sampling = {"max_new_tokens": output_len, "temperature": 0, "ignore_eos": True}

    def read(event: dict[str, Any], request: Request) -> bool:
        before, request.tokens = request.tokens, _count(event["meta_info"]["completion_tokens"])
        return request.tokens > before

    def body(ids: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "sampling_params": sampling, "stream": True}

    return _Api("/generate", body, read, 2 * output_len + 16)


def _count(value: Any) -> int:
    """Check a number of tokens that a server sent."""
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        shown = _digits(value) if type(value) is int else repr(value)
        raise ValueError(f"completion_tokens must be a whole number from 0 to {MAX_TOKENS}, got {one_line(shown)}")
    return value


def _digits(number: int) -> str:
    """As text, which Python refuses to make of an int with thousands of digits."""
    return str(number) if abs(number) < 10**20 else f"{'-' * (number < 0)}2^{number.bit_length() - 1} or more"


_APIS = {"openai": _openai, "sglang": _sglang}


def _send(url: str, api: _Api, prompts: list[list[int]], timeout: float) -> list[Request]:
    """A thread each. All connect first, then all send; the clock starts when the last has connected, or failed to."""
    requests = [Request() for _ in prompts]
    deadline = Deadline(timeout)
    connected, go = threading.Semaphore(0), threading.Event()
    start = 0.0

    def work(request: Request, prompt: list[int]) -> None:
        try:
            try:
                connection = Connection(url, deadline)
            except OSError as error:
                raise ValueError(f"cannot connect to {url}: {error}") from error
            finally:
                connected.release()
            with contextlib.closing(connection):
                go.wait()
                _stream(connection, api, prompt, request, start)
        except Exception as error:  # whatever it is, the others' figures are worth having
            request.error = one_line(str(error) or type(error).__name__)

    threads: dict[threading.Thread, int] = {}
    try:
        for i, pair in enumerate(zip(requests, prompts, strict=True)):
            thread = threading.Thread(target=work, args=pair, daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:  # the limit on processes: nobody waits for this one
                requests[i].error = f"cannot start its thread: {error}"
            else:
                threads[thread] = i
        for _ in threads:
            connected.acquire(timeout=deadline.left())
        start = time.perf_counter()
        go.set()
        deadline.wait(threads)
    finally:  # after Ctrl-C nobody is left waiting
        deadline.cut()
        go.set()
    for thread, i in threads.items():
        if thread.is_alive():  # it looks up a name, which nothing ends; what it still does is not looked at
            requests[i] = Request(error=deadline.message)
    return requests


def _stream(connection: Connection, api: _Api, prompt: list[int], request: Request, start: float) -> None:
    with connection.request("POST", api.path, json.dumps(api.body(prompt)).encode()) as response:
        kind = response.getheader("Content-Type", "")
        if response.status != 200:
            raise ValueError(f"HTTP status {response.status}: {one_line(response.read(1000).decode(errors='replace'))}")
        if "text/event-stream" not in kind:
            raise ValueError(f"answered with {kind or 'no content type'} instead of a stream of events")
        for data in events(response):
            if data == "[DONE]":
                break
            now = time.perf_counter() - start
            if _read(api, data, request):
                request.times.append(now)
                if len(request.times) > api.max_events:
                    raise ValueError(f"the stream went on after {len(request.times)} events with tokens")
        else:
            raise ValueError(f"the stream ended without [DONE], after {request.tokens} tokens")
        if not request.times:
            raise ValueError("the stream brought no tokens")


def _read(api: _Api, data: str, request: Request) -> bool:
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
