"""Training from a checkout: data, objectives and one command per architecture. Not installed with the library.

Modules that stood elsewhere in version 0.1 are still found under their old names until version 0.3, with a warning that names
the new one: `from train.evaluation.rows import ..` and `python -m train.faithfulness` work. `MOVED` is the table.
"""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


# Old name to new name of modules and of packages with all that is in them.
MOVED = {
    "train.faithfulness": "evaluation.faithfulness",
    "train.analyses": "evaluation.analyses",
    "train.adapters": "evaluation.harnesses",
    "train.evaluation.evaluation": "evaluation.evaluate_rows",
    "train.evaluation.answering": "evaluation.answering",
    "train.evaluation.donors": "evaluation.donors",
    "train.evaluation.loading": "evaluation.loading",
    "train.evaluation.processes": "evaluation.processes",
    "train.evaluation.report": "evaluation.report",
    "train.evaluation.results": "evaluation.results",
    "train.evaluation.rows": "evaluation.rows",
    "train.evaluation.scoring": "evaluation.scoring",
    "train.evaluation.swapping": "evaluation.swapping",
    "train.evaluation.tables": "evaluation.tables",
    "train.evaluate": "evaluation.evaluate",
    "train.answers": "evaluation.answers",
    "train.own_models": "conversion.own_models",
    "train.config_overrides": "conversion.config_overrides",
    "train.reasoning_data": "train.data.reasoning_data",
    "train.tasks": "train.data.tasks",
    "train.decontamination": "train.data.decontamination",
    "train.training_model": "train.common.training_model",
    "train.stages": "train.common.stages",
    "train.feature_cache": "train.common.feature_cache",
    "train.trained_sizes": "train.common.trained_sizes",
    "train.gradient_dynamics": "train.common.gradient_dynamics",
    "train.curriculum": "train.vedas.curriculum",
    "train.replay": "train.vedas.crop_distillation",
    "train.deeplatent_rl.replay": "train.deeplatent.rl.rescoring",
    "train.deeplatent_rl": "train.deeplatent.rl",
    "train.serial_recipes": "train.recipes.serial_recipes",
    "train.checkpoints": "train.recipes.shipping",
    "train.comparison": "train.recipes.comparison",
    "train.ablations": "train.recipes.ablations",
    "train.small_backbone": "train.recipes.small_backbone",
    "train.vision_pretraining": "train.recipes.vision_pretraining",
    "train.hardware": "train.recipes.hardware",
    "train.lare.small": "train.recipes.small_clip",
    "examples.looking": "examples.demo_common",
    "train.evaluation": "evaluation",
    "modeling_latentvlm.latent_decoding": "modeling_latentvlm.generation_common",
    "modeling_latentvlm.latent_generation": "modeling_latentvlm.generation_blocks",
    "modeling_latentvlm.block_decoding": "modeling_latentvlm.decoding_blocks",
    "modeling_latentvlm.step_decoding": "modeling_latentvlm.decoding_vedas",
    "modeling_latentvlm.refocus_decoding": "modeling_latentvlm.decoding_lare",
    "modeling_latentvlm.segment_decoding": "modeling_latentvlm.decoding_common",
    "modeling_latentvlm.generation_rules": "modeling_latentvlm.generation_checks",
    "modeling_latentvlm.segments": "modeling_latentvlm.latent_state",
    "modeling_latentvlm.latent_former": "modeling_latentvlm.latent_former_deeplatent",
    "modeling_latentvlm.refocus_extractor": "modeling_latentvlm.refocus_extractor_lare",
    "modeling_latentvlm.sliding_window": "modeling_latentvlm.sliding_window_lare",
    "modeling_latentvlm.routing": "modeling_latentvlm.routing_vedas",
    "modeling_latentvlm.visual_replay": "modeling_latentvlm.visual_replay_vedas",
}
# Attributes of modules whose old name is that of a package now, or that moved out of a module that kept its name.
MOVED_ATTRIBUTES = {
    "train.data": ("train.data.chats", "train.common.chat_collator"),
    "train.recipes": ("train.recipes.small_models",),
}


def new_name(name: str) -> str | None:
    """What a module of version 0.1 is called now; None for every other name."""
    package, _, rest = name, "", ""
    while package:
        if package in MOVED:
            return MOVED[package] + rest
        package, _, last = package.rpartition(".")
        rest = f".{last}{rest}"
    return None


WARNED: set[str] = set()


def warn_of(old: str, new: str) -> None:
    """Warn once of every old name."""
    if old not in WARNED:
        WARNED.add(old)
        message = f"`{old}` is called `{new}` since version 0.2; version 0.3 will not know the old name."
        warnings.warn(message, FutureWarning, stacklevel=3)


class MovedModule(Loader):
    """Gives a module under its old name: the same object, so that classes and settings are the same too."""

    def __init__(self, name: str):
        self.name = name

    def create_module(self, spec: ModuleSpec):
        module = importlib.import_module(self.name)
        self.kept = {name: getattr(module, name, None) for name in ("__spec__", "__loader__", "__package__")}
        return module

    def exec_module(self, module) -> None:
        for name, value in self.kept.items():  # the import system has put those of the old name in their place
            setattr(module, name, value)

    def get_code(self, fullname: str):
        """For `python -m`, which runs the code under the name `__main__`."""
        found = importlib.util.find_spec(self.name)
        return found.loader.get_code(self.name)


class MovedModuleFinder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        new = new_name(fullname)
        found = None if new is None else importlib.util.find_spec(new)
        if found is None:
            return None
        warn_of(fullname, new)
        spec = ModuleSpec(
            fullname, MovedModule(new), origin=found.origin, is_package=found.submodule_search_locations is not None
        )
        spec.submodule_search_locations = found.submodule_search_locations
        return spec


def moved_attribute(module: str, name: str):
    """For a package's `__getattr__`: what the module of this name held in version 0.1.

    Raises:
        AttributeError: it held no such thing.
    """
    if not name.startswith("__"):
        for place in MOVED_ATTRIBUTES[module]:
            found = importlib.import_module(place)
            if hasattr(found, name):
                warn_of(f"{module}.{name}", f"{place}.{name}")
                return getattr(found, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
    # Before the finder of files, which would load a second copy of what lies in a moved package.
    sys.meta_path.insert(0, MovedModuleFinder())
