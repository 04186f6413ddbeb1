"""The judge: what it is sent, what counts as a score, and that nothing it replies ends a run or gets the key elsewhere."""

import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import picture
from PIL import Image

from train.data.reasoning_data import ReasoningSample
from train.deeplatent.rl import judge
from train.deeplatent.rl.actions import group_advantages, has_no_signal
from train.deeplatent.rl.judge import Judge, JudgeArguments, read_score
from train.deeplatent.rl.rewards import RewardArguments, WeightedRewards


def written(text: str, line: int = 1, images=()) -> SimpleNamespace:
    sample = ReasoningSample(list(images), "what colour?", [], "red", f"Line {line} of data.jsonl")
    return SimpleNamespace(text=text, sample=sample, num_latent_tokens=0, rewards={}, reward=None)


def chat(content) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


class Endpoint:
    """Gives the next of its replies: bytes, (status, headers, bytes), or a function of the request's body."""

    def __init__(self):
        self.seen, self.replies, endpoint = [], [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                endpoint.seen.append((self.path, self.headers.get("Authorization"), json.loads(body or b"null")))
                reply = endpoint.replies.pop(0) if len(endpoint.replies) > 1 else endpoint.replies[0]
                reply = reply(endpoint.seen[-1][2]) if callable(reply) else reply
                status, headers, content = reply if isinstance(reply, tuple) else (200, {}, reply)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def judge(self, **fields) -> Judge:
        return Judge(
            JudgeArguments(**({"judge_url": self.url, "judge_model": "judge-7b", "judge_workers": 1} | fields))
        )


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    found = Endpoint()
    yield found
    found.close()


@pytest.fixture
def other():
    found = Endpoint()
    yield found
    found.close()


@pytest.mark.parametrize(
    "content, score",
    [
        ('{"score": 0.6}', 0.6),
        ('{"score": 1}', 1),
        ('{"score": 0, "reason": "Score: 1"}', 0),
        ('```json\n{"score": 0.25}\n```', 0.25),
        ("Score: 1", 1),
        ("Score: 0.5", 0.5),
        ("**Score:** .75", 0.75),
        ("score = 1.0.", 1.0),
        ("Score: 1 would be right.\nScore: 0", 0),  # the last one counts
        *((text, None) for text in ("Score: 10", "Score: 1/10", "Score: 0,5", "Score: 1.5", "Score: -1", "Score: 05")),
        *((text, None) for text in ("Score: 0.5\nScore: 1/10", "Score: one", "very good", "", "0.5", "[0.5]", "null")),
        *((text, None) for text in ('{"score": "1"}', '{"score": true}', '{"score": null}', '{"score": 2}', "{}")),
        *((text, None) for text in ('{"score": NaN}', '{"score": -0.1}', '{"score": 1e999}', '{"score": 0.9')),
        *((content, None) for content in (None, 5, [], {"score": 1}, [{"type": "text", "text": '{"score": 1}'}])),
    ],
)
def test_what_counts_as_a_score(content, score):
    if score is None:
        with pytest.raises(ValueError, match="score from 0 to 1|no text"):
            read_score(content)
    else:
        assert read_score(content) == score


def test_a_judge_counts_from_its_threshold(monkeypatch, endpoint):
    monkeypatch.setenv("JUDGE_API_KEY", "a key")
    endpoint.replies = [chat(f'{{"score": {score}}}') for score in (0.59, 0.6, 1, 0)]
    found = [written("\\boxed{x}") for _ in range(4)]
    arguments = JudgeArguments(judge_url=endpoint.url, judge_model="judge-7b", judge_workers=1)
    WeightedRewards(RewardArguments(rewards=["judge", "format"]), arguments)(found)
    assert [one.rewards["judge"] for one in found] == [0.0, 1.0, 1.0, 0.0]
    assert [one.reward for one in found] == pytest.approx([0.1, 1.0, 1.0, 0.1])
    path, key, body = endpoint.seen[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer a key", "judge-7b", 0)
    asked = body["messages"][0]["content"]
    assert "what colour?" in asked and "red" in asked and "\\boxed{x}" in asked


def test_the_reply_is_held_to_a_schema_and_the_images_are_sent(endpoint):
    endpoint.replies = [chat('{"score": 1}')]
    images = [picture(28, 56, 1), picture(56, 28, 2)]
    assert endpoint.judge()([written("x", images=images)]) == [1.0]
    body = endpoint.seen[0][2]
    schema = body["response_format"]["json_schema"]
    assert body["response_format"]["type"] == "json_schema" and schema["strict"] is True
    assert schema["schema"]["required"] == ["score"] and schema["schema"]["properties"]["score"]["type"] == "number"
    *parts, text = body["messages"][0]["content"]
    assert text["type"] == "text" and "what colour?" in text["text"]
    for part, image in zip(parts, images, strict=True):
        kind, _, data = part["image_url"]["url"].partition(",")
        assert part["type"] == "image_url" and kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == image.convert("RGB").tobytes()


def test_images_and_the_schema_can_be_left_out(endpoint):
    endpoint.replies = [chat("Score: 1")]
    assert endpoint.judge(judge_format="text", judge_images=False)([written("x", images=[picture(28, 28, 1)])]) == [
        1.0
    ]
    body = endpoint.seen[0][2]
    assert "response_format" not in body and isinstance(body["messages"][0]["content"], str)
    assert "`Score: X`" in body["messages"][0]["content"]


BROKEN = [
    *(b"[]", b"null", b"5", b'"text"', b"{}", b"", b"no json", b'{"choices": []}', b'{"choices": null}'),
    *(b'{"choices": [null]}', b'{"choices": [{"message": null}]}', b'{"choices": [{"message": {}}]}', b"\xff\xfe\xff"),
    *(b"[" * 100_000, chat("[" * 100_000), chat(None), chat(5), chat([]), chat("very good"), chat("Score: 10")),
    *((500, {}, b"down"), (200, {"Content-Length": "1000"}, b"cut"), (204, {}, b""), (200, {}, b" " * (2**22 + 1))),
]


@pytest.mark.parametrize("reply", BROKEN, ids=range(len(BROKEN)))
def test_a_reply_that_cannot_be_read_is_asked_for_again_and_then_missing(endpoint, reply, monkeypatch):
    told = []
    monkeypatch.setattr(judge.logger, "warning", told.append)
    endpoint.replies = [reply, reply, chat('{"score": 1}')]
    asked = endpoint.judge(judge_retries=2, judge_timeout=2)
    assert asked([written("x")]) == [1.0] and not told  # the third attempt
    assert [body["temperature"] for _, _, body in endpoint.seen] == [0, 0.5, 0.5]
    endpoint.replies = [reply]
    assert endpoint.judge(judge_retries=1, judge_timeout=2)([written("x", line=7)]) == [None]
    assert len(told) == 1 and "1 of 1 answers" in told[0] and "Line 7 of data.jsonl" in told[0]


def test_a_judge_that_is_not_there_leaves_rewards_missing(monkeypatch):
    told = []
    monkeypatch.setattr(judge.logger, "warning", told.append)
    arguments = JudgeArguments(judge_url="http://127.0.0.1:9/v1", judge_model="m", judge_retries=0)
    assert Judge(arguments)([written("x", line=3), written("y", line=4)]) == [None, None]
    assert "2 of 2 answers" in told[0] and "Line 3" in told[0]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_request_that_is_refused_is_not_repeated(endpoint, status):
    endpoint.replies = [(status, {}, b"{}")]
    assert endpoint.judge()([written("x")]) == [None] and len(endpoint.seen) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_key_goes_nowhere(monkeypatch, endpoint, other, status):
    told = []
    monkeypatch.setattr(judge.logger, "warning", told.append)
    monkeypatch.setenv("JUDGE_API_KEY", "a key")
    other.replies = [chat('{"score": 1}')]
    endpoint.replies = [(status, {"Location": other.url + "chat/completions"}, b"")]
    assert endpoint.judge(judge_retries=0)([written("x")]) == [None]
    assert len(endpoint.seen) == 1 and not other.seen
    assert "redirect" in told[0].lower() and "a key" not in told[0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"judge_url": None}, "needs `judge_url`"),
        ({"judge_model": ""}, "needs `judge_url` and `judge_model`"),
        ({"judge_url": "file:///etc"}, "http or https, got 'file:///etc'"),
        ({"judge_url": "localhost:8000/v1"}, "http or https"),
        ({"judge_threshold": 0.0}, "judge_threshold"),
        ({"judge_format": "xml"}, "one of .*'json_schema', 'text'.*got 'xml'"),
        ({"judge_workers": 0}, "`judge_workers` must be >= 1, got 0"),
        ({"judge_retries": -1}, "`judge_retries` must be >= 0"),
    ],
)
def test_judges_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Judge(JudgeArguments(**({"judge_url": "http://localhost/v1", "judge_model": "m"} | fields)))


def test_a_missing_reward_is_left_out_of_its_group():
    """The others have the advantages that they would have without it."""
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 0.0, 0.0], [nan, 1, nan, nan], [nan] * 4, [1, nan, 1, 1]], dtype=torch.float64)
    found = group_advantages(rewards)
    expected = group_advantages(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))[0]
    assert torch.equal(found[0, [0, 2, 3]], expected) and expected.any()
    assert found[0, 1] == 0 and not found[1:].any()
    assert has_no_signal(rewards).tolist() == [False, True, True, True]
