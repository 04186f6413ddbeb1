"""The examples run as written, on a tiny checkpoint: asking, fine-tuning, LoRA, the demo."""

import re
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import encode, picture, user_turn
from evaluation_material import save_checkpoint, ship_random
from helpers import step_logits
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoProcessor

from evaluation.answering import Answer
from examples import chase, demo, page
from examples import demo_common as looking
from modeling_latentvlm.trace import LatentTrace
from train.data.tasks import write_dataset
from train.recipes.shipping import CHECKPOINTS, SUMS, WEIGHTS, write_sums


TRAINING = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "use_cpu": True, "seed": 0}


# Every architecture and mode: (kind, fields of its config).
MODELS = {
    "parallel": ("deeplatent", {}),
    "fixed": ("deeplatent", {"latent_scale": "fixed", "fixed_latent_grid": [2, 2]}),
    "autoregressive": ("deeplatent", {"latent_mode": "autoregressive"}),
    "lare": ("lare", {}),
    "blind": ("lare", {"answer_sees_image": False}),
    "vedas": ("vedas", {"num_latent_steps": 2}),
    "unrouted": ("vedas", {"num_latent_steps": 2, "routed_layers": []}),
}


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint(request, tmp_path_factory) -> str:
    kind, fields = MODELS[request.param]
    return str(save_checkpoint(kind, tmp_path_factory.mktemp("checkpoint") / request.param, **fields))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    return str(write_dataset("color", 4, 0, folder / "data", image_size=112))


def test_asking_prints_the_answer_and_draws(checkpoint, tmp_path, monkeypatch, capsys):
    from examples import ask

    picture(112, 112).save(tmp_path / "photo.png")
    trace = tmp_path / "trace.png"
    opens_blocks = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True).model_type == "deeplatent"
    given = ["--min-blocks", "2"] if opens_blocks else []
    arguments = [
        checkpoint,
        str(tmp_path / "photo.png"),
        "what?",
        "--max-new-tokens",
        "64",
        "--draw",
        str(trace),
        *given,
    ]
    monkeypatch.setattr(sys, "argv", ["ask", *arguments])
    ask.main()
    printed = capsys.readouterr().out
    counted = re.search(
        r"^Answer: .*\n(blocks|steps): (\d+), latents: (\d+)\ntrace: ", printed, re.MULTILINE | re.DOTALL
    )
    assert counted[1] == ("blocks" if opens_blocks else "steps") and int(counted[2]) > 1 and int(counted[3]) > 1
    assert trace.stat().st_size > 1000
    wrong = [[checkpoint, str(tmp_path / "none.png"), "what?"]]
    wrong += [] if opens_blocks else [[checkpoint, str(tmp_path / "photo.png"), "what?", "--min-blocks", "1"]]
    for arguments in wrong:
        monkeypatch.setattr(sys, "argv", ["ask", *arguments])
        with pytest.raises(SystemExit, match="2"):
            ask.main()
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_asking_for_more_blocks_than_a_model_opens_by_itself(tmp_path):
    from examples.ask import ask

    path = str(save_checkpoint("deeplatent", tmp_path / "checkpoint", max_latent_blocks=1))
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True)
    _, output = ask(model, processor, picture(56, 56), "what?", min_blocks=2, max_new_tokens=16)
    assert output.num_latent_blocks.tolist() == [2]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_finetuning_learns_and_the_checkpoint_loads_again(checkpoint, data, tmp_path):
    from examples.finetune import finetune

    before = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).state_dict()
    trainer = finetune(checkpoint, data, str(tmp_path / "tuned"), **TRAINING)
    found = losses(trainer)
    assert sum(found[-2:]) < 0.8 * sum(found[:2])
    again = AutoModel.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
        # Autoregressive blocks use no new weight, and a fixed size is not chosen.
        is_sequential = getattr(again.config, "latent_mode", None) == "autoregressive"
        is_fixed = getattr(again.config, "latent_scale", None) == "fixed"
        is_used = not is_sequential and not ("scale_head" in name and is_fixed)
        if is_used and again.config.is_new_weight(name):  # its latents took part
            assert not torch.equal(before[name], weight), name
    processor = AutoProcessor.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert processor.image_size == 56 or processor.trained_image_sizes == [[112, 112], [112, 112]]
    assert (tmp_path / "tuned" / "chat_template.jinja").is_file()


