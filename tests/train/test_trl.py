"""TRL's trainers train the model that `generate` runs: with its latents, or not at all."""

import copy
import pickle

import pytest
import torch
import transformers
from conftest import picture, user_turn
from helpers import CHECKPOINTING, assert_near
from packaging.version import Version
from shipped import CLASSES, is_unread, load_shaken

from modeling_latentvlm.backbone_calls import find_answers


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
add_fused_lm_head = pytest.importorskip("trl.trainer.utils").add_fused_lm_head

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
SETTINGS = {**QUIET, CHECKPOINTING: False, "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
ALL = pytest.mark.parametrize("name", list(CLASSES))


@pytest.fixture(scope="module", params=list(CLASSES))
def loaded(request):
    return request.param, *load_shaken(request.param)


@pytest.fixture
def case(loaded):
    name, model, processor = loaded
    return name, copy.deepcopy(model), processor


def rows(name: str, kind: str = "completion", blocks: bool = True) -> "datasets.Dataset":
    """Two samples of unequal length. DeepLatent's hold a block, which only `messages` hand on whole."""
    made = []
    for seed, question, answer in ((1, "what colour is the shape?", "the answer is red"), (2, "what?", "blue")):
        image = picture(56, 84, seed)
        latent = [{"type": "latent", "grid": [2, seed]}] if name == "deeplatent" and blocks else []
        user = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        assistant = [{"role": "assistant", "content": [*latent, {"type": "text", "text": answer}]}]
        if kind == "messages":
            made.append({"images": [image], "messages": user + assistant})
        else:
            made.append({"images": [image], "prompt": user, "completion": assistant})
    return datasets.Dataset.from_list(made)


def sft(model, processor, data, folder, **settings):
    arguments = trl.SFTConfig(str(folder), **{**SETTINGS, "max_length": None, **settings})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=processor)
    trainer.model_accepts_loss_kwargs = False
    return trainer


def batch_of(trainer) -> dict:
    return dict(trainer.data_collator([trainer.train_dataset[index] for index in (0, 1)]))


def gradients(model) -> dict:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


NEEDS_MASKS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="TRL takes `assistant_only_loss` with images from 5.18 on",
)


@pytest.mark.parametrize("layout", ["whole", pytest.param("assistant_only", marks=NEEDS_MASKS)])
def test_sft_has_the_loss_and_the_gradients_of_forward(layout, case, tmp_path):
    name, model, processor = case
    if layout == "assistant_only" or name == "deeplatent":
        data, settings = rows(name, "messages"), {"assistant_only_loss": layout == "assistant_only"}
    else:
        data, settings = rows(name), {}
    own = copy.deepcopy(model).train()
    trainer = sft(model, processor, data, tmp_path, **settings)
    inputs = batch_of(trainer)
    assert int((inputs["labels"] != -100).sum()) > 4
    torch.manual_seed(3)  # DeepLatent adds noise to its latents in training
    stated = own(**inputs).loss
    stated.backward()
    torch.manual_seed(3)
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    loss.backward()
    assert_near(loss, stated)
    found, expected = gradients(model), gradients(own)
    assert found.keys() == expected.keys()
    for weight in expected:
        assert_near(found[weight], expected[weight], 1e-4)
    moved = [weight for weight, grad in expected.items() if model.config.is_new_weight(weight)]
    assert moved and not [weight for weight in moved if not expected[weight].any() and not is_unread(own, weight)]
    # Without latents the loss is another one: nothing above compares the backbone with itself.
    plain = {"lare": {}, "vedas": {"num_latent_steps": 0}, "deeplatent": {"latent_intervention": "zero"}}[name]
    if name == "lare":
        own.config.num_refocus_steps = 0
    with torch.no_grad():
        assert abs(float(own.eval()(**inputs, **plain).loss - stated)) > 1e-3


def test_one_step_of_sft_moves_the_new_weights(case, tmp_path):
    name, model, processor = case
    before = {weight: values.detach().clone() for weight, values in model.named_parameters()}
    trainer = sft(model, processor, rows(name, "messages" if name == "deeplatent" else "completion"), tmp_path)
    inputs = batch_of(trainer)
    with torch.no_grad():
        stated = float(copy.deepcopy(model).eval()(**inputs).loss) if name != "deeplatent" else None
    loss = trainer.train().training_loss
    assert stated is None or loss == pytest.approx(stated, rel=1e-4)
    new = [weight for weight in before if model.config.is_new_weight(weight)]
    still = [weight for weight in new if torch.equal(dict(model.named_parameters())[weight], before[weight])]
    assert new and not [weight for weight in still if not is_unread(model, weight)]


