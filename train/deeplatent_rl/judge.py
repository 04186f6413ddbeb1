"""A language model behind an OpenAI-compatible endpoint as a judge of answers. Nothing is called unless it is asked for.

    --rewards judge format --judge_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-VL-32B-Instruct

It reads the question, the known answer and what was written, and replies with a score from 0 to 1.
"""

import json
import os
import re
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from train.deeplatent_rl.rollouts import Trajectory


ASKED = (
    "Judge whether a response answers a question correctly. Compare its final answer with the known answer; ignore style.\n"
    "Question:\n{question}\n\nKnown answer:\n{answer}\n\nResponse:\n{response}\n\n"
    "Reply with one line, `Score: X`, where X is a number from 0 (wrong) to 1 (right)."
)
SCORE = re.compile(r"score\s*[:=]\s*([01](?:\.\d+)?|\.\d+)", re.IGNORECASE)


@dataclass
class JudgeArguments:
    """The endpoint of the reward `judge`."""

    judge_url: str | None = field(default=None, metadata={"help": "Base URL, up to and including `/v1`."})
    judge_model: str | None = field(default=None, metadata={"help": "Name of the model there."})
    judge_threshold: float = field(default=0.6, metadata={"help": "A score from here on counts as right."})
    judge_key_variable: str = field(
        default="JUDGE_API_KEY", metadata={"help": "Environment variable with the key, if the endpoint wants one."}
    )
    judge_workers: int = field(default=16, metadata={"help": "Requests at a time."})
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds that a request may take."})
    judge_retries: int = field(default=3, metadata={"help": "Further attempts, after 1, 2, 4, ... seconds."})


class Judge:
    """1 where the judge's score reaches the threshold, else 0."""

    def __init__(self, arguments: JudgeArguments):
        if not arguments.judge_url or not arguments.judge_model:
            raise ValueError("The reward 'judge' needs `judge_url` and `judge_model`.")
        if not 0 < arguments.judge_threshold <= 1:
            raise ValueError(f"`judge_threshold` must lie within (0, 1], got {arguments.judge_threshold}.")
        self.arguments = arguments

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        with ThreadPoolExecutor(self.arguments.judge_workers) as pool:
            scores = list(pool.map(self.score, trajectories))
        return [float(score >= self.arguments.judge_threshold) for score in scores]

    def score(self, trajectory: Trajectory) -> float:
        """Ask about one trajectory.

        Raises:
            ValueError: the endpoint could not be reached, or its reply holds no score.
        """
        sample = trajectory.sample
        asked = ASKED.format(question=sample.question, answer=sample.answer, response=trajectory.text)
        for attempt in range(self.arguments.judge_retries + 1):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                reply = self.ask(asked)
                break
            except (OSError, ValueError, LookupError) as error:
                failure = error
        else:
            raise ValueError(f"The judge did not answer about {sample.origin}: {failure}") from failure
        found = SCORE.search(reply or "")
        if found is None or float(found[1]) > 1:
            raise ValueError(f"The judge gave no score from 0 to 1 for {sample.origin}: {str(reply)[:200]!r}.")
        return float(found[1])

    def ask(self, text: str) -> str:
        body = {"model": self.arguments.judge_model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.arguments.judge_key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = self.arguments.judge_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.arguments.judge_timeout) as response:
            return json.load(response)["choices"][0]["message"]["content"]
