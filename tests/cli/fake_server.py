"""Stands in for SGLang in the demo's tests: a child process that ignores SIGTERM, and just enough of the OpenAI API."""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHILD = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', flush=True); time.sleep(600)"
)
FIGURES = {
    "pages_backed": 12,
    "pages_shared": 4,
    "driver_calls": {"create": 12, "map": 20, "unmap": 0, "release": 0},
    "backed_bytes": 12 * 23040,
    "stock_bytes": 4 << 30,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(0.05)
        self._send("application/json", json.dumps({"internal_states": [{"vtensor": FIGURES}]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        words = f"[answer] {len(asked['messages'])}"
        events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in words.split()]
        usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
        events.append({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 64}}})
        lines = [f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', **event})}\n\n" for event in events]
        self._send("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

    def _send(self, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    if "--fail" in sys.argv:
        sys.exit("unrecognized arguments: --enable-vtensor")
    subprocess.Popen([sys.executable, "-c", CHILD])
    port = int(sys.argv[len(sys.argv) - sys.argv[::-1].index("--port")])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
