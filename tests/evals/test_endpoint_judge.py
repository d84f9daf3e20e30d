"""The endpoint judge against a real HTTP server on this machine, which speaks the form of OpenAI's chat completions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest

from evals.endpoint_judge import EndpointJudge, read_reply
from evals.judges import Judge, make_judge
from evals.suites import Suite
from evals.verdicts import Exchange
from fleet.core.errors import EvalError, InputError

HARMFUL = Suite("h", "harmfulness", "sha256:0", None, max_tokens=8)
HARMLESS = Suite("o", "over_refusal", "sha256:0", None, max_tokens=8)
KEY = "TEST_JUDGE_KEY"

Answer = tuple[int, str, str]
"""Status, the reply's text or the error's message, and the finish reason."""


class Server:
    """Answers each request by `answer`, which gets the request's number and its body, and keeps what it was asked."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.url = ""
        self.lock = threading.Lock()


@contextmanager
def serving(answer: Callable[[int, dict[str, Any]], Answer]) -> Iterator[Server]:
    state = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                state.keys.append(self.headers["Authorization"])
                status, text, reason = state.answer(len(state.bodies), body)
            if self.path != "/v1/chat/completions":
                status, text = 404, "no such path"
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            data = json.dumps(answer if status == 200 else {"error": {"message": text}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            # How long to wait before the next try, so that no test waits for a back-off.
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def always(text: str, status: int = 200, reason: str = "stop") -> Callable[[int, dict[str, Any]], Answer]:
    return lambda _number, _body: (status, text, reason)


def judge(server: Server, **fields: Any) -> EndpointJudge:
    return EndpointJudge(url=server.url, model="m", **fields)


def test_endpoint_judge_asks_with_rubric_key_and_exchange_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_number: int, body: dict[str, Any]) -> Answer:
        said = json.loads(body["messages"][1]["content"])
        return (
            200,
            json.dumps({"harmful": said["completion"] == "steps", "refused": said["completion"] == "no"}),
            "stop",
        )

    monkeypatch.setenv(KEY, "k-1")
    exchanges = [Exchange(f'"{i}"\né', ("steps", "no", "hm")[i % 3]) for i in range(20)]
    with serving(answer) as server:
        asked = judge(server, key_variable=KEY, rubric="Judge.", concurrency=4)
        verdicts = asked.judge(exchanges, HARMFUL)
    expected = [("harmful", False), ("safe", True), ("safe", False)]
    assert [(v.label, v.refused) for v in verdicts] == [expected[i % 3] for i in range(20)]
    assert set(server.keys) == {"Bearer k-1"}
    assert {body["messages"][0]["content"] for body in server.bodies} == {"Judge."}
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.bodies} == {("m", 0.0, 64)}
    prompts = sorted(json.loads(body["messages"][1]["content"])["prompt"] for body in server.bodies)
    assert prompts == sorted(exchange.prompt for exchange in exchanges)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_endpoint_judge_tries_again_until_it_is_answered(status: int) -> None:
    with serving(lambda number, _: (200, "harmful", "stop") if number > 2 else (status, "busy", "stop")) as server:
        (verdict,) = judge(server, retries=2).judge([Exchange("p", "c")], HARMFUL)
        assert (verdict.label, len(server.bodies)) == ("harmful", 3)
    with serving(always("busy", status)) as server:
        with pytest.raises(EvalError, match=r"no answer after 1 retries: .*busy"):
            judge(server, retries=1).judge([Exchange("p", "c")], HARMFUL)
        assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [401, 403])
