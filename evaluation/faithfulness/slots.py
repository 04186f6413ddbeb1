"""D3: is it the latents, their slots, their markers, or the form of the answer that helps? (2606.01287)

with latents   the model as it is
slots only     markers and the padding token's embedding in the place of every latent
markers only   the tokens around latents, and none between
format only    neither; but the answer begins with the words that all answers to these questions lead up to theirs with
nothing        K = 0

share of the gain kept = (Acc(arm) - Acc(nothing)) / (Acc(with latents) - Acc(nothing)), with its bootstrap interval
"""

import os

import numpy as np

from evaluation.faithfulness.architectures import put_before
from evaluation.faithfulness.arms import dummy_arm
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.outcomes import count_pairs, describe_form
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import gain_kept, holm, mcnemar, paired, share_interval
from evaluation.faithfulness.subject import Answer, Arm, Subject, without_latents


def measure_slots(subject: Subject) -> Result:
    nothing = without_latents(subject.architecture)
    answers: dict[str, list[Answer]] = {"with latents": subject.clean, "nothing": subject.ask(nothing)}
    result = Result(
        "D3",
        "D3: latents, slots, markers, format",
        "The same questions with latents; with slots of dummies; with the markers alone; with the "
        "form of the answer alone; with nothing. "
        "Share of gain kept = (Acc - Acc(nothing)) / (Acc(with latents) - Acc(nothing)).",
    )
    attempts = {"slots only": slots_only, "markers only": markers_only, "format only": format_only}
    for name, attempt in attempts.items():
        try:
            answers[name] = attempt(subject)
        except NotApplicable as reason:
            result.not_applicable[name] = str(reason)
    groups = {name: compare(subject, answers, numbers) for name, numbers in subject.tasks().items()}
    result.tables["arms"] = rows = groups["all"]
    by_task = [{"task": task} | row for task, found in groups.items() if task != "all" for row in found]
    if by_task:
        result.tables["arms by task"] = by_task
    points = [(row["arm"], row["accuracy"], row["accuracy low"], row["accuracy high"]) for row in rows]
    result.curves = [Curve("accuracy", "arm", "%", {"accuracy": points}, "bar")]
    if rows[0]["low, against nothing"] <= 0:
        result.notes.append("Latents bring no gain that is clear of chance here, so no share of it is given.")
    return result


def compare(subject: Subject, answers: dict[str, list[Answer]], numbers: list[int]) -> list[dict]:
    """The rows of all arms for some items; p is McNemar's against nothing, p (Holm) raised for the number of arms."""
    found = {name: subject.readings([given[number] for number in numbers], numbers) for name, given in answers.items()}
    right = {name: [reading.is_right for reading in readings] for name, readings in found.items()}
    rows = []
    for name in ("with latents", "slots only", "markers only", "format only", "nothing"):
        if name not in right:
            continue
        accuracy, low, high = share_interval([[one] for one in right[name]])
        change, low_change, high_change = paired(right[name], right["nothing"], subject.seed)
        kept, low_kept, high_kept = gain_kept(right[name], right["with latents"], right["nothing"], subject.seed)
        _, lost, gained, _ = count_pairs(*(np.array(right[arm], dtype=float) for arm in ("nothing", name)))
        rows.append(
            {
                "arm": name,
                "items": len(numbers),
                "accuracy": 100 * accuracy,
                "accuracy low": 100 * low,
                "accuracy high": 100 * high,
                "against nothing": 100 * change,
                "low, against nothing": 100 * low_change,
                "high, against nothing": 100 * high_change,
                "b": lost,
                "c": gained,
                "p": mcnemar(lost, gained),
                "share of gain kept": kept,
                "low, gain kept": low_kept,
                "high, gain kept": high_kept,
                **describe_form(found[name]),
            }
        )
    compared = [row for row in rows if row["arm"] != "nothing"]
    for row, raised in zip(compared, holm([row["p"] for row in compared])):
        row["p (Holm)"] = raised
    return rows


def slots_only(subject: Subject) -> list[Answer]:
    return subject.ask(dummy_arm(subject))


def markers_only(subject: Subject) -> list[Answer]:
    answers = []
    for batch in subject.batches("answering, markers only"):
        inputs = subject.encode([subject.items[number].sample for number in batch])
        begun = [subject.clean[number].tokens for number in batch]
        with subject.architecture.markers_only(inputs, begun) as (changed, settings, lengths):
            found = subject.generate(changed, CLEAN_OFF, batch, **settings)
        answers += [with_beginning(subject, number, length, one) for number, length, one in zip(batch, lengths, found)]
    return answers


CLEAN_OFF = Arm("off", "without latents", is_without_latents=True)


def with_beginning(subject: Subject, number: int, length: int, answer: Answer) -> Answer:
    """An answer with the words that stood in the prompt already, so that it is read as a whole."""
    if length:
        begun = subject.tokenizer.decode(subject.clean[number].tokens[: max(0, length - 2)], skip_special_tokens=True)
        answer.written = begun + answer.written
    return answer


def shared_lead(texts: list[str]) -> str:
    """The words that all answers end with before what they box, with `\\boxed{`; else those that all begin with.

    Raises:
        NotApplicable: they share none.
    """
    parts = [text.rpartition("\\boxed{") for text in texts]
    if all(box for _, box, _ in parts):
        ends = os.path.commonprefix([before[::-1] for before, _, _ in parts])[::-1]
        return ends.lstrip() + "\\boxed{"
    begins = os.path.commonprefix(texts)
    if not begins.strip():
        raise NotApplicable(
            "the answers to these questions share no words that could be given without giving one away"
        )
    return begins


def format_only(subject: Subject) -> list[Answer]:
    lead = shared_lead([answer.written for answer in subject.clean])
    tokens = subject.tokenizer(lead, add_special_tokens=False)["input_ids"]
    pad = subject.tokenizer.pad_token_id or 0
    answers = []
    with subject.architecture.with_latents(0) as settings:
        for batch in subject.batches("answering, format only"):
            inputs = put_before(
                subject.encode([subject.items[number].sample for number in batch]), [tokens] * len(batch), pad
            )
            for answer in subject.generate(inputs, CLEAN_OFF, batch, **settings):
                answer.written = lead + answer.written
                answers.append(answer)
    return answers