def test_lora_trains_loads_and_merges(checkpoint, data, tmp_path):
    from examples.lora import merge_adapter, train_adapter

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)

    trainer = train_adapter(checkpoint, data, str(tmp_path / "adapter"), **TRAINING)
    found = losses(trainer)
    assert sum(found[-2:]) < sum(found[:2])
    merged = merge_adapter(checkpoint, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    inputs = encode(processor, [user_turn("what?", picture(112, 112))])
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    if hasattr(merged.config, "max_latent_blocks"):
        settings["min_latent_blocks"] = 1
    adapted = step_logits(trainer.model.eval().generate(**inputs, do_sample=False, **settings))
    assert_close(step_logits(merged.generate(**inputs, do_sample=False, **settings)), adapted, atol=1e-4, rtol=1e-4)
    again = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert_close(step_logits(again.generate(**inputs, do_sample=False, **settings)), adapted, atol=1e-4, rtol=1e-4)
    base = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    assert (step_logits(base.generate(**inputs, do_sample=False, **settings)) - adapted)[:, 0].abs().max() > 1e-3


def run_demo(folder, output, *arguments) -> None:
    demo.main(["--checkpoints", str(folder), "--output", str(output), *arguments])


def test_the_demo_asks_all_and_draws_what_there_is(tmp_path, monkeypatch, capsys):
    folder, output = ship_random(tmp_path / "checkpoints"), tmp_path / "out"
    monkeypatch.setattr(looking, "MOST_TOKENS", 6)
    output.mkdir()
    (output / "deeplatent-1.png").touch()  # of an earlier run: this random one opens no block by itself
    with pytest.raises(SystemExit, match="1"):
        run_demo(folder, output, "--n", "2")
    printed = capsys.readouterr().out
    assert (
        printed.count("Question: What color") == printed.count("Question: The picture was cut") == len(looking.NAMES)
    )
    counts = "".join(f"{name}: 0 of 2 right\n" for name in looking.NAMES)
    assert printed.endswith(f"\n\n{counts}Only 0 of 6 are right: something is wrong here. Chance is about 1 in 6.\n")
    drawn = {f"{name}-{row}.png" for name in looking.NAMES if name != "deeplatent" for row in (1, 2)}
    assert {path.name for path in output.iterdir()} == drawn
    assert all(str(output / name) in printed for name in drawn)

    (folder / "vedas" / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="git checkout checkpoints.*make train-vedas"):
        looking.load_checkpoint.__wrapped__("vedas", folder)
    with pytest.raises(ValueError, match="`--n` must be >= 1, got 0"):
        run_demo(folder, output, "--n", "0")


def test_the_demo_counts_what_is_right(tmp_path, monkeypatch, capsys):
    samples = [looking.draw_sample("search", 0, index) for index in range(3)]
    wrong = next(color for color in samples[1].choices if color != samples[1].answer)
    told = [samples[0].answer.upper(), wrong, samples[2].answer]
    answers = [Answer(f"I look. The answer is \\boxed{{{one}}}.", 9, 1, 4, "eos") for one in told]
    monkeypatch.setattr(demo, "load_checkpoint", lambda *arguments: (None, None))
    monkeypatch.setattr(demo, "answer_with_trace", lambda *arguments: (answers, LatentTrace(3)))
    assert demo.show("lare", CHECKPOINTS, samples, tmp_path) == 2
    printed = capsys.readouterr().out
    assert f"{wrong} (wrong, it is {samples[1].answer}; 1 latent step, 4 latents)" in printed


@pytest.mark.parametrize("right, fails", [(3, False), (2, True)])
def test_wrong_chases_fail_the_demo_by_themselves(right, fails, tmp_path, monkeypatch, capsys):
    for name, value in (("check_checkpoints", lambda folder: None), ("show", lambda *arguments: 2)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "serial_names", lambda folder: ("lare",))
    monkeypatch.setattr(demo, "show_chase", lambda name, folder, samples, output: right)
    with pytest.raises(SystemExit, match="1") if fails else nullcontext():
        run_demo(tmp_path, tmp_path / "out", "--n", "2")
    printed = capsys.readouterr().out
    assert f"vedas: 2 of 2 right\nserial/lare: {right} of 4 right\n" in printed
    assert printed.endswith("Chance is about 1 in 8.\n") == fails


@pytest.mark.parametrize("run", [demo.main, page.main])
def test_demo_and_page_stop_with_a_table_where_answers_are_not_as_recorded(run, tmp_path, monkeypatch, capsys):
    """One weight of a copy is changed, in the files and in their hashes."""
    shutil.copytree(CHECKPOINTS, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "lare" / WEIGHTS)
    weights["refocus.out_proj.weight"] = weights["refocus.out_proj.weight"].flip(0).contiguous()
    save_file(weights, tmp_path / "lare" / WEIGHTS, {"format": "pt"})
    write_sums("lare", tmp_path)
    monkeypatch.setattr(page, "launch", lambda *arguments: pytest.fail("the page was served all the same"))
    monkeypatch.setattr(sys, "argv", ["page", "--checkpoints", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        run(["--checkpoints", str(tmp_path)]) if run is demo.main else run()
    printed = capsys.readouterr().out
    assert "NOT as recorded" in printed and "not those that the answers were recorded from" not in printed
    assert re.search(r"model, logits \(float32\) +\S+  DIFFERS", printed)
    assert "right" not in printed


@pytest.mark.skipif(not (CHECKPOINTS / SUMS).is_file(), reason="no trained checkpoint is there yet")
def test_the_demo_is_right_most_of_the_time(tmp_path, capsys):
    run_demo(CHECKPOINTS, tmp_path, "--n", "12", "--chases", "8")
    printed = capsys.readouterr().out
    counts = re.findall(r"^\w+: (\d+) of 12 right$", printed, re.MULTILINE)
    assert len(counts) == len(looking.NAMES) and min(map(int, counts)) > 6
    assert len(list(tmp_path.iterdir())) > 12
    chased = re.findall(r"^serial/\w+: (\d+) of 8 right$", printed, re.MULTILINE)
    assert len(chased) == len(chase.serial_names()) > 0 and min(map(int, chased)) > 5
    assert printed.count("4 hops after") == 2 * len(chased)
    traces = re.findall(r"Trace:    (.*-chase-\d\.png)$", printed, re.MULTILINE)
    assert len(traces) == 8 * len(chased) and all(Image.open(path).width > 1000 for path in traces)


def test_a_part_of_the_demo_that_is_wrong_fails_it():
    assert demo.judge({"lare": 8, "vedas": 0}, 6, 6) == demo.judge({}, 4, 8) == ""
    assert demo.judge({"vedas": 2}, 4, 8) == "Only 2 of 4 are right: something is wrong here. Chance is about 1 in 8."