def test_endpoint_judge_wrong_key_names_the_field_and_not_the_key(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv(KEY, "secret-1")
    with (
        serving(always("bad key secret-1", status)) as server,
        pytest.raises(InputError, match=rf"evaluation\.judge\.key_variable: .*the key in {KEY} \({status}\)") as error,
    ):
        judge(server, key_variable=KEY).judge([Exchange("p", "c")], HARMFUL)
    assert "secret-1" not in str(error.value)
    assert len(server.bodies) == 1


def test_endpoint_judge_key_variable_not_set_raises_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with serving(always("safe")) as server, pytest.raises(InputError, match=f"{KEY} is not set"):
        judge(server, key_variable=KEY).judge([Exchange("p", "c")], HARMFUL)
    assert server.bodies == []


def test_endpoint_judge_needs_no_key_where_none_is_named_and_sends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-them")
    with serving(always("safe")) as server:
        assert judge(server).judge([Exchange("p", "c")], HARMFUL)[0].label == "safe"
    assert server.keys == ["Bearer none"]


def test_endpoint_judge_unknown_address_or_model_names_the_fields() -> None:
    with (
        serving(always("no such model", 404)) as server,
        pytest.raises(InputError, match=r"judge\.url, \.model: .* m "),
    ):
        judge(server).judge([Exchange("p", "c")], HARMFUL)


def test_endpoint_judge_nobody_listens_raises() -> None:
    with serving(always("safe")) as server:
        pass
    with pytest.raises(EvalError, match="gave no answer after 0 retries"):
        judge(server, retries=0).judge([Exchange("p", "c")], HARMFUL)


def test_endpoint_judge_rejected_or_cut_off_is_unscored_in_their_words() -> None:
    with serving(always("content filter", 400)) as server:
        (verdict,) = judge(server).judge([Exchange("p", "c")], HARMFUL)
        assert verdict.label is None and "content filter" in verdict.reason
    with serving(always("harmful", 200, "length")) as server:
        (verdict,) = judge(server).judge([Exchange("p", "c")], HARMFUL)
        assert (verdict.label, verdict.reason) == (None, "the reply ended with 'length': 'harmful'")


@pytest.mark.parametrize(
    ("text", "label", "refused"),
    [
        ('{"harmful": true, "refused": false}', "harmful", False),
        ('\n {"refused": true, "harmful": false} ', "safe", True),
        ("harmful", "harmful", None),
        (" Safe.\n", "safe", None),
    ],
)
def test_endpoint_reply_of_either_form(text: str, label: Literal["harmful", "safe"], refused: bool | None) -> None:
    verdict = read_reply(text, HARMFUL)
    assert (verdict.label, verdict.refused, verdict.p_harmful) == (label, refused, None)


@pytest.mark.parametrize(
    "text",
    ["", "unsafe", "harmful safe", "It is safe", "有害", "null", "[]", '{"harmful": true}',
     '{"harmful": 1, "refused": 0}',
     '{"harmful": "true", "refused": "false"}', '{"harmful": true, "refused": false', '```{"harmful": true}```',
     '{"harmful": true, "refused": false} I think', '{"harmful": true, "refused": false, "sure": true}'],
)  # fmt: skip
def test_endpoint_reply_of_another_form_is_unscored_in_its_own_words(text: str) -> None:
    verdict = read_reply(text, HARMFUL)
    assert (verdict.label, verdict.refused) == (None, None)
    assert repr(text) in verdict.reason


def test_endpoint_reply_on_harmless_prompts_tells_refusal_alone() -> None:
    texts = ('{"harmful": true, "refused": false}', '{"harmful": false, "refused": true}', "safe")
    told = [read_reply(text, HARMLESS) for text in texts]
    assert [(v.label, v.refused) for v in told] == [(None, False), ("safe", True), (None, None)]


def test_endpoint_settings_hold_what_decides_verdicts_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret-1")
    spec = {"kind": "endpoint", "url": "https://api.example.com/v1", "model": "m", "key_variable": KEY, "retries": 1}
    made = make_judge(spec)
    assert isinstance(made, Judge) and made.gate_worthy
    settings = made.settings()
    assert set(settings) == {"kind", "url", "model", "rubric", "temperature", "max_tokens", "version", "gate_worthy"}
    assert "secret-1" not in json.dumps(settings)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"url": "api.example.com"}, "url"),
        ({"url": "https://user:key@api.example.com/v1"}, "url"),
        ({"url": "https://api.example.com/v1?api_key=1"}, "url"),
        ({"key_variable": "sk-abc-123"}, "key_variable"),
        ({"key": "sk-abc-123"}, "key"),
    ],
)
def test_endpoint_manifest_holds_no_key(fields: dict[str, str], where: str) -> None:
    spec = {"kind": "endpoint", "url": "https://api.example.com/v1", "model": "m"} | fields
    with pytest.raises(InputError, match=rf"evaluation\.judge: endpoint\.{where}: ") as error:
        make_judge(spec)
    assert "sk-abc" not in str(error.value) and "user:key" not in str(error.value)
