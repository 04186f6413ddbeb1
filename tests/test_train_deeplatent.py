"""SFT of DeepLatent: the loss and its gradients against a naive one, shards, ablations, and runs that were killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import picture, user_turn
from helpers import CHECKPOINTING, assert_near, enable_checkpointing
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from conversion.config_overrides import load_config
from conversion.convert_deeplatent import convert_deeplatent
from modeling_latentvlm.row_images import RowImages
from train import cache_teacher_states, train_deeplatent
from train.common import training_model
from train.common.training_model import LatentTrainer
from train.data.small_tokenizer import texts_of
from train.data.tasks import write_dataset
from train.deeplatent import sft
from train.deeplatent.collator import DeepLatentCollator
from train.deeplatent.distillation import SftObjective, align_loss
from train.deeplatent.sft import SftTrainingArguments, build_parser
from train.recipes.small_backbone import write_backbone


ROOT = Path(__file__).parents[1]
LAYERS = (1, 3)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
LORA = {"lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2}


def sample(question: str, images: int, *grids: tuple[int, int], origin: str = "x") -> dict:
    """A trajectory with a picture of each grid in its answer."""
    content = [{"type": "text", "text": "so"}]
    for number, (height, width) in enumerate(grids):
        content += [
            {"type": "text", "text": f"look {number}"},
            {"type": "image", "image": picture(28 * width, 28 * height, number)},
        ]
    asked = user_turn(question, *(picture(56, 84 - 28 * number, 9 + number) for number in range(images)))
    answer = {"role": "assistant", "content": [*content, {"type": "text", "text": "red"}]}
    return {"messages": [*asked, answer], "origin": origin, "number": 0}


SAMPLES = [
    sample("what colour is it?", 1),
    sample("which?", 2, (2, 3)),
    sample("where?", 1, (1, 1), (4, 2), (2, 2)),
]
BATCHES = {"none": SAMPLES[:1], "one": SAMPLES[1:2], "three": SAMPLES[2:], "ragged": SAMPLES}


@pytest.fixture
def even_noise(monkeypatch):
    """Noise that does not depend on the order in which it is drawn."""
    monkeypatch.setattr(torch, "randn_like", lambda values: torch.full_like(values, 0.5))


def collate(model, processor, samples: list[dict], **settings) -> dict:
    batch = DeepLatentCollator(processor, model.config, "latent", **settings)(samples)
    if "latent_grid_hw" in batch and not settings:
        count = int(batch["latent_grid_hw"].prod(1).sum())
        batch["teacher_states"] = torch.randn(len(LAYERS), count, 64, generator=torch.Generator().manual_seed(3))
    return batch


def naive_row(model, ids: torch.Tensor, images: list, prompt_positions: torch.Tensor, grids: list) -> tuple:
    """One row from scratch, the whole prefix again for every block: output, logits, (h, w) logits, columns of latents."""
    config, embed = model.config, model.get_input_embeddings()
    embeds, positions, scale_logits, latent_columns = [], [], [], []

    def decode():
        return model.model.language_model(
            inputs_embeds=torch.cat(embeds)[None],
            position_ids=torch.cat(positions, dim=1)[:, None],
            use_cache=False,
            output_hidden_states=True,
        )

    def add(vectors, places):
        embeds.append(vectors)
        positions.append(places)

    opened = (ids == config.latent_start_token_id).nonzero().flatten().tolist()
    column = opened[0] if opened else len(ids)
    prompt = embed(ids[:column])
    if images:
        features = torch.cat([values for values, _ in images])
        prompt = prompt.masked_scatter((ids[:column] == config.image_token_id)[:, None], features)
        seen = RowImages(features, [grid for _, grid in images], list(range(len(images))))
    add(prompt, prompt_positions[:, :column])
    place, grids = int(positions[0].max()) + 1, list(grids)
    while column < len(ids):
        add(embed(ids[column][None]), torch.full((3, 1), place))
        place, column = place + 1, column + 1
        if ids[column - 1] != config.latent_start_token_id:
            continue
        for control in model.latent_control.weight:
            add(control[None], torch.full((3, 1), place))
            place += 1
        height, width = grids.pop(0)
        states = decode().last_hidden_state[:, -3:]
        built = model.latent_blocks(states, [seen], [(height, width)], noise=True)
        scale_logits.append((built.height_logits, built.width_logits))
        offsets = torch.tensor([[0, y, x] for y in range(height) for x in range(width)]).T
        add(built.latents[0], place + offsets)
        latent_columns += range(column + 3, column + 3 + height * width)
        place, column = place + max(height, width), column + 3 + height * width
    output = decode()
    return output, model.lm_head(output.last_hidden_state[0]), scale_logits, latent_columns


def naive_loss(model, batch: dict) -> torch.Tensor:
    """Eq. 8, row by row, unpadded, without a cache."""
    mask, grids = batch["attention_mask"].bool(), batch.get("latent_grid_hw", torch.zeros(0, 2)).int().tolist()
    encoded = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
    pictures = [
        (values, (height // 2, width // 2))
        for values, (_, height, width) in zip(encoded.pooler_output, batch["image_grid_thw"].tolist())
    ]
    logits, targets, scales, cosines, done = [], [], [], [], 0
    for row in range(len(mask)):
        ids, labels = batch["input_ids"][row][mask[row]], batch["labels"][row][mask[row]]
        num_images = int((ids == model.config.vision_start_token_id).sum())
        num_blocks = int((ids == model.config.latent_start_token_id).sum())
        mine, pictures = pictures[:num_images], pictures[num_images:]
        own_grids, grids = grids[:num_blocks], grids[num_blocks:]
        thw = torch.tensor([[1, 2 * height, 2 * width] for _, (height, width) in mine])
        types = (ids == model.config.image_token_id).int()[None]
        places, _ = model.model.get_rope_index(ids[None], mm_token_type_ids=types, image_grid_thw=thw)
        output, row_logits, scale_logits, columns = naive_row(model, ids, mine, places[:, 0], own_grids)
        logits.append(row_logits[:-1])
        targets.append(labels[1:])
        for (heights, widths), (height, width) in zip(scale_logits, own_grids):
            scales.append(-heights.log_softmax(-1)[0, height - 1] - widths.log_softmax(-1)[0, width - 1])
        for index, layer in enumerate(LAYERS if columns else ()):
            student = output.hidden_states[layer][0, columns]
            teacher = batch["teacher_states"][index, done : done + len(columns)]
            cosines.append((student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1)))
        done += len(columns)
    loss = F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=-100)
    if scales:
        loss = loss + 0.5 * torch.stack(scales).mean() + 4.0 * (1 - torch.cat(cosines).mean())
    return loss


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_equal_those_of_a_naive_implementation(model, processor, even_noise, name, checkpointing):
    batch = collate(model, processor, BATCHES[name])
    objective = SftObjective(model.config, 4.0, LAYERS)
    expected_loss = naive_loss(model.train(), batch)
    expected = gradients(model, expected_loss)
    if checkpointing:
        enable_checkpointing(model)
    output = objective(model, **batch)
    actual = gradients(model, output["loss"])
    assert_near(output["loss"], expected_loss)
    assert actual.keys() == expected.keys()
    assert name == "none" or all("latent_blocks.scale_head.height.weight" in found for found in (actual, expected))
    for weight, gradient in expected.items():
        size = gradient.abs().max().clamp(min=1)
        assert_near(actual[weight] / size, gradient / size)


def test_align_loss_is_zero_where_the_states_agree_and_equals_a_naive_one(model, processor):
    batch = collate(model, processor, SAMPLES)
    objective = SftObjective(model.config, 4.0, LAYERS)
    output = model(
        **{name: value for name, value in batch.items() if name != "teacher_states"}, latent_state_layers=LAYERS
    )
    agreed = objective(model, **(batch | {"teacher_states": 3 * output.latent_states.detach()}))
    assert abs(float(agreed["losses"]["align_loss"])) < 1e-6
    opposed = objective(model, **(batch | {"teacher_states": -output.latent_states.detach()}))
    assert_near(opposed["losses"]["align_loss"], torch.tensor(2.0))
    student, teacher = output.latent_states.detach(), batch["teacher_states"]
    naive = [
        1 - float(student[layer, n] @ teacher[layer, n] / student[layer, n].norm() / teacher[layer, n].norm())
        for layer in range(len(LAYERS))
        for n in range(student.shape[1])
    ]
    losses = objective(model, **batch)["losses"]
    assert float(losses["align_loss"]) == pytest.approx(sum(naive) / len(naive), abs=1e-5)
    whole = objective(model, **batch)["loss"]
    assert_near(whole, losses["ntp_loss"] + 4.0 * losses["align_loss"] + 0.5 * losses["scale_loss"])
    assert align_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(2, 19, 64\) at its latents, the teacher \(2, 18, 64\)"):
        objective(model, **(batch | {"teacher_states": teacher[:, :-1]}))
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`align_loss_weight`"):
            SftObjective(model.config, weight)


def test_latent_states_are_those_of_the_columns(mode_model, processor):
    """The same tensors as `hidden_states` would give, without keeping all of those."""
    processor = type(processor)(
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template,
        num_control_tokens=mode_model.config.num_control_tokens,
    )
    batch = DeepLatentCollator(processor, mode_model.config, "latent")(SAMPLES)
    both = mode_model(**batch, latent_state_layers=(1, 2, 3), output_hidden_states=True)
    alone = mode_model(**batch, latent_state_layers=(1, 2, 3))
    assert alone.hidden_states is None and len(both.hidden_states) == 4
    latents = batch["input_ids"] == mode_model.config.latent_pad_token_id
    for row in latents:
        first = 0
        columns = row.nonzero().flatten().tolist()
        for index, column in enumerate(columns):  # the controls come first
            first = column if index == 0 or columns[index - 1] != column - 1 else first
            row[column] = column - first >= mode_model.config.num_control_tokens
    expected = torch.stack([layer[latents] for layer in both.hidden_states[1:]])
    assert torch.equal(both.latent_states, expected) and torch.equal(alone.latent_states, expected)
    assert mode_model(**batch).latent_states is None
    plain = DeepLatentCollator(processor, mode_model.config, "latent")(SAMPLES[:1])
    assert getattr(mode_model(**plain, latent_state_layers=(1,)), "latent_states", None) is None


def test_text_loss_is_over_words_and_latent_starts(model, processor, monkeypatch):
    """Every other logit may be anything."""
    batch = collate(model, processor, SAMPLES)
    objective, head = SftObjective(model.config, 0.0), model.lm_head.forward
    expected = objective(model, **batch)["losses"]["ntp_loss"]
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    turns = (batch["labels"] != -100).float().cumsum(1) > 0
    config = model.config
    inside = (ids == config.latent_pad_token_id) | (ids == config.latent_end_token_id)
    is_target = mask & turns & ~inside & (ids != processor.tokenizer.encode("\n")[0])
    assert torch.equal(batch["labels"] != -100, is_target)
    read = F.pad(is_target[:, 1:], (0, 1))
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: head(hidden).masked_fill(~read[..., None], 1e4))
    assert_near(objective(model, **batch)["losses"]["ntp_loss"], expected)
    one = read.nonzero()[0].tolist()
    read[tuple(one)] = False
    assert abs(float(objective(model, **batch)["losses"]["ntp_loss"] - expected)) > 1e-3


def test_sharded_equals_one_process(tmp_path):
    """Loss and gradients of two processes with other numbers of blocks and images; none of them waits forever."""
    runs = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "sharded_sft.py"), str(rank), "2", str(tmp_path / "store")],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=240)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, output in zip(runs, outputs):
        assert run.returncode == 0, output[-3000:]
        assert output.count(" case ") == 12


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A DeepLatent model of random weights, and procedural questions."""
    folder = tmp_path_factory.mktemp("small")
    questions = write_dataset("all", 8, 0, folder / "data", image_size=112)
    backbone = write_backbone(texts_of(questions), folder / "backbone", 64, 2, 400)
    return convert_deeplatent(backbone, folder / "deeplatent", overrides={"latent_grid_size": 4}), questions


