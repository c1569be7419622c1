"""A judge behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, OpenAI's own).

    judge = Judge("http://localhost:8000/v1", "Qwen3-32B", key=os.environ.get("OPENAI_API_KEY"))
    for name, reply in replies(judge, {"a.jpg": prompt}):        # as they come, in any order
        reply.text                                               # what it said, or None
        reply.tried                                              # every try: what came instead

Only the standard library is needed. `at_once` requests are under way at the same time. What may
pass (a full server, a slow one, an answer that is no JSON) is tried again after a pause, at most
`tries` times; then the reply has no text. Nor has that of a request that the server refuses, e.g.
because it is too long. A server that refuses for good (a wrong key, no such model) ends everything
with one line, and so does one that has not answered HOPELESS requests in a row.

Follows OpenAI's chat completions: POST to /chat/completions, `choices[0].message.content`.
"""
import contextlib
import http.client
import json
import os
import queue
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from support.common import InputError

REFUSALS = {401: "mend the key in the environment variable OPENAI_API_KEY",
            403: "the key may not use this model", 404: "mend --judge_url or --judge_model"}
PASSING = 408, 409, 425, 429      # refusals that may pass, beside those from 500 on
HOPELESS = 5            # requests in a row without an answer: the server is given up


class Refused(Exception):
    """The server will never answer this request, e.g. because it is too long."""


@dataclass(frozen=True)
class Judge:
    """Whom to ask, and how patiently."""
    url: str                        # up to and with /v1
    model: str
    key: str = None
    temperature: float = 0.0
    max_tokens: int = 2048
    timeout: float = 300.0          # seconds, for one answer
    tries: int = 4
    pause: float = 2.0              # seconds, doubled from try to try
    at_once: int = 8


@dataclass
class Reply:
    """What came of one request."""
    text: str = None                                # None: no try was answered
    tried: list = field(default_factory=list)       # what went wrong in the tries before
    refused: bool = False                           # this request will never be answered


def post(judge, prompt):
    """One try → the reply's text.

    Raises InputError where no request will be answered, Refused where this one never will be, and
    OSError or ValueError where another try may help.
    """
    body = {"model": judge.model, "messages": [{"role": "user", "content": prompt}],
            "temperature": judge.temperature, "max_tokens": judge.max_tokens}
    headers = {"Content-Type": "application/json"}
    if judge.key:
        headers["Authorization"] = f"Bearer {judge.key}"
    url = judge.url.rstrip("/") + "/chat/completions"
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with opener(judge.url).open(request, timeout=judge.timeout) as response:
            said = response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as e:
        said = " ".join(e.read().decode("utf-8", "replace").split())
        if e.code in REFUSALS:
            raise InputError(f"--judge_url {judge.url}: HTTP {e.code}: {said[:300]}; "
                             f"{REFUSALS[e.code]}") from e
        kind = OSError if e.code in PASSING or e.code >= 500 else Refused
        raise kind(f"HTTP {e.code}: {said}") from e
    except http.client.HTTPException as e:
        raise OSError(f"the answer broke off ({e!r})") from e
    try:
        text = json.loads(said)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise ValueError(f"no chat completion: {said}") from e
    if not isinstance(text, str):
        raise ValueError(f"no text in the completion: {said}")
    return text


def opener(url):
    """A server on this machine is asked directly, another one through the proxy that is set."""
    local = any(f"//{name}" in url for name in ("localhost", "127.", "[::1]"))
    return urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None))


def ask(judge, prompt, stop):
    """All tries of one request → Reply. Nothing more is tried once `stop` (an Event) is set."""
    reply = Reply()
    for n in range(judge.tries):
        if stop.is_set() or n and stop.wait(judge.pause * 2 ** (n - 1)):
            break
        try:
            reply.text = post(judge, prompt)
            break
        except Refused as e:
            reply.tried.append(str(e))
            reply.refused = True
            break
        except (OSError, ValueError) as e:
            reply.tried.append(str(getattr(e, "reason", e)) or type(e).__name__)
    return reply


def replies(judge, prompts):
    """Ask about every prompt of {name: prompt} → (name, Reply), as they come.

    InputError where the server refuses for good or answers no more. What came before has been given
    out by then, so it can be kept. The threads die with the program, so that Ctrl-C ends it at once
    and not after the slowest answer.
    """
    todo, done, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    for item in prompts.items():
        todo.put(item)

    def work():
        while not stop.is_set() and not todo.empty():
            with contextlib.suppress(queue.Empty):
                name, prompt = todo.get_nowait()
                try:
                    done.put((name, ask(judge, prompt, stop)))
                except Exception as e:              # to be raised where the replies are read
                    done.put((name, e))

    for _ in range(min(judge.at_once, len(prompts))):
        threading.Thread(target=work, daemon=True).start()
    silent = 0                                      # in a row
    try:
        for _ in prompts:
            name, reply = done.get()
            if isinstance(reply, Exception):
                raise reply
            silent = silent + 1 if reply.text is None and not reply.refused else 0
            if silent == HOPELESS:
                raise InputError(f"--judge_url {judge.url}: answers nothing "
                                 f"({reply.tried[-1][:300]}); start the server, or mend the "
                                 "address or --judge_model; the same command goes on")
            yield name, reply
    finally:
        stop.set()


def judge_of(args):
    """The Judge of the flags; its key is in the environment and never on the command line."""
    if not args.judge_url or not args.judge_model:
        raise InputError("name the judge: --judge_url http://localhost:8000/v1 --judge_model NAME "
                         "(or --judge truth, in the tiny world)")
    if not args.judge_url.startswith(("http://", "https://")):
        raise InputError(f"--judge_url {args.judge_url}: must begin with http:// or https://")
    return Judge(args.judge_url, args.judge_model, os.environ.get("OPENAI_API_KEY"),
                 timeout=args.judge_timeout, at_once=args.judge_at_once)
