"""Registers the architectures when an auto class of transformers is first used, so that `import latentvlm` need not import it.

A package of ours registers its classes when it is imported (`configuration_latentvlm/__init__.py` says why there), which
imports torch and the backbones: seconds. transformers itself imports `AutoModel` when it is asked for that name; here the
packages are imported just before. While a module of transformers is being imported would be too early: ours need it whole.
"""

import sys
import threading
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


PACKAGES = ("configuration_latentvlm", "modeling_latentvlm", "processing_latentvlm")
AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # imported with the first of them
LOCK = threading.RLock()  # a second thread waits until the first has registered; the imports come here again


def uses_auto_classes(name: str) -> bool:
    return name.startswith("Auto") or name == "pipeline"


def register_at_first_use(transformers: ModuleType) -> None:
    """Import our packages when `transformers` is first asked for an auto class; then it has its own class again."""
    own_class, is_busy = type(transformers), False

    class AskedForAutoClass(own_class):
        def __getattr__(self, name: str):
            nonlocal is_busy
            with LOCK:
                if uses_auto_classes(name) and not is_busy and type(self) is AskedForAutoClass:
                    is_busy = True
                    try:
                        for package in PACKAGES:
                            import_module(package)
                        self.__class__ = own_class
                    finally:
                        is_busy = False
            return own_class.__getattr__(self, name)

    transformers.__class__ = AskedForAutoClass


class LoadAndWatch(Loader):
    """Loads transformers as its own loader does."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __getattr__(self, name: str):
        return getattr(self.loader, name)  # what else a loader may be asked for, such as `get_source`

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register_at_first_use(sys.modules[module.__name__])  # transformers puts another object there


class TransformersFinder(MetaPathFinder):
    """Finds transformers where it is, once, and nothing else."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LoadAndWatch(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register now if the auto classes are imported already, else when they are first used."""
    if AUTO_CLASSES in sys.modules:
        for package in PACKAGES:
            import_module(package)
    elif "transformers" in sys.modules:
        register_at_first_use(sys.modules["transformers"])
    else:
        sys.meta_path.insert(0, TransformersFinder())
