"""How long the gradients of words and of latents are in the language model, before and after `latent_gradient_limit`.

    python -m benchmarks.gradient_shares --widths 32 128 512

Random models, eight answers with one block each and advantages of either sign, as in the first step of a run: actions are drawn
from what the policy says. The modulation is given small random weights, as a trained one has; a fresh one, whose last layer is
zero, gives the language model no gradient at all.
"""

from dataclasses import replace

import torch

from benchmarks.measuring import Setting
from benchmarks.models import TINY, deeplatent, qwen_inputs
from conversion.commands import CommandParser, exit_on_error
from train.deeplatent.rl.gradients import ApartGradients
from train.deeplatent.rl.objective import GRPOObjective, ObjectiveArguments
from train.deeplatent.rl.rescoring import replay
from train.deeplatent.rl.rollouts import Prompt, RolloutArguments, Trajectory


WORDS, GRID, ANSWERS = 24, (4, 4), 8
MODULATION_STD = 0.02  # of the last layer of the modulation


def random_policy(width: int):
    """A policy of that width and the prompt of its answers."""
    text = TINY.text | {"hidden_size": width, "intermediate_size": 3 * width}
    shape = replace(TINY, text=text, vision=TINY.vision | {"out_hidden_size": width})
    pair = deeplatent(shape, Setting(), latent_grid_size=8)
    model = pair.ours
    model.model.visual.requires_grad_(False)
    model.latent_control.requires_grad_(False)
    model.latent_blocks.requires_grad_(False)
    for part in (model.latent_blocks.query_modulation, model.latent_blocks.image_modulation):
        part.requires_grad_(True)
        torch.nn.init.normal_(part.down_proj.weight, std=MODULATION_STD)
    inputs = qwen_inputs(pair, WORDS)
    with torch.no_grad():
        images, _ = model._encode_images(
            inputs["input_ids"], inputs | {"pixel_values_videos": None, "video_grid_thw": None}
        )
    return model, Prompt(None, inputs["input_ids"][0], images[0])


def draw_answers(model, prompt: Prompt) -> list[Trajectory]:
    """Answers of random words with one block, whose latents are drawn from what the model says."""
    generator, start = torch.Generator().manual_seed(0), model.config.latent_start_token_id
    width, found = model.config.get_text_config().hidden_size, []
    for number in range(ANSWERS):
        words = torch.randint(100, 500, (WORDS,), generator=generator)
        tokens = torch.cat([words[:4], torch.tensor([start]), words[4:]])
        statistics = {(0, kind): torch.zeros(3, width) for kind in ("query", "image")}
        advantage = float(1 - 2 * (number % 2))
        found.append(Trajectory(prompt, tokens, "", number, [GRID], statistics, 1, advantage=advantage))
    with torch.no_grad():
        said = replay(model, found).actions.statistics  # the same whatever is drawn in this first block
    return [
        replace(one, statistics={place: value.clone() for place, value in own.items()})
        for one, own in zip(found, said)
    ]


def measure_norms(width: int, how: str = "sum", limit: float = 1.0) -> dict[str, float]:
    """Norms of the gradients of `words` and `latents` in the language model, and the `scale` that latents are given."""
    model, prompt = random_policy(width)
    arguments = ObjectiveArguments(kl_weight=0.0, continuous_logprob=how)
    parts = GRPOObjective(arguments, RolloutArguments())(model, draw_answers(model, prompt))["parts"]
    shared = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    apart = ApartGradients(limit)
    parts["words"].backward(retain_graph=True)
    with apart.of_latents(shared):
        parts["latents"].backward()
    return {name: float(value) for name, value in apart.merge(shared, []).items()}


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 512], help="hidden sizes of the models")
    parser.add_argument(
        "--gradient-limit", "--limit", type=float, default=1.0, help="`latent_gradient_limit` of the training"
    )
    return parser


def main() -> None:
    options = build_parser().parse_args()
    print("| log-density | width | words | latents | latents / words | share | after: latents / words | share |")
    print("|---|---|---|---|---|---|---|---|")
    for how in ("sum", "mean"):
        for width in options.widths:
            norms = measure_norms(width, how, options.gradient_limit)
            before, after = (norms["latents"] * scale / norms["words"] for scale in (1.0, norms["scale"]))
            print(
                f"| {how} | {width} | {norms['words']:.3g} | {norms['latents']:.3g} | {before:.3g} | {before / (1 + before):.2%} | "
                f"{after:.3g} | {after / (1 + after):.2%} |"
            )


if __name__ == "__main__":
    with exit_on_error():
        main()
