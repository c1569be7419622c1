"""A Hugging Face hub on loopback, and its cache on disk, made by hand.

    with StandIn({"owner/model": folder}) as hub:
        done = hub.run("-m", "tools.merge", "owner/model", "whole")     # a program of ours
        hub.asked                       # what it asked for: ["GET /api/models/owner/model", …]
        hub.uploaded                    # {"me/new": {path: bytes}}

Only the requests that huggingface_hub makes of us are answered.
"""
import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

from programs import ROOT, run_forked

# Of this process, which a program of ours must not inherit.
OWN_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE",
                 "HF_TOKEN", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                 "DS_ACCELERATOR")


def commit_of(name):
    return hashlib.sha1(name.encode()).hexdigest()


def files_in(folder):
    return sorted(os.path.relpath(os.path.join(place, name), folder)
                  for place, _, names in os.walk(folder, followlinks=True) for name in names)


def fill_cache(cache, name, folder):
    """What huggingface_hub leaves after a download → the snapshot's folder."""
    place = os.path.join(cache, f"models--{name.replace('/', '--')}")
    snapshot = os.path.join(place, "snapshots", commit_of(name))
    os.makedirs(os.path.join(place, "refs"))
    with open(os.path.join(place, "refs", "main"), "w") as file:
        file.write(commit_of(name))
    for path in files_in(folder):
        os.makedirs(os.path.dirname(os.path.join(snapshot, path)), exist_ok=True)
        os.symlink(os.path.join(os.path.abspath(folder), path), os.path.join(snapshot, path))
    return snapshot


class StandIn:
    """`repositories`: {"owner/name": folder}. `cache`: a folder for huggingface_hub's."""

    def __init__(self, repositories, cache):
        self.repositories, self.cache, self.asked, self.uploaded = repositories, cache, [], {}
        self.refuses = False            # whatever somebody would write

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.server.stand_in = self
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def run(self, *command, cwd, **variables):
        """Type `python` and a command in a folder → what subprocess.run returns."""
        environment = {name: value for name, value in os.environ.items()
                       if name not in OWN_VARIABLES}
        environment |= {"HF_ENDPOINT": self.address, "HF_HUB_CACHE": str(self.cache),
                        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1",
                        **variables}
        return run_forked(command, cwd, environment, (), b"")


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer(404, {"error": code}, X_Error_Code=code)

    def do_GET(self):
        hub, path = self.server.stand_in, unquote(urlparse(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in hub.repositories:
                return self.missing("RepoNotFound")
            revision = parts[5] if len(parts) > 5 else "main"
            if revision not in ("main", commit_of(name)):
                return self.missing("RevisionNotFound")
            folder = hub.repositories[name]
            files = [{"rfilename": path, "size": os.path.getsize(os.path.join(folder, path))}
                     for path in files_in(folder)]
            return self.answer(200, {"id": name, "sha": commit_of(name), "siblings": files})
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        path = os.path.join(hub.repositories.get(name, ""), file)
        if parts[2:3] != ["resolve"] or not os.path.isfile(path):
            return self.missing("EntryNotFound")
        with open(path, "rb") as opened:
            content = opened.read()
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"',
                    X_Repo_Commit=commit_of(name))

    do_HEAD = do_GET

    def do_POST(self):
        hub, path = self.server.stand_in, urlparse(self.path).path
        hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = path.strip("/").split("/")
        if hub.refuses:
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.uploaded.setdefault(name, {})
            return self.answer(200, {"url": f"{hub.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if parts[4:5] == ["preupload"]:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if parts[4:5] == ["commit"]:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    content = base64.b64decode(row["value"]["content"])
                    hub.uploaded[name][row["value"]["path"]] = content
            commit = {"success": True, "commitOid": commit_of(name), "hookOutput": "",
                      "commitUrl": f"{hub.address}/{name}/commit/{commit_of(name)}"}
            return self.answer(200, commit)
        return self.missing("RepoNotFound")
