"""bench/peer_server.py against a stand-in server on loopback: what is asked, what is said of the
answers, and what is told where something is wrong.

The stand-in answers by image and question, as `answers` says, and keeps what it was asked.
"""
import base64
import glob
import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import url2pathname

import pytest
from conftest import load_json
from programs import free_port, succeeds

from bench import peer_server
from checkpoints.load import Source, load_all
from eval_pope import ask, open_prompts, read_pope, score, table
from support.common import InputError
from support.templates import SYSTEM_HADPO_EVAL

ANSWER = {"choices": [{"message": {"content": "Yes"}}]}


class StandIn(BaseHTTPRequestHandler):
    """What it is asked and how it answers stand in its server."""

    def reply(self, value, status=200):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply(self.server.models)

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            number = len(self.server.bodies)
        self.reply(*self.server.answer(body, number))

    def log_message(self, *args):
        pass


def asked_of(body):
    """(bytes of the image, kind of the image, text of the question) of a request."""
    image, text = body["messages"][1]["content"]
    kind, data = image["image_url"]["url"].split(";base64,")
    return base64.b64decode(data), kind, text["text"]


@pytest.fixture
def server(monkeypatch):
    """A stand-in that says yes to everything. A proxy that is not there must not be asked."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)     # 64 knock at once
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.models, server.bodies = {"data": [{"id": "stand-in"}]}, []
    server.lock, server.answer = threading.Lock(), lambda body, number: (ANSWER,)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(world, tmp_path, capsys):
    """Type a command line about the session's base and POPE files → what is printed."""
    def run(*flags, checkpoints=(world.base,)):
        capsys.readouterr()
        command = [*checkpoints, "--coco_path", world.coco, "--pope_path", world.pope,
                   "--output_dir", tmp_path / "out", "--no-bf16", "--max_new_tokens", 4, *flags]
        peer_server.main(list(map(str, command)))
        return capsys.readouterr().out
    return run


@pytest.fixture(scope="module")
def splits(world):
    return {split: read_pope(world.pope, split) for split in ("random", "popular", "adversarial")}


@pytest.fixture(scope="module")
def distinct(splits):
    """What must be asked, in which order."""
    return sorted({(q["image"], q["text"]) for rows in splits.values() for q in rows})


@pytest.fixture(scope="module")
def files(world):
    """{bytes of an image: its name}. No two images are alike."""
    paths = glob.glob(os.path.join(world.coco, "val2014", "*"))
    names = {}
    for path in paths:
        with open(path, "rb") as file:
            names[file.read()] = os.path.basename(path)
    assert len(names) == len(paths) > 10
    return names


def lines_of(said):
    """Markdown tables → {first cell: [the other cells]} of the first table that has such a line."""
    rows = {}
    for line in said.splitlines():
        if line.startswith("| "):
            first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(first, rest)
    return rows


# ---- What is asked -------------------------------------------------------------------------------


def test_the_questions_of_eval_pope_about_the_same_files(server, run, distinct, files):
    """Each once, an image's together, behind a warm-up about a picture that is none of them."""
    run("--server", server.url, "--concurrency", 1)
    asked = [asked_of(body) for body in server.bodies]
    assert asked[0][0] not in files and asked[0][1] == "data:image/jpeg"
    assert [(files[image], text) for image, _, text in asked[1:]] == distinct
    kinds = {"jpg": "data:image/jpeg", "png": "data:image/png"}
    assert all(kind == kinds[files[image].split(".")[-1]] for image, kind, _ in asked[1:])
    for body in server.bodies:
        system, user = body["messages"]
        assert (system["role"], user["role"]) == ("system", "user")
        assert system["content"] == [{"type": "text", "text": SYSTEM_HADPO_EVAL}]
        assert [part["type"] for part in user["content"]] == ["image_url", "text"]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("stand-in", 0, 4)


def test_images_as_paths(server, run, world, distinct):
    run("--server", server.url, "--concurrency", 1, "--send_paths")
    paths = [body["messages"][1]["content"][0]["image_url"]["url"] for body in server.bodies[1:]]
    folder = Path(world.coco, "val2014").absolute()
    assert [url2pathname(path.removeprefix("file://")) for path in paths] == [
        str(folder / image) for image, _ in distinct]
    assert all(path.startswith("file:///") for path in paths)


