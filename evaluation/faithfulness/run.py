"""Take all diagnostics of a subject, each once: what is done is kept in a file and not done again.

A file's name tells diagnostic, model, data, settings, code and libraries apart by a hash, so that a report that was killed goes on, and one on
another checkpoint starts anew.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from conversion.writing import write_file
from evaluation.faithfulness.arms import DRAWS
from evaluation.faithfulness.attention import measure_attention
from evaluation.faithfulness.audit import measure_invocation
from evaluation.faithfulness.collapse import measure_collapse
from evaluation.faithfulness.compute import measure_compute
from evaluation.faithfulness.interventions_report import measure_interventions
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.latent_only import measure_latent_only
from evaluation.faithfulness.lens import measure_lens
from evaluation.faithfulness.need import measure_need
from evaluation.faithfulness.norms import measure_norms
from evaluation.faithfulness.observation import Observed, observe
from evaluation.faithfulness.parity import measure_parity
from evaluation.faithfulness.patching import measure_patching
from evaluation.faithfulness.probe import measure_probe
from evaluation.faithfulness.replacement import measure_replacement
from evaluation.faithfulness.result import Result
from evaluation.faithfulness.retrieval import measure_retrieval
from evaluation.faithfulness.slots import measure_slots
from evaluation.faithfulness.step_content import measure_step_content
from evaluation.faithfulness.subject import Subject
from evaluation.faithfulness.whose_answer import measure_whose_answer


class Study:
    """A subject, and what is seen inside it, read when a diagnostic first needs it."""

    def __init__(self, subject: Subject, arms: tuple[str, ...], draws: int = DRAWS):
        self.subject, self.arms, self.draws = subject, arms, draws

    @cached_property
    def observed(self) -> dict[int, Observed]:
        return observe(self.subject)


DIAGNOSTICS: dict[str, tuple[str, Callable[[Study], Result]]] = {
    "D12": ("is latent mode entered?", lambda study: measure_invocation(study.subject)),
    "D1": ("replace the latents", lambda study: measure_interventions(study.subject, study.arms, study.draws)),
    "D2": ("what each latent does", lambda study: measure_replacement(study.subject, study.observed)),
    "D3": ("latents, slots, markers, format", lambda study: measure_slots(study.subject)),
    "D4": ("collapse", lambda study: measure_collapse(study.subject, study.observed)),
    "D5": ("linear probe", lambda study: measure_probe(study.subject, study.observed)),
    "D6": ("answers from the latents alone", lambda study: measure_latent_only(study.subject)),
    "D7": ("retrieval of the oracle", lambda study: measure_retrieval(study.subject)),
    "D8": ("norms", lambda study: measure_norms(study.observed)),
    "D9": ("attention", lambda study: measure_attention(study.subject, study.observed)),
    "D10": ("latents read as words", lambda study: measure_lens(study.subject, study.observed)),
    "D11": ("training is generation", lambda study: measure_parity(study.subject)),
    "D13": ("matched compute", lambda study: measure_compute(study.subject)),
    "D14": ("count against need", lambda study: measure_need(study.subject)),
    "D15": ("whose answer", lambda study: measure_whose_answer(study.subject)),
    "D16": ("which step holds what", lambda study: measure_step_content(study.subject)),
    "D17": ("patching between minimal pairs", lambda study: measure_patching(study.subject)),
}


def take_all(
    subject: Subject,
    arms: tuple[str, ...],
    cache: Path | None = None,
    key: str = "",
    draws: int = DRAWS,
    names: tuple[str, ...] = tuple(DIAGNOSTICS),
) -> list[Result]:
    """The diagnostics in order; one that makes no sense for this subject says why.

    Args:
        draws: donors of each item in D1's arms that swap.
        names: of the diagnostics, by default all.
    """
    study, results = Study(subject, arms, draws), []
    for name in (progress := tqdm([one for one in DIAGNOSTICS if one in names], desc="diagnostics")):
        progress.set_postfix_str(name)
        file = (
            None
            if cache is None
            else cache / f"{name}-{digest(key, name, (arms, draws) if name == 'D1' else ())}.json"
        )
        if file is not None and file.is_file():
            results.append(Result.of(json.loads(file.read_text(encoding="utf-8"), parse_constant=float)))
            continue
        title, measure = DIAGNOSTICS[name]
        try:
            result = measure(study)
        except NotApplicable as reason:
            result = Result(name, f"{name}: {title}", "", not_applicable={"all of it": str(reason)})
        if file is not None:
            keep(result, file)
        results.append(result)
    return results


def keep(result: Result, file: Path) -> None:
    write_file(file, json.dumps(result.record()))


def digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """Of names and contents."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.name.encode())
        with path.open("rb") as data:
            while block := data.read(1 << 20):
                found.update(block)
    return found.hexdigest()