@pytest.mark.parametrize("sides", ["left", "right"])
def test_scored_tokens_are_those_that_generate_sampled(sides, case):
    """GRPO's importance ratios: the log-probabilities of the fused head are those of the decoding loop."""
    name, model, processor = case
    conversations = [user_turn("what colour is it?", picture(56, 84, 1)), user_turn("what?", picture(84, 56, 2))]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    blocks = {"max_latent_blocks": 0} if name == "deeplatent" else {}
    settings = {"max_new_tokens": 6, "eos_token_id": -1, "do_sample": True, "pad_token_id": 445, **blocks}
    output = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    length = inputs["input_ids"].shape[1]
    sampled = output.sequences[:, length:]
    logits = torch.stack(output.logits, dim=1)
    if name == "deeplatent":  # `<latent>` was forbidden after these logits were taken, so it was not sampled
        assert not (sampled == model.config.latent_start_token_id).any()
    expected = logits.log_softmax(-1).gather(2, sampled[..., None])[..., 0]
    ids, mask = output.sequences, torch.cat([inputs["attention_mask"], torch.ones_like(sampled)], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), sampled], dim=1)
    if sides == "right":  # as SFT's collator does: flushed left, padded at the end
        order = (mask == 0).int().argsort(dim=1, stable=True)
        ids, mask, labels = (values.gather(1, order) for values in (ids, mask, labels))
    vision = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with torch.no_grad():
        scored = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **vision)
    assert_near(scored.log_probs[scored.label_mask].view_as(expected), expected, 1e-4)
    if name == "deeplatent":
        return
    starts = find_answers(labels, mask)
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, answer_starts=starts, **vision).logits.log_softmax(-1)
    own = own[:, :-1].gather(2, ids[:, 1:, None])[..., 0][scored.label_mask]
    assert_near(own.view_as(expected), expected, 1e-4)


def grpo(model, processor, folder):
    data = datasets.Dataset.from_list(
        [{"prompt": user_turn("what?"), "image": picture(56, 84, seed)} for seed in (1, 2)]
    ).map(
        lambda row: row | {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]}
    )
    arguments = trl.GRPOConfig(
        str(folder), **SETTINGS, num_generations=2, max_completion_length=5, temperature=1.0, logging_steps=1
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(index % 2) for index, _ in enumerate(completions)],
        args=arguments,
        train_dataset=data,
        processing_class=processor,
    )


@pytest.mark.parametrize("name", ["lare", "vedas"])
def test_grpo_moves_the_new_weights(name, tmp_path):
    model, processor = load_shaken(name)
    before = {weight: values.detach().clone() for weight, values in model.named_parameters()}
    trainer = grpo(model, processor, tmp_path)
    trainer.train()
    new = [weight for weight in before if model.config.is_new_weight(weight)]
    still = [weight for weight in new if torch.equal(dict(model.named_parameters())[weight], before[weight])]
    assert new and not [weight for weight in still if not is_unread(model, weight)]


def test_grpo_on_sampled_blocks_names_the_trainer_that_can(tmp_path):
    model, processor = load_shaken("deeplatent")
    model.generation_config.min_latent_blocks = 1
    with pytest.raises(ValueError, match="train.train_deeplatent_rl"):
        grpo(model, processor, tmp_path).train()


def test_blocks_have_no_place_in_a_head_without_the_loss_of_sft(tmp_path):
    model, processor = load_shaken("deeplatent")
    trainer = sft(model, processor, rows("deeplatent", "messages"), tmp_path)
    inputs = batch_of(trainer)
    other = copy.deepcopy(load_shaken("deeplatent")[0])
    add_fused_lm_head(other, outputs=("log_probs", "entropy", "mean_logits"))  # as KTOTrainer
    with pytest.raises(ValueError, match="only SFTTrainer.*train_deeplatent_rl"):
        other(**inputs, fused_lm_head=True)


def test_blocks_in_completions_have_lost_their_grids(tmp_path):
    model, processor = load_shaken("deeplatent")
    with pytest.raises(ValueError, match="latent_grid_hw"):
        sft(model, processor, rows("deeplatent"), tmp_path).train()


# --- who else goes past `forward` ---


def encoded(model, processor) -> dict:
    inputs = processor.apply_chat_template(
        [user_turn("what?", picture(56, 84, 1))],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs)


def test_the_backbone_refuses_every_other_caller(case):
    name, model, processor = case
    inputs = encoded(model, processor)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for backbone in (one.model, one.base_model):
            with pytest.raises(ValueError, match=f"backbone of {type(model).__name__} was called past"):
                backbone(**inputs)
    assert torch.isfinite(model(**inputs).logits).all()


def test_base_model_is_the_backbone_in_all_else(case):
    _, model, _ = case
    assert model.base_model == model.model and model.model == model.base_model and model.base_model is not model
    assert model.base_model.config is model.config and model.get_decoder() is model.model.language_model
    model.base_model.requires_grad_(False)
    assert not any(weight.requires_grad for weight in model.model.parameters())
    model.base_model.anything = 1
    assert model.model.anything == 1


def test_peft_trains_with_latents(case, tmp_path):
    name, model, processor = case
    peft = pytest.importorskip("peft")
    own = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = sft(adapted, processor, rows(name, blocks=False), tmp_path)
    inputs = batch_of(trainer)
    with torch.no_grad():
        stated = own(**inputs).loss
    trainer.model.eval()
    assert_near(trainer.compute_loss(trainer.model, dict(inputs)), stated, 1e-4)


