"""Models that know their right answers: loaded with them, checked against them, saved with them while they still fit."""

import os
from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoProcessor
from transformers.utils import cached_file, logging

from .hub_code import PACKAGES, find_stale_code
from .model_card import write_model_card
from .answer_check import (
    AnswerReport,
    changed_fields,
    check_answers,
    is_check_wanted,
    reason_against_check,
)
from .complete_weights import check_weights_complete
from .known_answers import FILE, FOLDER, KnownAnswers, find_changed_weight, lasting_fields
from .lockstep import is_scattered


logger = logging.get_logger(__name__)
WRITE = "python -m conversion.check {} --write"
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
REMOTE = "transformers_modules."  # where transformers puts the code of checkpoints


def find_answers(source: str | os.PathLike | None, chosen: dict) -> bytes | None:
    """The answers file of a checkpoint, from a folder or, beside the weights, from the Hub."""
    if source is None:
        return None
    found = cached_file(
        str(source),
        f"{FOLDER}/{FILE}",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **chosen,
    )
    return None if found is None else Path(found).read_bytes()


class KnownAnswersMixin:
    """For a model that lies before `PreTrainedModel`: carries the known answers of the checkpoint it came from."""

    known_answers: bytes | None = None  # the answers file as it was loaded
    _answered_fields: dict | None = None  # of the config as it was loaded
    _loading_arguments: dict = {}  # which revision of which cache the checkpoint came from
    _being_saved: tuple[str | None] | None = None  # while it is: the reason against carrying the answers, or None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in transformers, but a checkpoint that is not all there is an error and no line in a log.

        Under a transformers newer than any that was tested, the known answers are checked.

        Raises:
            ValueError: a weight has another shape than the config says, or is missing or misnamed. Only a checkpoint without
                any of its new weights, which is a backbone's, may lack them; `ignore_mismatched_sizes=True` lets all through.
            RuntimeError: the model does not answer as it did when it was written; the message is a table.
        """
        is_wanted = is_check_wanted()
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} must be intact safetensors files: {error}"
            ) from error
        if not ignore_mismatched_sizes:
            check_weights_complete(model, info)
        if cls.__module__.startswith(PACKAGES) and pretrained_model_name_or_path is not None:
            stale = find_stale_code(pretrained_model_name_or_path, model.config.hub_classes)
            if stale is not None:
                logger.warning_once(
                    f"The code in {pretrained_model_name_or_path} is not that of the installed latentvlm ({stale} differs). The "
                    "installed code runs here; where it is not installed, the other runs. Bring it up to date by: "
                    f"python -m conversion.refresh_code {pretrained_model_name_or_path}"
                )
        chosen = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        model.known_answers = find_answers(pretrained_model_name_or_path, chosen)
        model._answered_fields, model._loading_arguments = lasting_fields(model.config), chosen
        if is_wanted:
            model._check_after_loading(str(pretrained_model_name_or_path))
        return (model, info) if output_loading_info else model

    def known_answer_settings(self, grids) -> dict:
        """What `generate` is asked for beside greedy decoding, so that latents are taken.

        Args:
            grids: (blocks, 2) sizes that blocks must have, or None.
        """
        return {}

    def check_known_answers(self, processor=None) -> AnswerReport:
        """Recompute the known answers that came with the checkpoint, and compare.

        Args:
            processor: by default that of the checkpoint.

        Raises:
            ValueError: the checkpoint has none, they are damaged, or those of another model.
        """
        source = self.config._name_or_path
        if self.known_answers is None:
            raise ValueError(
                f"{source or 'The model'} holds no known answers. Write them: {WRITE.format('CHECKPOINT')}"
            )
        known = KnownAnswers.from_bytes(self.known_answers, f"{source}/{FOLDER}/{FILE}")
        if processor is None:
            # The code that comes with the checkpoint is trusted where the model's own code came with it.
            is_remote = any(base.__module__.startswith(REMOTE) for base in type(self).__mro__)
            if not is_remote:
                import_module("processing_latentvlm")  # registers the processors
            arguments = {"trust_remote_code": is_remote, **self._loading_arguments}
            if is_remote and "revision" in arguments:
                arguments["code_revision"] = arguments["revision"]
            processor = AutoProcessor.from_pretrained(source, **arguments)
        return check_answers(self, processor, known, source)

    def _check_after_loading(self, source: str) -> None:
        """Check what was just loaded; where that is not possible, say so once, and how to.

        Raises:
            RuntimeError: the model does not answer as it did; the message is a table.
        """
        command = f"python -m conversion.check {source}"
        if self.known_answers is None:
            logger.warning_once(f"{source} has no known answers to check. Write them: {command} --write")
            return
        reason = reason_against_check(self)
        try:
            reason = reason or self._reason_by_content(source)
            report = None if reason else self.check_known_answers()
        except (ImportError, OSError, ValueError) as error:  # of the processor, or a damaged or foreign file
            reason = str(error)
        if reason:
            logger.warning_once(
                f"The known answers of {source} are not checked, since {reason}. Check them: {command}"
            )
        elif not report.passed:
            raise RuntimeError(f"{report}\nSet LATENTVLM_CHECK=0 to load it all the same.")

    def _reason_by_content(self, source: str) -> str | None:
        """Why the answers cannot be those of the model as it was loaded, or None."""
        known = KnownAnswers.from_bytes(self.known_answers, source)
        fields = changed_fields(self.config, known)
        return f"it was loaded with another config ({', '.join(fields)})" if fields else None

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        **kwargs,
    ) -> None:
        """As in transformers, with the known answers while they fit: no forward is run for them."""
        # Before, since saving empties `state_dict`, and since what is pushed is written before the upload.
        reason = self._reason_against_carrying(state_dict) if is_main_process else None
        self._being_saved = (reason,)
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
            if is_main_process:
                self._carry_answers(Path(save_directory), reason)
        finally:
            self._being_saved = None

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # transformers has just put its empty card in the place of ours.
        write_model_card(self.config, Path(working_dir))
        if self._being_saved is not None:  # else the folder is saved already
            self._carry_answers(Path(working_dir), self._being_saved[0])
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _carry_answers(self, folder: Path, reason: str | None) -> None:
        """Write the answers that were loaded unless there is a reason against it; what was there is of other weights."""
        target = folder / FOLDER / FILE
        if reason is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.known_answers)
            return
        if target.is_file():
            target.unlink()
            if not any(target.parent.iterdir()):
                target.parent.rmdir()
        # Once for all checkpoints of a run; a model that never had answers is no news.
        tell = logger.info if self.known_answers is None else logger.warning_once
        tell(f"Saved without known answers, since {reason}. Write them: {WRITE.format('CHECKPOINT')}")

    def _reason_against_carrying(self, state: dict | None) -> str | None:
        if self.known_answers is None:
            return "the model was loaded with none"
        if lasting_fields(self.config) != self._answered_fields:
            return "the config is not the one that was loaded"
        if state is None and any(is_scattered(weight) for weight in self.parameters()):
            return "its weights are sharded"  # to gather them, every process would have to take part
        try:
            known = KnownAnswers.from_bytes(self.known_answers, "the checkpoint that was loaded")
        except ValueError as error:
            return str(error)
        changed = find_changed_weight(known.weights, self.state_dict() if state is None else state)
        return None if changed is None else f"weights are not those that were loaded ({changed})"