def train(stage: str, model_path, data_path, output_dir, **settings) -> LatentTrainer:
    defaults = {
        "stage": stage,
        "model_path": str(model_path),
        "data_path": str(data_path),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return sft.train_sft(*build_parser().parse_dict(defaults | settings))


def cache(model, data, output, **settings) -> Path:
    parser = cache_teacher_states.build_parser()
    cache_teacher_states.main(
        *parser.parse_dict({"model": str(model), "data_path": str(data), "output": str(output)} | settings)
    )
    return Path(output)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture(scope="module")
def taught(small, tmp_path_factory) -> tuple[Path, Path]:
    """An SFT-1 checkpoint and its states."""
    folder = tmp_path_factory.mktemp("taught")
    trainer = train("sft1", *small, folder / "sft1", num_train_epochs=6)
    losses = logged(trainer, "loss")
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    return folder / "sft1", cache(folder / "sft1", small[1], folder / "states", samples_per_shard=3)


def test_the_stages_end_to_end(small, taught, tmp_path):
    trainer = train("sft2", taught[0], small[1], tmp_path, num_train_epochs=8, teacher_states=str(taught[1]))
    for name in ("loss", "ntp_loss", "align_loss", "scale_loss"):
        losses = logged(trainer, name)
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), (name, losses)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    trained = trainer.model.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    inputs = processor.apply_chat_template(
        [trainer.train_dataset[0]["messages"][:1]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**inputs, max_new_tokens=4, min_latent_blocks=1, return_dict_in_generate=True)
    assert answer.num_latent_blocks.tolist() == [1]
    assert not (tmp_path / "training").exists()  # no weights of an objective, no teacher


def moved(trainer, start: Path) -> set[str]:
    before, after = AutoModel.from_pretrained(start).state_dict(), trainer.model.model.state_dict()
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


def test_what_trains_in_each_stage(small, taught, tmp_path):
    def kinds(names: set[str]) -> set[str]:
        return {name.split(".")[0 if name.startswith("latent") else 1] for name in names}

    trainer = train("sft1", *small, tmp_path / "1", max_steps=1)
    # Nor may a process count on their gradients, or decay them.
    assert not any(weight.requires_grad for name, weight in trainer.model.named_parameters() if "latent" in name)
    first = moved(trainer, small[0])
    assert kinds(first) <= {"language_model", "weight"} and first
    second = moved(
        train("sft2", taught[0], small[1], tmp_path / "2", max_steps=1, teacher_states=str(taught[1])), taught[0]
    )
    assert kinds(second) - {"weight"} == {"language_model", "latent_control", "latent_blocks"}


@pytest.mark.parametrize(
    "overrides, settings",
    [
        (["latentformer_layers=0"], {}),
        (["latentformer_layers=2"], {}),
        (["modulate_queries=false"], {}),
        (["modulate_images=false"], {}),
        (["latent_scale=fixed", "fixed_latent_grid=[3,3]"], {}),
        (["latent_mode=autoregressive", "num_autoregressive_latents=3"], {}),
        (["scale_loss_weight=0"], {}),
        ([], {"align_loss_weight": 0.0, "teacher_path": None}),
        ([], {"chain_of_thought": "text"}),
        ([], {"chain_of_thought": "visual"}),
        ([], {"lora": True, "lora_r": 4}),
        ([], {"bf16": True, CHECKPOINTING: True, "attn_implementation": "sdpa"}),
    ],
    ids=lambda value: " ".join(map(str, value)) or "-" if isinstance(value, list | dict) else str(value),
)
def test_every_ablation_trains(small, taught, tmp_path, overrides, settings):
    settings = {"teacher_path": str(taught[0]), "max_steps": 2, "config_overrides": overrides} | settings
    trainer = train("sft2", taught[0], small[1], tmp_path, **settings)
    losses = logged(trainer, "loss")
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    has_blocks = settings.get("chain_of_thought") != "text"
    assert ("align_loss" in trainer.state.log_history[0]) == (has_blocks and settings.get("align_loss_weight") != 0.0)
    has_scale = has_blocks and not {"latent_mode=autoregressive", "latent_scale=fixed"} & set(overrides)
    assert [loss > 0 for loss in logged(trainer, "scale_loss")] == [has_scale] * 2
    config = AutoModel.from_pretrained(tmp_path).config
    for override in overrides:
        name, value = override.split("=")
        assert str(getattr(config, name)).lower().replace(" ", "") in (value, f"{value}.0")
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.num_control_tokens == config.num_control_tokens


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "stage, settings",
    [
        ("sft1", {}),
        ("sft2", {}),
        ("sft2", LORA | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    ],
    ids=["sft1", "sft2", "sft2-lora-accumulated"],
)
def test_killed_and_resumed_equals_uninterrupted(small, taught, tmp_path, monkeypatch, stage, settings):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "seed": 5} | settings
    if stage == "sft2":
        settings["teacher_states"] = str(taught[1])
    monkeypatch.setattr(training_model, "save_trained", lambda trainer: None)
    whole = train(stage, taught[0], small[1], tmp_path / "whole", **settings)
    step = LatentTrainer.training_step

    def kill(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LatentTrainer, "training_step", kill)
        with pytest.raises(Killed):
            train(stage, taught[0], small[1], tmp_path / "cut", **settings)
    half = shutil.copytree(tmp_path / "cut" / "checkpoint-2", tmp_path / "cut" / "checkpoint-12")
    (half / "trainer_state.json").unlink()
    resumed = train(stage, taught[0], small[1], tmp_path / "cut", resume_from_checkpoint="last", **settings)
    for name in ("loss", "ntp_loss", *(("align_loss", "scale_loss") if stage == "sft2" else ())):
        assert len(logged(whole, name)) == 5
        assert logged(resumed, name) == pytest.approx(logged(whole, name), abs=1e-6), name
    expected, actual = whole.model.state_dict(), resumed.model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-6, rtol=0, msg=name)


