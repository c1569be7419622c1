"""A server that stands in for a judge: OpenAI-compatible, as good or bad as a test wants.

    with StandIn(lambda prompt, n: "1. correct: yes") as server:    # n: how often it was asked this
        Judge(server.url, "model")
        server.asked                                                # prompts, in their order

What the function returns is the reply; a Misbehaviour is done instead.
"""
import json
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Misbehaviour:
    status: int = 200
    body: str = None                 # sent as it is
    cut: bool = False                # the connection closes in the middle of the body
    silent: bool = False             # nothing is sent until the server ends


class StandIn:
    def __init__(self, reply):
        self.reply, self.asked, self.keys, self.models = reply, [], [], []
        self.lock, self.ended, self.count = threading.Lock(), threading.Event(), Counter()

    def __enter__(self):
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                stand_in.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.lock:
            self.asked.append(prompt)
            self.keys.append(request.headers.get("Authorization"))
            self.models.append(body["model"])
            self.count[prompt] += 1
            n = self.count[prompt]
        if request.path != "/v1/chat/completions":
            return send(request, Misbehaviour(404, "no such path"))
        said = self.reply(prompt, n)
        if isinstance(said, str):
            said = Misbehaviour(body=json.dumps({"choices": [{"message": {"content": said}}]}))
        if said.silent:
            self.ended.wait()
            return None
        return send(request, said)


def send(request, said):
    data = (said.body or "").encode()
    request.send_response(said.status)
    request.send_header("Content-Length", str(len(data) + 100 * said.cut))
    request.end_headers()
    request.wfile.write(data)