def test_the_other_protocol(server, run, distinct):
    run("--server", server.url + "/v1/", "--protocol", "llava", "--set", "random")
    texts = {asked_of(body)[2] for body in server.bodies}
    suffix = "\nAnswer the question using a single word or phrase."
    assert all(text.endswith(suffix) for text in texts)
    assert {text.removesuffix(suffix) for text in texts} <= {text for _, text in distinct}
    assert "curious user" in server.bodies[0]["messages"][0]["content"][0]["text"]


def test_as_many_at_once_as_it_should(server, run, distinct):
    """Three wait for each other, so they are there together; a fourth would be counted."""
    meeting, inside, most = threading.Barrier(3, timeout=60), set(), []

    def answer(body, number):
        with server.lock:
            inside.add(number)
            most.append(len(inside))
        if number <= 3:
            meeting.wait()
        with server.lock:
            inside.remove(number)
        return (ANSWER,)

    server.answer = answer
    run("--server", server.url, "--concurrency", 3)
    assert max(most) == 3 and len(server.bodies) == 3 + len(distinct)


# ---- What is said of it --------------------------------------------------------------------------


def test_scores_and_tokens(server, run, splits, files, tmp_path):
    """POPE's numbers of answers that the stand-in makes up."""
    def invented(text):
        return "No, it is not." if len(text) % 3 else "Yes, it is."

    def answer(body, number):
        image, _, text = asked_of(body)
        value = {"choices": [{"message": {"content": " " + invented(text)}}],
                 "usage": {"prompt_tokens": 650 if image in files else 10 ** 9}}
        if len(text) % 2:                                           # else nothing was cached
            value["usage"]["prompt_tokens_details"] = {"cached_tokens": 520}
        return (value,)

    server.answer = answer
    said = run("--server", server.url)
    keys = {(q["image"], q["text"]) for rows in splits.values() for q in rows}
    answers = {key: invented(key[1]) for key in keys}
    numbers = {split: {"server": score(rows, answers)} for split, rows in splits.items()}
    assert table(numbers) in said
    assert 0 < numbers["random"]["server"]["yes_ratio"] < 100
    line = lines_of(said)["stand-in, 64 at once"]
    cached = 100 * 520 * sum(len(text) % 2 for _, text in keys) / (650 * len(keys))
    assert line[2:] == ["1", "650.0", f"{cached:.1f} %"]
    kept = load_json(tmp_path / "out" / "server.json")
    assert {(image, text): answer.strip() for image, text, answer in kept["answers"]} == answers
    assert line[:2] == [f"{kept['seconds']:.4g}", f"{len(keys) / kept['seconds']:.4g}"]


def test_ours_beside_it(server, run, world, distinct, files, tmp_path):
    """The stand-in says what ours says, but about every fourth question something else."""
    model = load_all(Source([world.base]), "cpu", None)
    prompts = open_prompts(model, distinct, os.path.join(world.coco, "val2014"), "hadpo")
    ours = {key: text for key, (text, _) in ask(model, prompts, 4)["base"].items()}
    other = set(distinct[::4])

    def answer(body, number):
        image, _, text = asked_of(body)
        key = files.get(image), text
        content = "No" if key in other else " " + ours.get(key, "").strip() + "\n"
        return ({"choices": [{"message": {"content": content}}]},)

    server.answer = answer
    first = run("--server", server.url)
    assert "equal answers" not in first
    server.answer = lambda body, number: ({"error": "must not be asked again"}, 500)
    said = run()
    share = 100 * (1 - len(other) / len(distinct))
    assert f"equal answers: {share:.2f} %; equal yes or no: " in said
    lines = lines_of(said)
    kept = load_json(tmp_path / "out" / "server.json")
    assert lines["stand-in, 64 at once"] == lines_of(first)["stand-in, 64 at once"]
    assert lines["stand-in, 64 at once"][3:] == ["–", "–"]             # it tells no tokens
    seconds, _, faster, tokens, cached = lines["ours, base, cpu, torch.float32"]
    assert float(faster) == pytest.approx(kept["seconds"] / float(seconds), rel=0.01)
    row, patches = prompts[1].row(0), model.config.vision.num_patches
    assert row.position[row.ends[0]] + 1 > patches and cached == "–"
    lengths = [prompts[1].row(i).position[end] + 1 for i in range(len(prompts[1]))
               for end in prompts[1].row(i).ends]
    assert tokens == f"{sum(lengths) / len(distinct):.1f}"
    assert said.count("| server |") == said.count("| ours |") == 3


