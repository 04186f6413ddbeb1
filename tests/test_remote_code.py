"""Checkpoints carry their own code: loaded, run, pushed and saved again where this package cannot be imported.

One process writes a checkpoint by every road there is, a second one that has never heard of the package loads it and
saves it again, a third one loads what the second wrote. Every process sends back what it saw; the tests compare.
"""

import ast
import copy
import hashlib
import inspect
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, LATENT_TOKENS, build_model, build_tokenizer, picture
from helpers import run_strictly
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, Trainer, TrainingArguments

from configuration_latentvlm import DeepLatentConfig, __version__
from configuration_latentvlm.hub_code import PACKAGES
from modeling_latentvlm import DeepLatentForConditionalGeneration
from processing_latentvlm import DeepLatentProcessor


pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]
OURS = (*PACKAGES, "conversion", "train")  # names that an installation or the checkout would make importable
HUB_ID = "me/tiny.vlm-1b"
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def dialogue(image: str) -> list[dict]:
    """With a block in its history, and one to come."""
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what colour?"}]},
        {"role": "assistant", "content": [{"type": "latent", "grid": [2, 1]}, {"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "and the small one?"}]},
    ]


def answer(model, processor, image: str) -> dict:
    """All that a user sees of a checkpoint."""
    inputs = processor.apply_chat_template(
        [dialogue(image)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    # A copy: weights mapped in from a file lie unaligned in memory, which can change the last bit of a product.
    output = copy.deepcopy(model).generate(
        **inputs,
        min_latent_blocks=1,
        max_latent_blocks=1,
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        output_latents=True,
    )
    return {
        **inputs,
        "sequences": output.sequences,
        "logits": torch.stack(output.logits, dim=1),
        "blocks": output.num_latent_blocks,
        **{f"latents {index}": step.latents for index, step in enumerate(output.latent_trace.steps)},
    }


def digest(model) -> str:
    """Of every weight, bit for bit."""
    found = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class FakeHub:
    """Stands for the Hub: keeps what is committed; `card` is the README.md that the repository has."""

    def __init__(self, card: str | None = None):
        self.card, self.files = card, {}

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **kwargs):
        self.files |= {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}
        self.card = self.files["README.md"].decode() if "README.md" in self.files else self.card

    def upload_folder(self, folder_path, **kwargs):
        self.files |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    def load_card(self, repo_id, **kwargs):
        if Path(repo_id).is_file():
            return ModelCard(Path(repo_id).read_text())
        if self.card is None:
            raise EntryNotFoundError(f"{repo_id} has no README.md")
        return ModelCard(self.card)


# What the other processes run, behind the four definitions above.
CLEAN_PROCESS = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import Trainer, TrainingArguments, pipeline

torch.set_num_threads(job["threads"])
seen = {"folders": {}}
for folder in job["load"]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    models, infos = {}, {}
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        name = auto_class.__name__
        models[name], info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        infos[name] = {kind: sorted(map(str, keys)) for kind, keys in info.items()}
    seen["folders"][folder] = {
        "classes": [f"{type(one).__module__}.{type(one).__qualname__}" for one in (config, processor, *models.values())],
        "bases": [len([base for base in type(one).__mro__ if base.__name__ == type(one).__name__]) for one in models.values()],
        "infos": infos,
        "weights": [digest(one) for one in models.values()],
        "answers": [answer(one.eval(), processor, job["image"]) for one in models.values()],
    }
    if folder in job["save"]:
        save, trainer, third = job["save"][folder]
        models["AutoModel"].save_pretrained(save)
        processor.save_pretrained(save)
        models["AutoModelForImageTextToText"].save_pretrained(third)
        processor.save_pretrained(third)
        args = TrainingArguments(output_dir=trainer, use_cpu=True, report_to="none")
        Trainer(model=models["AutoModelForCausalLM"], args=args, processing_class=processor).save_model()

ask = pipeline("image-text-to-text", model=job["load"][-1], trust_remote_code=True)
seen["pipeline"] = ask(
    text=dialogue(job["image"]), max_new_tokens=4, return_full_text=False,
    generate_kwargs={"min_latent_blocks": 1, "max_latent_blocks": 1, "do_sample": False, "eos_token_id": None},
)[0]["generated_text"]

hub = FakeHub()
transformers.utils.hub.hf_api, transformers.utils.hub.ModelCard.load = lambda: hub, hub.load_card
models["AutoModel"].push_to_hub("me/again")
processor.push_to_hub("me/again")
seen["pushed"] = hub.files

os.chdir(Path(job["image"]).parent)
exec(re.search("```python\\n(.*?)```", Path(job["load"][0], "README.md").read_text(), re.DOTALL)[1].replace("256", "3").replace("path/to/this/checkpoint", job["load"][0]),
     {"path": job["load"][0]})
seen["ours"] = [name for name, module in sys.modules.items() if module and name.partition(".")[0] in job["ours"]]
torch.save(seen, job["out"])
"""


def run_clean(script_dir: Path, **job) -> dict:
    """Run `CLEAN_PROCESS` in a process that shares neither environment, module cache nor package with this one."""
    script_dir.mkdir()
    job |= {"ours": OURS, "threads": torch.get_num_threads(), "out": str(script_dir / "seen.pt")}
    header = (
        "import copy, hashlib, os, re, sys\nfrom pathlib import Path\nfrom types import SimpleNamespace\n"
        f"job = {job!r}\n"
        # An installed package, editable or not, is out of reach: Python takes None for `there is no such module`.
        "sys.modules.update(dict.fromkeys(job['ours']))\n"
        "import torch, transformers\nfrom huggingface_hub import ModelCard\n"
        "from huggingface_hub.errors import EntryNotFoundError\n"
    )
    shared = "\n\n".join(inspect.getsource(one) for one in (dialogue, answer, digest, FakeHub))
    script = script_dir / "clean_process.py"
    script.write_text(header + shared + CLEAN_PROCESS, encoding="utf-8")
    kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = {
        **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
        "HOME": str(script_dir),
        "PYTHONPATH": os.pathsep.join(kept),
        "HF_HOME": str(script_dir.parent / "hf_home"),
        "HF_MODULES_CACHE": str(script_dir / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = run_strictly(str(script), env=environment, cwd="/")
    return torch.load(script_dir / "seen.pt", weights_only=True) | {"printed": done.stdout}


def put_on_hub(folder: Path, hf_home: Path) -> None:
    """Lay a checkpoint out as the Hub's cache does, where it loads by name without a network."""
    repository, commit = hf_home / "hub" / f"models--{HUB_ID.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def processor(image_processor) -> DeepLatentProcessor:
    """Its own: a tokenizer saves the padding of its last call, and others use the shared one."""
    return DeepLatentProcessor(image_processor, build_tokenizer(LATENT_TOKENS), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def original(tokenizer) -> DeepLatentForConditionalGeneration:
    return build_model(tokenizer, base_model="Qwen/Qwen2.5-VL-3B-Instruct", base_model_license="apache-2.0")


@pytest.fixture(scope="module")
def journey(original, processor, tmp_path_factory) -> SimpleNamespace:
    """`first` and `trainer` are written here, the others in a clean process that loaded `first`."""
    root = tmp_path_factory.mktemp("journey")
    folders = {name: root / name for name in ("first", "trainer", "saved", "resaved_trainer", "third", "fourth")}
    image = root / "photo.jpg"
    picture(56, 84, 1).save(image)
    original.save_pretrained(folders["first"])
    processor.save_pretrained(folders["first"])
    args = TrainingArguments(output_dir=str(root / "elsewhere"), use_cpu=True, report_to="none")
    # A copy: Trainer writes `use_cache` into the config of the model it is given.
    Trainer(model=copy.deepcopy(original), args=args, processing_class=processor).save_model(str(folders["trainer"]))
    put_on_hub(folders["first"], root / "hf_home")
    first = str(folders["first"])
    second_process = run_clean(
        root / "second",
        load=[first],
        save={first: [str(folders[name]) for name in ("saved", "resaved_trainer", "third")]},
        image=str(image),
    )
    names = ("saved", "resaved_trainer", "third", "trainer")
    third_process = run_clean(
        root / "third_process",
        load=[*(str(folders[name]) for name in names), HUB_ID],
        save={HUB_ID: [str(folders["fourth"]), str(root / "fifth"), str(root / "sixth")]},
        image=str(image),
    )
    expected = answer(original, processor, str(image))
    return SimpleNamespace(root=root, folders=folders, expected=expected, processes=(second_process, third_process))


def code_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}


def config_of(folder: Path) -> dict:
    return comparable((folder / "config.json").read_text())


def comparable(config: str | bytes) -> dict:
    """Without what transformers itself writes in one case and not in another."""
    fields = json.loads(config)
    fields.pop("use_cache", None)
    for part in ("text_config", "vision_config"):
        fields[part].pop("dtype", None)
    return fields


def test_the_package_is_out_of_reach_there(journey):
    """Otherwise nothing below would prove anything."""
    for seen in journey.processes:
        assert seen["ours"] == []
        for found in seen["folders"].values():
            assert all(name.startswith("transformers_modules.") for name in found["classes"])


def test_every_auto_class_loads_everything(journey):
    loaded = {folder: found for seen in journey.processes for folder, found in seen["folders"].items()}
    assert len(loaded) == 6
    for found in loaded.values():
        names = [name.rpartition(".")[2] for name in found["classes"]]
        assert names == ["DeepLatentConfig", "DeepLatentProcessor", *["DeepLatentForConditionalGeneration"] * 3]
        assert found["bases"] == [1, 1, 1]  # transformers wraps a class without `GenerationMixin` in a second one
        assert list(found["infos"]) == list(AUTO_CLASSES)
        for info in found["infos"].values():
            assert not any(info.values())


def test_weights_and_logits_are_the_same_bits(journey, original):
    weights = digest(original)
    assert journey.expected["blocks"].tolist() == [1]
    for seen in journey.processes:
        for folder, found in seen["folders"].items():
            assert found["weights"] == [weights] * 3, folder
            for given in found["answers"]:
                assert given.keys() == journey.expected.keys()
                for name, values in journey.expected.items():
                    assert torch.equal(given[name], values), (folder, name)


def test_pipeline_answers_there(journey, processor):
    new = journey.expected["sequences"][0, journey.expected["input_ids"].shape[1] :]
    for seen in journey.processes:
        assert seen["pipeline"] == processor.decode(new, skip_special_tokens=True)


def test_saved_again_is_the_same_checkpoint(journey):
    folders, first = journey.folders, journey.folders["first"]
    for name in ("trainer", "saved", "resaved_trainer", "third", "fourth"):
        folder = folders[name]
        extra = {"training_args.bin"} if "trainer" in name else set()
        assert {path.name for path in folder.iterdir()} == FILES | set(code_of(first)) | extra, name
        assert code_of(folder) == code_of(first), name
        assert config_of(folder) == config_of(first), name
        for file in ("README.md", "chat_template.jinja", "tokenizer.json", "model.safetensors"):
            assert (folder / file).read_bytes() == (first / file).read_bytes(), (name, file)


def test_the_code_is_flat_complete_and_no_more(journey):
    """What `auto_map` names, what that imports, and nothing that needs this repository."""
    code = code_of(journey.folders["first"])
    auto_map = json.loads((journey.folders["first"] / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoProcessor", *AUTO_CLASSES}
    pending, reached = [name.split(".")[0] for name in auto_map.values()], set()
    while pending:
        module = pending.pop()
        reached.add(f"{module}.py")
        for node in ast.walk(ast.parse(code[f"{module}.py"])):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level:
                pending += [name for name in names if f"{name}.py" not in reached]
            else:
                top = {name.partition(".")[0] for name in names}
                assert not top & {*OURS, "tests", "benchmarks", "examples", "qwen_vl_utils", "trl", "peft"}, module
    assert reached == set(code)
    sources = {path.name: path for package in PACKAGES for path in (ROOT / package).glob("[a-z]*.py")}
    for name, text in code.items():
        changed = re.sub(rf"^(\s*from )(?:{'|'.join(PACKAGES)})\.", r"\1.", sources[name].read_text(), flags=re.M)
        assert text == changed, name


def test_loaded_where_the_package_is_installed(journey, original, image_path):
    """The package's own classes serve, so that a developer runs the code in front of him."""
    folder = journey.folders["saved"]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor) is DeepLatentProcessor
    assert type(AutoConfig.from_pretrained(folder)) is DeepLatentConfig
    for auto_class in (DeepLatentForConditionalGeneration, *(getattr(transformers, name) for name in AUTO_CLASSES)):
        model, info = auto_class.from_pretrained(folder, output_loading_info=True)
        assert type(model) is DeepLatentForConditionalGeneration
        assert not any(info.values())
        assert digest(model) == digest(original)
        for name, values in answer(model, processor, image_path).items():
            assert torch.equal(values, journey.expected[name])


@pytest.fixture
def image_path(journey) -> str:
    return str(journey.root / "photo.jpg")


def test_a_loaded_model_is_saved_with_todays_code(journey, tmp_path):
    """By name, from a folder whose code is older: what is written is the installed package, and says so."""
    old = shutil.copytree(journey.folders["first"], tmp_path / "old")
    (old / "modeling_deeplatent.py").write_text("raise RuntimeError('old')\n")
    config = json.loads((old / "config.json").read_text()) | {"latentvlm_version": "0.0.1"}
    (old / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModel.from_pretrained(old, trust_remote_code=True)
    assert model.config.latentvlm_version == "0.0.1"
    model.save_pretrained(tmp_path / "new")
    assert code_of(tmp_path / "new").items() <= code_of(journey.folders["first"]).items()
    assert json.loads((tmp_path / "new" / "config.json").read_text())["latentvlm_version"] == __version__


def test_weights_are_safetensors_under_the_names_of_the_backbone(journey, original):
    """Large checkpoints come in shards; either way no pickle, and keys that other Qwen2.5-VL code knows."""
    saved = load_file(journey.folders["saved"] / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"model", "visual", "lm_head", "latent_control", "latent_blocks"}
    assert len(saved) == len(original.state_dict())
    folder = journey.root / "sharded"
    original.save_pretrained(folder, max_shard_size="300KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and not list(folder.glob("*.bin"))
    assert digest(DeepLatentForConditionalGeneration.from_pretrained(folder)) == digest(original)


def test_the_version_and_the_card(journey):
    folder = journey.folders["saved"]
    assert json.loads((folder / "config.json").read_text())["latentvlm_version"] == __version__
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert card.data.license == "apache-2.0"
    assert "deeplatent" in card.data.tags
    for stated in ("DeepLatentForConditionalGeneration", "Qwen/Qwen2.5-VL-3B-Instruct", "apache-2.0", __version__):
        assert stated in card.text
    for seen in journey.processes:  # they ran the card's own example
        assert re.search(r"tensor\(\[\d\]\) \['max_length'\]", seen["printed"])


@pytest.fixture
def hub(request, monkeypatch) -> FakeHub:
    fake = FakeHub(getattr(request, "param", None))
    for module in (transformers.utils.hub, transformers.modeling_utils, transformers.trainer):
        monkeypatch.setattr(module, "hf_api", lambda: fake)
    monkeypatch.setattr(ModelCard, "load", fake.load_card)
    return fake


@pytest.mark.parametrize("hub", [None, "# Model Card for Model ID\n\nnobody wrote more"], indirect=True)
@pytest.mark.parametrize("road", ["push_to_hub", "save_pretrained"])
def test_a_push_carries_weights_code_and_card(journey, original, processor, hub, road, tmp_path):
    if road == "push_to_hub":
        original.push_to_hub("me/model")
    else:
        original.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
    first = journey.folders["first"]
    assert set(hub.files) >= {"config.json", "model.safetensors", "README.md", "modeling_deeplatent.py"}
    for name, content in hub.files.items():
        assert content == (first / name).read_bytes(), name
    processor.push_to_hub("me/model")
    assert set(hub.files) == {path.name for path in first.iterdir()}
    assert b"pipeline_tag: image-text-to-text" in hub.files["README.md"]


def test_a_push_by_trainer_carries_weights_and_code(journey, original, processor, hub, tmp_path):
    """The card in it is Trainer's own, about the training run."""
    args = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", hub_model_id="me/run")
    Trainer(model=copy.deepcopy(original), args=args, processing_class=processor).push_to_hub()
    assert set(hub.files) == FILES | set(code_of(journey.folders["first"])) | {"training_args.bin"}


@pytest.mark.parametrize("hub", ["---\nlicense: mit\n---\n\n# Mine\n"], indirect=True)
def test_a_card_that_somebody_wrote_is_kept(original, hub, tmp_path):
    before = hub.card
    original.push_to_hub("me/model")
    assert hub.files["README.md"].decode() == before
    (tmp_path / "README.md").write_text("# Mine")
    original.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_a_push_from_where_the_package_is_not_installed(journey):
    first = journey.folders["first"]
    for seen in journey.processes:
        assert set(seen["pushed"]) == {path.name for path in first.iterdir()}
        assert comparable(seen["pushed"]["config.json"]) == config_of(first)
        for name in (*code_of(first), "model.safetensors", "README.md", "chat_template.jinja"):
            assert seen["pushed"][name] == (first / name).read_bytes(), name
