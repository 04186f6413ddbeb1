"""LaRe with `answer_sees_image=False`: what the answer knows of the images came through the latents alone."""

import pytest
import torch
from helpers import GREEDY, assert_near, enable_checkpointing, step_logits
from test_lare import BOT, EOS, EOT, IMAGE, LATENTS, PROMPTS, build, encode


pytestmark = pytest.mark.core

ANSWER = [30, 31, 32]


@pytest.fixture(params=["qwen2", "llama"])
def model(request):
    return build(request.param, answer_sees_image=False)


def with_answers(prompts: list[list[int]]) -> dict:
    inputs = encode([row + ANSWER for row in prompts], "right")
    ends = torch.tensor([len(row) for row in prompts])[:, None]
    columns = torch.arange(inputs["input_ids"].shape[1])
    is_answer = (columns >= ends) & (columns < ends + len(ANSWER))
    return inputs | {"labels": inputs["input_ids"].masked_fill(~is_answer, -100)}


def test_the_answer_is_that_of_text_and_latents(model):
    """A pass of the language model over `[text ; <bot> ; Z ; <eot> ; answer]`, written out by hand."""
    inputs = with_answers(PROMPTS)
    with torch.no_grad():
        output = model(**inputs, output_latents=True)
    embed = model.get_input_embeddings()
    for row, prompt in enumerate(PROMPTS):
        text = [token for token in prompt if token != IMAGE]
        latents = output.latents[row].flatten(0, 1)
        parts = [embed(torch.tensor(text + [BOT])), latents, embed(torch.tensor([EOT] + ANSWER))]
        with torch.no_grad():
            hidden = model.model.language_model(inputs_embeds=torch.cat(parts)[None], use_cache=False)[0]
            expected = model.lm_head(hidden[0, -len(ANSWER) - 1 :])
        assert_near(output.logits[row, len(prompt) - 1 : len(prompt) + len(ANSWER)], expected)


def test_other_images_change_nothing_while_the_latents_are_held(model):
    inputs = with_answers(PROMPTS)
    pixels = inputs.pop("pixel_values")
    answers = inputs["labels"] != -100
    shown = {}
    for sees_image in (False, True):
        model.config.answer_sees_image = sees_image
        for pictures in (pixels, pixels.flip(0)):
            with torch.no_grad():
                held = model(
                    **inputs, pixel_values=pictures, latent_intervention=lambda latents, step: latents * 0 + 0.1
                )
                free = model(**inputs, pixel_values=pictures)
            shown.setdefault(sees_image, []).append((held.logits[answers], free.logits[answers]))
    (held, free), (other_held, other_free) = shown[False]
    assert torch.equal(held, other_held)
    assert not torch.allclose(free, other_free, atol=1e-3)  # through the latents
    assert not torch.allclose(shown[True][0][0], shown[True][1][0], atol=1e-3)


@pytest.mark.parametrize("adaptive", [None, "cosine"])
def test_generate_equals_training_and_batch_equals_alone(model, adaptive):
    model.config.adaptive_stop, model.config.stop_threshold = adaptive, 0.5
    batch = encode(PROMPTS)
    output = model.generate(**batch, **(GREEDY | LATENTS))
    logits = step_logits(output)
    pictures, used = batch["pixel_values"], 0
    for row, prompt in enumerate(PROMPTS):
        count = prompt.count(IMAGE) // 16
        own = {"pixel_values": pictures[used : used + count]} if count else {}
        used += count
        alone = encode([prompt]) | own
        if not count:
            alone.pop("pixel_values", None)
        single = model.generate(**alone, **(GREEDY | LATENTS))
        assert_near(logits[row], step_logits(single)[0])
        assert single.num_latents[0] == output.num_latents[row]
        answer = single.sequences[:, len(prompt) :]
        forced = torch.cat([alone["input_ids"], answer], dim=1)
        labels = torch.cat([torch.full_like(alone["input_ids"], -100), answer], dim=1)
        with torch.no_grad():
            whole = model(input_ids=forced, labels=labels, **own).logits
        assert_near(whole[0, len(prompt) - 1 : -1], step_logits(single)[0])


def test_beams(model):
    batch = encode(PROMPTS[:2])
    together = model.generate(
        **batch, **(GREEDY | {"num_beams": 3, "max_new_tokens": 5, "eos_token_id": EOS, "output_scores": True})
    )
    first = encode(PROMPTS[:1]) | {"pixel_values": batch["pixel_values"][:1]}
    alone = model.generate(
        **first, **(GREEDY | {"num_beams": 3, "max_new_tokens": 5, "eos_token_id": EOS, "output_scores": True})
    )
    assert_near(together.sequences_scores[:1], alone.sequences_scores)


def test_checkpointing_changes_no_gradient_and_all_weights_get_one(model):
    inputs = with_answers(PROMPTS)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            enable_checkpointing(model, {"use_reentrant": False})
        model.train()
        model(**inputs).loss.backward()
        gradients.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert_near(gradients[1][name], value)
    assert all(
        gradients[0][name].abs().sum() > 0 for name in gradients[0] if name.startswith(("refocus", "model.multi"))
    )
    assert any(name.startswith("refocus") for name in gradients[0])