@ALL
@pytest.mark.parametrize("settings", [{"padding_free": True}, {"packing": True, "max_length": 64}], ids=str)
def test_packed_rows_are_refused(settings, name, tmp_path):
    """TRL refuses them with images; of text they would share one run of steps."""
    model, processor = load_shaken(name)
    data = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "what?"}], "completion": [{"role": "assistant", "content": "red"}]}]
        * 4
    )
    with pytest.raises(ValueError, match="packing"):
        sft(model, processor, data, tmp_path, **settings).train()


@pytest.mark.parametrize("name", ["lare", "vedas"])
def test_labels_that_leave_no_prompt_are_refused(name, tmp_path):
    model, processor = load_shaken(name)
    trainer = sft(model, processor, rows(name, "messages"), tmp_path)
    with pytest.raises(ValueError, match=r"rows \[0, 1\].*labels? of the prompt to -100.*assistant_only_loss"):
        trainer.train()
    inputs = batch_of(trainer)
    with pytest.raises(ValueError, match="labels of the prompt to -100"):
        model(**inputs)


@NEEDS_MASKS
@pytest.mark.parametrize("name", ["lare", "vedas"])
def test_several_answers_in_a_row_are_refused(name, tmp_path):
    model, processor = load_shaken(name)
    turns = [*user_turn("what?"), {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    turns[0]["content"] = [{"type": "image"}, *turns[0]["content"]]
    more = [*user_turn("and?"), {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
    data = datasets.Dataset.from_list([{"images": [picture(56, 84, 1)], "messages": turns + more}] * 2)
    with pytest.raises(ValueError, match=r"rows \[0, 1\] have several answers"):
        sft(model, processor, data, tmp_path, assistant_only_loss=True).train()


@pytest.mark.parametrize("wrong", [torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([99]), torch.tensor([1.0])])
@pytest.mark.parametrize("name", ["lare", "vedas"])
def test_answer_starts_are_checked(name, wrong):
    model, processor = load_shaken(name)
    with pytest.raises(ValueError, match="answer_starts"):
        model(**encoded(model, processor), answer_starts=wrong)


@pytest.mark.parametrize("name", ["lare", "vedas"])
def test_dpo_compares_answers_with_latents(name, tmp_path):
    model, processor = load_shaken(name)
    data = datasets.Dataset.from_list(
        [
            {
                "images": [picture(56, 84, seed)],
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "it is blue"}]}],
            }
            for seed in (1, 2)
        ]
    )
    reference = copy.deepcopy(model)
    arguments = trl.DPOConfig(str(tmp_path), **SETTINGS, max_length=None, logging_steps=1)
    trainer = trl.DPOTrainer(model, reference, arguments, train_dataset=data, processing_class=processor)
    inputs = dict(trainer.data_collator([trainer.train_dataset[index] for index in (0, 1)]))
    mask = inputs.pop("completion_mask")
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    own = copy.deepcopy(load_shaken(name)[0])
    with torch.no_grad():
        logits = own(**inputs, labels=labels).logits[:, :-1].log_softmax(-1)
    expected = (logits.gather(2, inputs["input_ids"][:, 1:, None])[..., 0] * (labels[:, 1:] != -100)).sum(dim=1)
    chosen, rejected = trainer.compute_ref_log_probs(reference, {**inputs, "completion_mask": mask})
    assert_near(torch.cat([chosen, rejected]), expected, 1e-4)
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)  # model and reference are equal yet


@ALL
def test_kto_scores_answers_as_forward_does(name, tmp_path):
    model, processor = load_shaken(name)
    data = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": answer}],
                "label": label,
            }
            for text, answer, label in (("what?", "red", True), ("and?", "it is blue", False))
        ]
    )
    reference = copy.deepcopy(model)
    arguments = trl.KTOConfig(str(tmp_path), **SETTINGS, max_length=None)
    trainer = trl.KTOTrainer(model, reference, arguments, train_dataset=data, processing_class=processor)
    seen = []
    model.register_forward_hook(lambda _, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True)
    assert trainer.train().training_loss == pytest.approx(0.5, abs=1e-3)  # model and reference are equal yet
    kwargs, output = next((kwargs, output) for kwargs, output in seen if kwargs.get("fused_lm_head"))
    own = load_shaken(name)[0]
    labels = kwargs["labels"]
    with torch.no_grad():
        logits = own(kwargs["input_ids"], attention_mask=kwargs["attention_mask"], labels=labels).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    assert_near(output.log_probs.detach(), expected * (labels[:, 1:] != -100), 1e-4)


@ALL
def test_a_reward_model_is_refused(name, tmp_path):
    """None of the architectures has a head for rewards, and TRL's trainer says so before the first step."""
    model, processor = load_shaken(name)
    data = datasets.Dataset.from_list(
        [{"prompt": "what?", "chosen": "red", "rejected": "blue"}, {"prompt": "?", "chosen": "a", "rejected": "b"}]
    )
    arguments = trl.RewardConfig(str(tmp_path), **SETTINGS)
    with pytest.raises(ValueError, match="num_labels"):
        trl.RewardTrainer(model, arguments, train_dataset=data, processing_class=processor.tokenizer).train()
