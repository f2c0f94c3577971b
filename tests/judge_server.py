"""A judge for tests: a local server that speaks OpenAI's chat completions, judges by comparing words, and can misbehave.

with JudgeServer(faults=["429", "500", None]) as server:
    OpenAIJudge("judge", server.url)
"""

import html
import json
import re
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from video_panda.evaluation.text_scores import normalise_answer

# What a reply may look like that is no verdict.
GARBAGE = [
    "",
    "I cannot tell.",
    '{"verdict": "maybe", "score": 3}',
    '{"verdict": "yes", "score": 11}',
    '{"verdict": "yes", "score": -1}',
    '{"verdict": "yes"',
    '[{"verdict": "yes", "score": 5}]',
    '{"verdict": "yes", "score": "__import__(\'os\').abort()"}',
]


class JudgeServer:
    """Serves on a free port of this machine.

    Args:
        faults: what goes wrong at each request, in order; None: nothing. After the last one nothing does.
        model: the id it knows; another one is not found.
        is_down: whether every request fails.

    Attributes:
        requests: the bodies that came, as JSON.
        url: of the server.
    """

    def __init__(self, faults: Iterable[str | None] = (), model: str = "judge", is_down: bool = False):
        self.requests: list[dict] = []
        self.model, self.is_down = model, is_down
        self._faults = iter(faults)
        self._lock = threading.Lock()
        own = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                own.answer(self, body)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        """One request, with the next fault."""
        with self._lock:
            self.requests.append(body)
            fault = "500" if self.is_down else next(self._faults, None)
        if handler.path != "/v1/chat/completions" or body["model"] != self.model:
            _send(handler, 404, {"error": {"message": f"no model {body['model']}"}})
        elif fault in ("400", "401", "429", "500"):
            _send(handler, int(fault), {"error": {"message": f"fault {fault}"}})
        elif fault == "close":
            handler.close_connection = True
            handler.connection.close()
        elif fault == "timeout":
            time.sleep(1.5)
            handler.close_connection = True
        elif fault == "no json":
            _send(handler, 200, b"<html>busy</html>")
        elif fault == "no completion":
            _send(handler, 200, {"choices": []})
        else:
            reply = _verdict(body["messages"]) if fault in (None, "fenced") else fault.removeprefix("reply ")
            reply = f"```json\n{reply}\n```" if fault == "fenced" else reply
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": f"{self.model}-2026"}
            _send(handler, 200, {**completion, "choices": [choice]})


def _verdict(messages: list[dict]) -> str:
    """Yes and 5, or no and 1, by the words between the tags."""
    text = messages[-1]["content"]
    (truth,) = re.findall("<reference>(.*?)</reference>", text, re.DOTALL)
    answers = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
    is_right = all(normalise_answer(html.unescape(own)) == normalise_answer(html.unescape(truth)) for own in answers)
    score = 5 if is_right else 1
    if "verdict" not in messages[0]["content"]:
        return json.dumps({"score": score})
    return json.dumps({"verdict": "yes" if is_right else "no", "score": score})


def _send(handler: BaseHTTPRequestHandler, status: int, body: dict | bytes) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    # The client waits as long as it is told before it tries again.
    handler.send_header("Retry-After-Ms", "5")
    handler.end_headers()
    handler.wfile.write(content)