def test_as_a_program(server, world, tmp_path):
    flags = ("--coco_path", world.coco, "--pope_path", world.pope, "--output_dir", tmp_path)
    said = succeeds("python", "bench/peer_server.py", world.base, "--server", server.url, *flags)
    assert f"answers and time: {tmp_path}/server.json" in said


# ---- What is wrong is told in one line -----------------------------------------------------------


def test_nobody_listens(run, tmp_path):
    with pytest.raises(InputError, match=r"http://127.0.0.1:\d+/v1/models: not reachable \(.*\); "
                                         "start the server"):
        run("--server", f"http://127.0.0.1:{free_port()}")
    for wrong in "localhost:8000", "http://", "http://a b", "http://a..b", "http://[":
        with pytest.raises(InputError, match="not reachable"):
            run("--server", wrong)


TOO_LONG = {"error": {"message": "max_tokens is\ntoo large", "code": 400}}
WRONG = {
    "an error with its message": ((TOO_LONG, 400), r"HTTP 400: .*max_tokens is\\ntoo large"),
    "an error without one": ((b"", 503), "HTTP 503: ; the server's log"),
    "no JSON": ((b"<html>\nhello",), r"no JSON with a text at .*: '<html>\\nhello'; does --server"),
    "no choices": (({"choices": []},), "at choices.0.message.content"),
    "no text": (({"choices": [{"message": {"content": None}}]},), "at choices.0.message.content"),
    "a list": (([1],), "at choices.0.message.content"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("after", (0, 10), ids=("at once", "later"))
def test_wrong_answers(server, run, distinct, tmp_path, what, after):
    """Then nothing more is asked, and no answers are kept."""
    said, message = WRONG[what]
    server.answer = lambda body, number: (ANSWER,) if number <= after else said
    with pytest.raises(InputError, match=message) as error:
        run("--server", server.url, "--concurrency", 2)
    told = str(error.value)
    assert told.startswith(f"{server.url}/v1/chat/completions: ") and "\n" not in told
    assert not glob.glob(str(tmp_path / "out" / "*"))


def test_no_http_server(run):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def speak():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(InputError, match=r"not reachable \(SSH-2.0"):
            run("--server", f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


def test_a_server_without_models(server, run):
    server.models = {"data": []}
    with pytest.raises(InputError, match="/v1/models: no JSON with a text at data.0.id"):
        run("--server", server.url)


def test_an_interruption_asks_nothing_more(server, run, distinct, files, monkeypatch, tmp_path):
    """Ctrl-C behind the third answer, while the next two may be asked: the others never are."""
    interrupted = threading.Event()

    def answer(body, number):
        image, _, text = asked_of(body)
        if image in files and (files[image], text) not in distinct[:3]:
            interrupted.wait(60)
        return (ANSWER,)

    def three(answers, *args, **kwargs):
        for _ in range(3):
            yield next(answers)
        raise KeyboardInterrupt

    server.answer = answer
    monkeypatch.setattr(peer_server, "progress", three)
    pool = peer_server.ThreadPoolExecutor(2)
    monkeypatch.setattr(peer_server, "ThreadPoolExecutor", lambda count: pool)
    with pytest.raises(KeyboardInterrupt) as error:
        run("--server", server.url, "--concurrency", 2)
    interrupted.set()
    pool.shutdown(wait=True)
    del error           # it has kept all frames alive, as a program's last error does
    assert len(server.bodies) <= 2 + 3 + 2 < len(distinct)                  # 2: the warm-up
    assert not glob.glob(str(tmp_path / "out" / "*"))


def test_an_image_is_missing(server, run, world, tmp_path):
    os.makedirs(tmp_path / "coco" / "val2014")
    with pytest.raises(InputError, match="12 images missing or unreadable"):
        run("--server", server.url, "--coco_path", tmp_path / "coco")
    assert server.bodies == []


def test_ours_needs_answers_to_the_same_questions(server, run):
    with pytest.raises(InputError, match="server.json: holds no server's answers .*--server URL"):
        run()
    run("--server", server.url)
    for flags in ("--protocol", "llava"), ("--max_new_tokens", 5), ("--set", "random"):
        with pytest.raises(InputError, match="holds no server's answers"):
            run(*flags)


def test_two_checkpoints(server, run, world, tmp_path):
    other = tmp_path / "other"
    os.symlink(world.base, other)
    with pytest.raises(InputError, match="name one; a server has one model"):
        run("--server", server.url, checkpoints=(world.base, other))
