"""A server for test_engines.py: answers as `vllm serve` does, as far as the script asks. Arguments: port, behaviour."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and body["model"] == "model" and len(body["prompt"]) == 7
        tokens = body["max_tokens"] - (sys.argv[2] == "short")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        events = [{"choices": [{"text": "w1"}]}] * tokens
        events.append({"choices": [], "usage": {"completion_tokens": tokens}})
        for event in (*map(json.dumps, events), "[DONE]"):
            self.wfile.write(f"data: {event}\n\n".encode())


if sys.argv[2] == "fails":
    raise SystemExit("no such option")
if sys.argv[2] != "silent":
    count = 0 if sys.argv[2] == "nothing" else 3
    print(f"jitnorm: jitnorm's plugin in vLLM, Tiny: replaced {count} modules, left 0", flush=True)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
