"""Our checkpoints in lmms-eval, in its own environment.

    python -m evaluation.harnesses.lmms_eval --model latentvlm --model_args pretrained=out/lare --tasks mmvp \
        --batch_size 8 --output_path out/lmms-eval
    accelerate launch --num_processes 8 -m evaluation.harnesses.lmms_eval ...         # a GPU and a share of the questions each

All options are lmms-eval's. `--model_args` takes `pretrained`, `dtype`, `attn_implementation`, `keep_reasoning` and the
fields of `AnswerSettings`, such as latents=off. The model is put into the harness' registry here: entry points would have
to be installed, which `train` is not, and `LMMS_EVAL_PLUGINS` is deprecated there.
"""

from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from conversion.commands import exit_on_error
from evaluation.harnesses.answerer import Answerer, as_conversation, cut, generation_settings
from evaluation.processes import Processes


class LatentVLM(lmms):
    """A checkpoint of any architecture, or a plain one. Images stand before the text, where `<image>` is taken out."""

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None, **settings: Any):
        super().__init__()
        settings.pop("max_batch_size", None)  # always handed over, meant for a batch size that is found out
        # The harness deals questions to ranks and gathers over `accelerator`. Its own models give the rank on their machine
        # as `_rank`, so that two machines would answer the same questions.
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        device = Processes(self._rank, self._world_size).device(device)
        self.answerer = Answerer(pretrained, device=device, batch_size=int(batch_size), **settings)

    @property
    def device(self):
        return self.answerer.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer in batches of requests that ask for the same way of generation."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answering", disable=self.rank > 0) as progress:
            for numbers in groups.values():
                size = self.answerer.settings.batch_size
                for start in range(0, len(numbers), size):
                    batch = numbers[start : start + size]
                    for number, text in zip(batch, self.answer([requests[number] for number in batch], batch[0])):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args[:2], text)
                    progress.update(len(batch))
        return answers

    def answer(self, requests: list[Instance], seed: int) -> list[str]:
        wanted, ends = generation_settings(requests[0].args[1])
        return [cut(text, ends) for text in self.answerer.answer(list(map(self.ask, requests)), seed, **wanted)]

    def ask(self, request: Instance) -> list[dict]:
        text, _, find_images, number, task, split = request.args
        images = find_images(self.task_dict[task][split][number]) or []
        return as_conversation(
            [*(("image", image) for image in images), ("text", text.replace("<image>", "").strip())]
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Answers are generated; tasks that compare likelihoods are not supported.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Questions of several rounds are not supported.")


def register(name: str = "latentvlm") -> None:
    """Make the class known to lmms-eval."""
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest(name, simple_class_path="evaluation.harnesses.lmms_eval.LatentVLM"), overwrite=True
    )


def main() -> None:
    from lmms_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    with exit_on_error():
        main()