def test_lora_is_merged_and_lies_apart(small, taught, tmp_path):
    train("sft2", taught[0], small[1], tmp_path, max_steps=2, teacher_states=str(taught[1]), **LORA)
    merged = load_file(tmp_path / "model.safetensors")
    assert not [name for name in merged if "lora" in name or "modules_to_save" in name]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    start = AutoModel.from_pretrained(taught[0]).state_dict()
    after = AutoModel.from_pretrained(tmp_path).state_dict()
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert any(".q_proj." in name for name in changed) and any("latent_blocks" in name for name in changed)
    assert not any("visual" in name or "norm" in name and "latent" not in name for name in changed)


def test_papers_defaults():
    arguments = SftTrainingArguments("unused", use_cpu=True)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.num_train_epochs) == (1e-5, 0.01, 1)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (1, 16)


def test_evaluation(small, taught, tmp_path):
    settings = {"eval_data_path": str(small[1]), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = train("sft2", taught[0], small[1], tmp_path, teacher_path=str(taught[0]), **settings)
    for loss, ntp, align, scale in zip(
        *(logged(trainer, f"eval_{name}") for name in ("loss", "ntp_loss", "align_loss", "scale_loss"))
    ):
        assert loss == pytest.approx(ntp + 4 * align + 0.5 * scale, rel=1e-4)
    with pytest.raises(ValueError, match="are those of the training data"):
        train("sft2", taught[0], small[1], tmp_path, teacher_states=str(taught[1]), **settings)


def test_wrong_arguments_raise(small, taught, tmp_path):
    def run(stage="sft2", **settings):
        train(stage, taught[0], small[1], tmp_path, max_steps=1, **settings)

    with pytest.raises(ValueError, match="aligns latents to a teacher"):
        run()
    with pytest.raises(ValueError, match="holds no finished teacher states"):
        run(teacher_states=str(tmp_path))
    with pytest.raises(ValueError, match=r"`align_layers` must be distinct numbers within 1\.\.2, got \[3\]"):
        run(teacher_path=str(taught[0]), align_layers=[3])
    with pytest.raises(ValueError, match=r"`config_overrides` names \['no_field'\]"):
        run(config_overrides=["no_field=1"])
    with pytest.raises(SystemExit):
        train_deeplatent.main(["--stage", "sft3"])


def test_overrides_keep_their_kind(small):
    config = load_config(small[0], ["log_sigma_init=-2", "latentformer_layers=2"])
    assert config.log_sigma_init == -2.0 and isinstance(config.log_sigma_init, float)
    assert config.latentformer_layers == 2


@pytest.mark.parametrize("name", ["to_dict", "use_return_dict"])
def test_methods_and_properties_of_a_config_are_no_fields(small, name):
    assert hasattr(load_config(small[0]), name)
    with pytest.raises(ValueError, match=rf"`config_overrides` names \['{name}'\]"):
        load_config(small[0], [f"{name}=3"])


CONFIGS = sorted((ROOT / "train" / "accelerate").glob("*.yaml"))


def test_accelerate_configs_parse():
    from accelerate.commands.config.config_args import load_config_from_file

    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "single_gpu", "zero2", "zero3"]
    for path in CONFIGS:
        config = load_config_from_file(str(path))
        assert config.mixed_precision == "bf16"
        written = yaml.safe_load(path.read_text())
        wrapped = written.get("fsdp_config", {}).get("fsdp_transformer_layer_cls_to_wrap")
        if path.stem == "fsdp2":
            assert set(wrapped.split(",")) == {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "LatentBlockBuilder"}
            assert written["fsdp_config"]["fsdp_version"] == 2


@pytest.mark.parametrize(
    "name, processes",
    [
        ("ddp", 2),
        pytest.param("single_gpu", 1, marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, marks=pytest.mark.slow),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
        pytest.param("zero3", 2, marks=pytest.mark.slow),
    ],
)
def test_the_command_under_accelerate(small, taught, tmp_path, name, processes):
    """As far as a CPU goes, where accelerate falls back to DDP: every config starts a run that ends."""
    flags = f"""--model_path {taught[0]} --data_path {small[1]} --teacher_states {taught[1]} --output_dir {tmp_path / "out"}
        --stage sft2 --use_cpu --max_steps 2 --gradient_accumulation_steps 1 --logging_steps 1 --report_to none
        --resume_from_checkpoint last --save_steps 1 --gradient_checkpointing"""
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "no"]
        + ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
        + ["--config_file", str(ROOT / "train" / "accelerate" / f"{name}.yaml")]
        + ["-m", "train.train_deeplatent", *flags.split()],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if entry["align_loss"] > 0]) == 2
    # Recorded by a process of its own, and not for the run's own checkpoints.
    assert AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).check_known_answers().worst < 0.5
    assert not (tmp_path / "out" / "checkpoint-2" / "known_answers").exists()
