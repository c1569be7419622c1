"""POPE beside a server that keeps an image's prefix: vLLM, SGLang, any that speaks OpenAI's API.

    python bench/peer_server.py CKPT --server http://localhost:8000 --coco_path … --pope_path …
    python bench/peer_server.py CKPT --coco_path … --pope_path …        # ours, beside its answers

Two runs, so that each side has the GPU alone: stop the server in between. The other flags are
eval_pope.py's. docs/speed.md says how to start a server, and what makes the comparison fair.

The server is asked what eval_pope.py asks, about the same files: each distinct question once,
sorted by image, --concurrency at once, greedy, with the protocol's system sentence. On both sides
the time goes from image files to texts, behind a warm-up: of ours by a whole run, of the server by
questions about a grey picture, because its cache outlives a run. So start it anew for each.

Answers and time are kept in CKPT/pope/server.json once all are there. An interrupted run keeps
nothing: the server knows what was asked before, so the time of the rest would mean nothing.
No real server has been met yet, only the stand-in of the tests.
"""
import base64
import http.client
import io
import json
import mimetypes
import os
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from PIL import Image

from bench import measuring
from checkpoints.load import Source, checkpoints_among, load_all
from eval_pope import PROTOCOLS, ask, flags, measure, open_prompts, says_yes, table
from support.common import InputError, Number, device_and_dtype, progress, read_json, run_program
from support.folders import check_can_write
from support.images import check_images
from support.outputs import digest, write_text
from support.questions import find_images, question_files, read_pope
from tiny.places import world_beside

# The server is near: no proxy, whatever the environment names.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(url, path, body=None):
    """GET, or POST a body → the server's JSON answer, and the text that it has at `path`."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with OPENER.open(request, timeout=600) as response:      # seconds
            said = response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as e:
        said = " ".join(e.read().decode("utf-8", "replace").split())[:300]
        raise InputError(f"{url}: HTTP {e.code}: {said}; the server's log says more") from e
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise InputError(f"{url}: not reachable ({getattr(e, 'reason', e)}); start the server, or "
                         "mend --server") from e
    try:
        value = text = json.loads(said)
        for key in path:
            text = text[key]
    except (ValueError, LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise InputError(f"{url}: no JSON with a text at {'.'.join(map(str, path))}: "
                         f"{said[:300]!r}; does --server speak OpenAI's API?")
    return value, text


def time_server(args, limit, folder, questions):
    """Ask a server that is warm → what is kept of it."""
    url, protocol = args.server.rstrip("/").removesuffix("/v1"), PROTOCOLS[args.protocol]
    _, model = call(f"{url}/v1/models", ("data", 0, "id"))

    def data_url(kind, image):
        return f"data:{kind};base64,{base64.b64encode(image).decode()}"

    def ask_about(image, text):
        # The answer, the prompt's tokens, and how many of them were cached. The system sentence
        # is a list too, because the chat template of llava-1.5-7b-hf reads only lists.
        system = {"role": "system", "content": [{"type": "text", "text": protocol.system}]}
        content = [{"type": "image_url", "image_url": {"url": image}},
                   {"type": "text", "text": text + protocol.suffix}]
        body = {"model": model, "messages": [system, {"role": "user", "content": content}],
                "temperature": 0, "max_tokens": limit}
        value, said = call(f"{url}/v1/chat/completions", ("choices", 0, "message", "content"), body)
        usage = value.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return said, usage.get("prompt_tokens"), cached

    def ask_from_file(question):
        path = Path(folder, question[0]).absolute()
        kind = mimetypes.guess_type(path)[0] or "image/jpeg"
        image = path.as_uri() if args.send_paths else data_url(kind, path.read_bytes())
        return ask_about(image, question[1])

    Image.new("RGB", (640, 480), "grey").save(file := io.BytesIO(), "JPEG")
    grey, pool = data_url("image/jpeg", file.getvalue()), ThreadPoolExecutor(args.concurrency)
    try:
        list(pool.map(lambda question: ask_about(grey, question[1]), questions[:args.concurrency]))
        began, worked = time.perf_counter(), time.process_time()
        said = list(progress(pool.map(ask_from_file, questions), "asking the server",
                             len(questions), unit="question"))
        seconds, worked = time.perf_counter() - began, time.process_time() - worked
    finally:
        pool.shutdown(wait=False, cancel_futures=True)      # after an error nothing more is asked
    texts, prompts, cached = zip(*said, strict=True)
    return {"what": f"{model}, {args.concurrency} at once", "seconds": seconds, "client": worked,
            "prompt": sum(n or 0 for n in prompts), "cached": sum(n or 0 for n in cached),
            "answers": [[*key, text] for key, text in zip(questions, texts, strict=True)]}


def time_ours(args, limit, folder, questions):
    """The same of ours. Of several heads the first is asked, which is the base's."""
    device, dtype = device_and_dtype(args.bf16)
    source = Source(args.checkpoints, args.model_name_or_path, args.vision_tower)
    model = load_all(source, device, dtype)
    name = next(iter(model.heads))
    model = replace(model, heads={name: model.heads[name]})
    limit = min(limit, model.config.text.max_position_embeddings)

    _, dataset = prompts = open_prompts(model, questions, folder, args.protocol)
    measured = measuring.measure(lambda: ask(model, prompts, limit, args.batch_size), device, 1)
    rows = map(dataset.row, range(len(dataset)))
    return {"what": f"ours, {name}, {device.type}, {dtype}", "seconds": measured.seconds,
            "prompt": sum(row.position[end] + 1 for row in rows for end in row.ends), "cached": 0,
            "answers": [[*key, text] for key, (text, _) in measured.result[name].items()]}


