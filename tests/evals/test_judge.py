"""evals/judge.py: a server that answers well, badly, slowly and not at all."""
import threading
from dataclasses import replace

import pytest
from programs import free_port
from stand_in import Misbehaviour, StandIn

from evals.judge import Judge, replies
from support.common import InputError


def quick(url, **changes):
    """A judge that does not wait between its tries."""
    return replace(Judge(url, "some-model", pause=0.0, timeout=30.0), **changes)


def test_it_answers_well():
    with StandIn(lambda prompt, n: f"you said {prompt}") as server:
        prompts = {n: f"prompt {n} ü漢" for n in range(20)}
        said = dict(replies(quick(server.url, key="secret"), prompts))
        assert {n: reply.text for n, reply in said.items()} == {
            n: f"you said {prompt}" for n, prompt in prompts.items()}
        assert all(reply.tried == [] for reply in said.values())
        assert sorted(server.asked) == sorted(prompts.values())
        assert set(server.keys) == {"Bearer secret"} and set(server.models) == {"some-model"}
        dict(replies(quick(server.url + "/"), {0: "without a key"}))
        assert server.keys[-1] is None


def test_so_many_are_asked_at_once():
    """No request is answered before as many as may be are there."""
    at_once, together = 4, threading.Barrier(4, timeout=60)

    def reply(prompt, n):
        together.wait()
        return "well"

    with StandIn(reply) as server:
        said = list(replies(quick(server.url, at_once=at_once), {n: f"{n}" for n in range(8)}))
        assert len(said) == 8 and all(reply.text == "well" for _, reply in said)


@pytest.mark.parametrize("bad, told", [
    (Misbehaviour(429, "too many"), "HTTP 429: too many"),
    (Misbehaviour(503, "starting"), "HTTP 503: starting"),
    (Misbehaviour(body="<html>"), "no chat completion: <html>"),
    (Misbehaviour(body=""), "no chat completion: "),
    (Misbehaviour(body='{"choices": []}'), 'no chat completion: {"choices": []}'),
    (Misbehaviour(body='{"choices": [{"message": {"content": null}}]}'), "no text in the compl"),
    (Misbehaviour(body='{"choices": [{"mess', cut=True), "the answer broke off")])
def test_what_may_pass_is_tried_again(bad, told):
    with StandIn(lambda prompt, n: "good" if n == 3 else bad) as server:
        [(_, reply)] = replies(quick(server.url), {"a": "prompt"})
        assert reply.text == "good" and len(reply.tried) == 2
        assert all(told in line for line in reply.tried)


def test_a_server_that_refuses_many_is_not_given_up():
    with StandIn(lambda prompt, n: Misbehaviour(400, "too long")) as server:
        said = dict(replies(quick(server.url, at_once=1), {n: f"{n}" for n in range(12)}))
        assert len(said) == len(server.asked) == 12


def test_a_silent_server_is_tried_again():
    with StandIn(lambda prompt, n: Misbehaviour(silent=True) if n == 1 else "good") as server:
        [(_, reply)] = replies(quick(server.url, timeout=2.0), {"a": "prompt"})
        assert reply.text == "good" and reply.tried and "timed out" in reply.tried[0]


def test_some_are_never_answered():
    """One that the server always fails at, and one that is too long: the others count."""
    def reply(prompt, n):
        return {"fails": Misbehaviour(500, "oh"), "long": Misbehaviour(400, "context")}.get(
            prompt, "good")

    with StandIn(reply) as server:
        prompts = {name: name for name in ("a", "fails", "b", "long", "c")}
        said = dict(replies(quick(server.url, at_once=1), prompts))
        assert [name for name, one in said.items() if one.text is None] == ["fails", "long"]
        assert said["fails"].tried == 4 * ["HTTP 500: oh"] and server.count["fails"] == 4
        assert said["long"].tried == ["HTTP 400: context"] and server.count["long"] == 1


@pytest.mark.parametrize("status, cure", [(401, "OPENAI_API_KEY"), (404, "--judge_model")])
def test_a_refusal_for_good_ends_everything(status, cure):
    def reply(prompt, n):
        return "good" if prompt == "0" else Misbehaviour(status, "no\nway")

    with StandIn(reply) as server:
        came = []
        with pytest.raises(InputError, match=f"HTTP {status}: no way; .*{cure}"):
            for name, one in replies(quick(server.url, at_once=1), {n: f"{n}" for n in range(50)}):
                came.append((name, one.text))
        assert came == [(0, "good")] and len(server.asked) < 50


def test_no_server_at_all():
    judge = quick(f"http://127.0.0.1:{free_port()}/v1", at_once=2)
    with pytest.raises(InputError, match="answers nothing .*refused.*the same command goes on"):
        list(replies(judge, {n: "prompt" for n in range(200)}))


def test_a_server_that_ends_is_given_up():
    def reply(prompt, n):
        return "good" if int(prompt) < 3 else Misbehaviour(502, "gone")

    with StandIn(reply) as server:
        with pytest.raises(InputError, match=r"answers nothing \(HTTP 502: gone\)"):
            list(replies(quick(server.url, at_once=1, tries=1), {n: f"{n}" for n in range(50)}))
        assert len(server.asked) in (8, 9)              # one more may be under way
        few = dict(replies(quick(server.url, tries=1), {n: f"{n}" for n in (1, 7, 8)}))
        assert [few[n].text for n in (1, 7, 8)] == ["good", None, None]


def test_it_may_be_left_in_the_middle():
    """Whoever stops to read the replies waits for no answer that is still out."""
    def reply(prompt, n):
        return "good" if prompt == "0" else Misbehaviour(silent=True)

    with StandIn(reply) as server:
        for name, one in replies(quick(server.url, at_once=3), {n: f"{n}" for n in range(20)}):
            assert (name, one.text) == (0, "good")
            break
        assert len(server.asked) <= 4
