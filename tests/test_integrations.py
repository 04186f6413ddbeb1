"""What users put around a model: dtypes, offload, compile, PEFT, TRL, Trainer, pipelines, qwen-vl-utils."""

import copy
import pickle
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import build_model, encode, picture, stock_twin, user_turn
from helpers import CHECKPOINTING, GREEDY, assert_near, open_at, step_logits, vision
from torch.testing import assert_close
from transformers import Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments, pipeline

from modeling_latentvlm import DeepLatentForConditionalGeneration


PLAN = [[0, 4], [2], []]  # generated positions where each row of `batch` opens a block
ONE_BLOCK = {"min_latent_blocks": 1, "max_latent_blocks": 1}
TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "optim": "sgd",
}


def run(model, batch, **kwargs):
    return model.generate(**batch, logits_processor=open_at(model, batch, PLAN), **GREEDY, **kwargs)


def load(folder, **kwargs) -> DeepLatentForConditionalGeneration:
    return DeepLatentForConditionalGeneration.from_pretrained(folder, **kwargs).eval()


def unmoved(model, before) -> set[str]:
    """Weights that training left as they were."""
    old = dict(before.named_parameters())
    return {name for name, values in model.named_parameters() if torch.equal(values, old[name])}


@pytest.fixture(scope="module")
def folder(tokenizer, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build_model(tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(shared_model, batch) -> torch.Tensor:
    return step_logits(run(shared_model, batch))


@pytest.fixture(scope="module")
def conversations_with_blocks() -> list:
    return [
        [
            *user_turn("what colour?", picture(56, 84, seed)),
            {"role": "assistant", "content": [{"type": "latent", "grid": grid}, {"type": "text", "text": "red"}]},
        ]
        for seed, grid in ((1, [2, 2]), (2, [1, 3]))
    ]


@pytest.fixture(scope="module")
def collate(processor):
    def collate(conversations: list) -> dict:
        samples = encode(processor, conversations, add_generation_prompt=False)
        samples["labels"] = samples["input_ids"].masked_fill(samples["attention_mask"] == 0, -100)
        return samples

    return collate


@pytest.mark.core
def test_bfloat16_without_blocks_is_the_backbone_bit_for_bit(folder, shared_model, batch, tmp_path):
    stock_twin(shared_model).save_pretrained(tmp_path)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model, config = load(folder, dtype=torch.bfloat16), shared_model.config
    inner = [config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id]
    theirs = stock.generate(**batch, suppress_tokens=inner, **GREEDY)
    assert torch.equal(step_logits(model.generate(**batch, max_latent_blocks=0, **GREEDY)), step_logits(theirs))


@pytest.mark.core
def test_bfloat16_with_blocks_is_near_float32(folder, shared_model, batch):
    """A bfloat16 keeps 8 bits: a rounding is off by 0.2 %, some tens of them in a row by 2 %; a mistake by 100 %."""
    model = load(folder, dtype=torch.bfloat16)
    output = run(model, batch, output_latents=True)
    assert output.num_latent_blocks.tolist() == [2, 1, 0]
    assert {step.latents.dtype for step in output.latent_trace.steps} == {torch.bfloat16}
    # The same tokens and grids for both: that a near tie tips over is no error.
    tokens = torch.cat([batch["attention_mask"], torch.ones(3, GREEDY["max_new_tokens"], dtype=torch.long)], dim=1)
    inputs = {"input_ids": output.sequences, "attention_mask": tokens, "latent_grid_hw": output.latent_grid_hw}
    with torch.no_grad():
        exact = shared_model(**inputs, **vision(batch)).logits[:, -10:-1]
    error = (step_logits(output) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05


def test_float16_generates_with_blocks(folder, shared_model, batch):
    model = load(folder, dtype=torch.float16)
    assert model.lm_head.weight.dtype == torch.float16
    output = run(model, batch)
    assert output.num_latent_blocks.tolist() == [2, 1, 0]
    assert (output.logits[0] - run(shared_model, batch).logits[0]).norm() < 0.01 * output.logits[0].norm()
    for logits in output.logits:
        assert logits.isfinite().all()


def test_half_precision_is_saved_and_loaded_as_such(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="auto")
    assert loaded.dtype == loaded.config.dtype == torch.bfloat16
    for name, values in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == values.dtype and torch.equal(loaded.state_dict()[name], values)


SOME_ON_DISK = {
    "model.visual": "cpu",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "latent_control": "disk",
    "latent_blocks": "disk",
    "lm_head": "disk",
}


@pytest.mark.core
@pytest.mark.parametrize("kind", ["all in memory", "all on disk", "device_map", "device_map of from_pretrained"])
def test_offloaded_weights(kind, folder, model, batch, expected, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    if kind == "all in memory":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    elif kind == "all on disk":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    elif kind == "device_map":
        model = accelerate.dispatch_model(
            model, SOME_ON_DISK, main_device="cpu", offload_dir=tmp_path, force_hooks=True
        )
    else:
        model = load(folder, device_map=SOME_ON_DISK, offload_folder=tmp_path)
    assert model.lm_head.weight.device.type == "meta" and model.latent_control.weight.device.type == "meta"
    assert_near(step_logits(run(model, batch)), expected)


def test_compiled_language_model(model, shared_model, rows):
    """The part of the model that is one graph, traced once for prompts, once for blocks and once for tokens."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.model.language_model.compile(backend=count, dynamic=True)
    settings = GREEDY | ONE_BLOCK
    assert_near(
        step_logits(model.generate(**rows[0], **settings)), step_logits(shared_model.generate(**rows[0], **settings))
    )
    assert 1 <= len(graphs) <= 4
    torch._dynamo.reset()


@pytest.mark.core
def test_eager_attention_equals_sdpa(folder, batch, expected):
    model = load(folder, attn_implementation="eager")
    assert model.model.language_model.config._attn_implementation == "eager"
    assert_near(step_logits(run(model, batch)), expected)


@pytest.mark.core
def test_deepcopy_is_a_model_of_its_own(shared_model, batch, expected):
    twin = copy.deepcopy(shared_model)
    assert torch.equal(step_logits(run(twin, batch)), expected)
    with torch.no_grad():
        twin.latent_control.weight.zero_()
    assert not torch.allclose(step_logits(run(twin, batch)), expected)
    assert torch.equal(step_logits(run(shared_model, batch)), expected)


def test_pickled_config(shared_model):
    config = pickle.loads(pickle.dumps(shared_model.config))
    assert type(config) is type(shared_model.config)
    assert config.to_dict() == shared_model.config.to_dict()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_lora(task_type, model, tokenizer, rows, conversations_with_blocks, collate, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["latent_control"], task_type=task_type
    )
    adapted = peft.get_peft_model(model, lora).train()
    trained = {name: values for name, values in adapted.named_parameters() if values.requires_grad}
    before = {name: values.detach().clone() for name, values in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        optimizer.zero_grad()
        adapted(**collate(conversations_with_blocks)).loss.backward()
        optimizer.step()
    assert not [name for name, values in trained.items() if torch.equal(values, before[name])]
    assert any("latent_blocks" in name for name in trained) and any("latent_control" in name for name in trained)

    adapted.eval().save_pretrained(tmp_path)
    settings = GREEDY | ONE_BLOCK
    output = adapted.generate(**rows[0], **settings)
    assert output.num_latent_blocks.tolist() == [1]
    base = build_model(tokenizer)
    assert not torch.allclose(step_logits(output), step_logits(base.generate(**rows[0], **settings)), atol=1e-2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert_near(step_logits(loaded.generate(**rows[0], **settings)), step_logits(output))
    merged = loaded.merge_and_unload()
    assert type(merged) is DeepLatentForConditionalGeneration
    assert_near(
        step_logits(merged.generate(**rows[0], **settings)), step_logits(output), 1e-4
    )  # sums in another order


@pytest.mark.core
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_on_blocks(checkpointing, model, shared_model, conversations_with_blocks, collate, tmp_path):
    """One step moves every weight, and moves it the same with gradient checkpointing."""

    def train(model, **settings):
        arguments = TrainingArguments(str(tmp_path), **TRAINING, remove_unused_columns=False, **settings)
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=conversations_with_blocks)
        return trainer.train().training_loss

    loss = train(model, **{CHECKPOINTING: checkpointing})
    with torch.no_grad():
        stated = shared_model(**collate(conversations_with_blocks)).loss
    assert loss == pytest.approx(float(stated), rel=0.02)  # training adds the modulation's noise
    assert unmoved(model, shared_model) == set()
    if checkpointing:
        plain = copy.deepcopy(shared_model)
        train(plain)
        for (name, values), other in zip(model.named_parameters(), plain.parameters()):
            assert_close(values, other, atol=1e-5, rtol=1e-5, msg=name)


def sft(model, processor, answer: list, folder, processing_class=None):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [
        {
            "images": [picture(56, 84, seed)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]},
                {"role": "assistant", "content": answer},
            ],
        }
        for seed in (1, 2)
    ]
    arguments = trl.SFTConfig(str(folder), **TRAINING, max_length=None)
    return trl.SFTTrainer(model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor)


def test_sft_trainer_of_trl(model, shared_model, processor, tmp_path):
    """On conversations without blocks: the loss is the backbone's, and the backbone's weights move."""
    trainer = sft(model, processor, [{"type": "text", "text": "red"}], tmp_path)
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in (0, 1)])
    with torch.no_grad():
        stated = stock_twin(shared_model)(**inputs).loss
    assert trainer.train().training_loss == pytest.approx(float(stated), rel=1e-5)
    assert {name.split(".")[0] for name in unmoved(model, shared_model)} == {"latent_control", "latent_blocks"}


@pytest.mark.core
def test_pipeline(folder, shared_model, processor, rows, conversations):
    answer = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True, device="cpu")
    (output,) = answer(
        text=conversations[0],
        max_new_tokens=5,
        return_full_text=False,
        generate_kwargs=ONE_BLOCK | {"do_sample": False},
    )
    ids = shared_model.generate(**rows[0], **ONE_BLOCK, do_sample=False, max_new_tokens=5)
    new = ids[0, rows[0]["input_ids"].shape[1] :]
    assert shared_model.config.latent_start_token_id in new
    assert output["generated_text"] == processor.decode(new, skip_special_tokens=True)


@pytest.fixture
def process_vision_info(monkeypatch):
    """The function of qwen-vl-utils, which imports torchvision even where only images are read."""
    for name in ("qwen_vl_utils", "requests"):
        if find_spec(name) is None:
            pytest.skip(f"needs {name}")
    if find_spec("torchvision") is None:
        stubs = {
            name: ModuleType(name)
            for name in (
                "torchvision",
                "torchvision.io",
                "torchvision.transforms",
                "torchvision.transforms.functional",
            )
        }
        stubs["torchvision.transforms"].InterpolationMode = SimpleNamespace(BICUBIC="bicubic")
        for name, stub in stubs.items():
            monkeypatch.setitem(sys.modules, name, stub)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(stubs[parent], child, stub)
        for name in ("qwen_vl_utils", "qwen_vl_utils.vision_process"):  # forgotten again with the stubs
            monkeypatch.setitem(sys.modules, name, None)
            del sys.modules[name]
    from qwen_vl_utils import process_vision_info

    return process_vision_info


def test_takes_what_qwen_vl_utils_returns(process_vision_info, shared_model, processor, tmp_path):
    path = tmp_path / "photo.png"
    picture(56, 84, 1).save(path)
    conversations = [
        user_turn("what colour?", str(path)),
        user_turn("left or right?", picture(112, 112, 2), str(path)),
    ]
    images, videos = process_vision_info(conversations)
    assert [image.size for image in images] == [(56, 84), (112, 112), (56, 84)]
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    inputs = processor(text=texts, images=images, videos=videos, padding=True, return_tensors="pt")
    alike = encode(processor, conversations)
    assert inputs.keys() == alike.keys()
    assert all(torch.equal(inputs[name], alike[name]) for name in inputs)
    assert shared_model.generate(**inputs, **ONE_BLOCK, **GREEDY).num_latent_blocks.tolist() == [1, 1]