def report(sides, splits):
    """Print times, equal answers and POPE's numbers of the server, and of ours if it was asked."""
    server, said = sides["server"], {}
    print("\n| | seconds | answers/s | times faster | tokens of a prompt | of them cached |")
    print("|---" * 6 + "|")
    for name, side in sides.items():
        seconds, count, prompt = side["seconds"], len(side["answers"]), side["prompt"]
        tokens = f"{prompt / count:.1f}" if prompt else "–"
        cached = f"{100 * side['cached'] / prompt:.1f} %" if prompt and side["cached"] else "–"
        print(f"| {side['what']} | {seconds:.4g} | {count / seconds:.4g} | "
              f"{server['seconds'] / seconds:.3g} | {tokens} | {cached} |")
        # A server may leave a space in front of an answer.
        said[name] = {(image, text): (answer.strip(), None)
                      for image, text, answer in side["answers"]}
    print(f"\n{len(server['answers']):,} distinct questions; this client's own processor time is "
          f"{server['client']:.3g} s of the server's {server['seconds']:.4g} s")
    if "ours" in said:
        pairs = [(text, said["ours"][key][0]) for key, (text, _) in said["server"].items()]
        equal = sum(a == b for a, b in pairs) / len(pairs)
        agree = sum(says_yes(a) == says_yes(b) for a, b in pairs) / len(pairs)
        print(f"equal answers: {100 * equal:.2f} %; equal yes or no: {100 * agree:.2f} %")
    print(table({split: {name: measure(rows, said[name], split) for name in said}
                 for split, rows in splits.items()}))


def main(argv=None):
    parser = flags(__doc__)
    add = parser.add_argument
    add("--server", metavar="URL", help="ask it; without: ours, beside what a server has answered")
    add("--concurrency", type=Number("--concurrency", int, above=0), default=64,
        help="questions that the server has at once")
    add("--send_paths", action="store_true", help="images as file:// paths, which the server must "
        "be allowed to read; without: as base64 data")
    args = parser.parse_args(argv)
    args.checkpoints = checkpoints_among(args.checkpoints)
    if len(args.checkpoints) > 1:
        raise InputError(f"{' '.join(args.checkpoints)}: name one; a server has one model")

    # The questions, as in eval_pope.py, but sorted by image.
    first, protocol = args.checkpoints[0], PROTOCOLS[args.protocol]
    world, beside = world_beside(first)
    files = question_files(args.pope_path or os.path.join(world, "pope"), args.set)
    splits = {split: read_pope(path) for split, path in files.items()}
    folder = find_images(args.image_folder, args.coco_path, world)
    questions = sorted({(q["image"], q["text"]) for rows in splits.values() for q in rows})
    images = [os.path.join(folder, image) for image, _ in questions]
    check_images(images)
    path = os.path.join(args.output_dir or os.path.join(beside, "pope"), "server.json")

    limit = args.max_new_tokens or protocol.max_new_tokens
    asked = digest([questions, list(map(os.path.getsize, images)), asdict(protocol), limit])
    if args.server:
        check_can_write(os.path.dirname(path))
        server = time_server(args, limit, folder, questions)
        write_text(path, json.dumps({"asked": asked} | server, ensure_ascii=False) + "\n")
        report({"server": server}, splits)
        print(f"\nanswers and time: {path}")
        return
    server = read_json(path, dict) if os.path.exists(path) else {}
    if server.get("asked") != asked:
        raise InputError(f"{path}: holds no server's answers to these questions under this "
                         "protocol; ask one first, with --server URL")
    report({"server": server, "ours": time_ours(args, limit, folder, questions)}, splits)


if __name__ == "__main__":
    run_program(main)
