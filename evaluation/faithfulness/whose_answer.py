"""D15: after a swap, whose answer is given?

All latents, or each alone, are those of another picture with another true answer whose question needs as many steps. Of the answers
it is then known whose they are:

    donor's      what the donor's question asks for, in the donor's picture
    own          what one's own question asks for, as if nothing had been swapped
    continued    one's own picture, followed on from where the donor was: latent i alone says where the donor is after i moves, and the
                 k - i moves that are left are done in one's own picture. From i = k on this is the donor's answer

A donor is taken only where these three differ. Latents behind the swapped one are the model's own, made with it before them.

Expected of latents that do one step each: continued for i < k, the donor's for i = k and for all latents. Behind k one has arrived, and
nothing is expected: the answer stays one's own where it is read off latent k, and is the donor's where it is held to the end. Chance: the
answers as they are, had any other donor been drawn (own: one of the choices).
"""

import numpy as np

from evaluation.donors import chance_to_follow
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.lending import table_of
from evaluation.faithfulness.need import chance_of
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.serial_items import Unit, Way, at_unit, find_units, find_ways, group_by_need
from evaluation.faithfulness.statistics import share_interval
from evaluation.faithfulness.subject import Arm, Subject
from evaluation.scoring import form_of


WHOSE = ("donor's", "own", "continued", "expected")
Candidates = tuple[str, str, str | None]  # donor's answer, one's own, and the continued way (None: it has ended)


def measure_whose_answer(subject: Subject) -> Result:
    """Swap all latents and each alone.

    Raises:
        NotApplicable: the data say of no question what it needs, or no item has a donor.
    """
    ways = find_ways(subject)
    units, peers = find_units(subject, list(ways)), list_peers(subject, ways)
    result = Result(
        "D15",
        "D15: whose answer",
        "Shares of answers after a swap of all latents, and of each latent alone: the donor's, one's own, and what one's own picture "
        "gives when the way is followed on from the donor's state. Donors need as many steps, and all three answers differ. Intervals by "
        "Wilson, chance: had any other donor been drawn.",
    )
    rows, donors, points = [], [], {name: [] for name in WHOSE}
    for unit in (None, *units):
        found = ask_swapped(subject, ways, unit, peers)
        name = "all" if unit is None else unit.label
        if found is None:
            result.not_applicable[f"latents {name}"] = "no item that has them has a donor"
            continue
        said, eligible, chosen, excluded = found
        for need, members in group_by_need(ways, list(said)).items():
            row = describe(subject, ways, unit, said, eligible, chosen, members)
            left_out = [number for number in excluded if need in ("all", str(ways[number].need))]
            rows.append({"swapped": name, "need k": need, "items": len(members), "without donor": len(left_out)} | row)
            if need == "all":
                for whose in WHOSE:
                    points[whose].append((name, *(row[f"{whose}{part}"] for part in ("", ", low", ", high"))))
        donors += [
            {
                "swapped": name,
                "id": subject.items[own].name,
                "donor_id": subject.items[donor].name,
                "answer": said[own],
            }
            for own, donor in chosen.items()
        ]
    if not rows:
        raise NotApplicable(
            "no item has a donor: another picture, another answer, and a question that needs as many steps"
        )
    result.tables["whose answer"] = rows
    result.details["donors"] = donors
    result.curves = [
        Curve(f"answers that are {whose}", "swapped latent", "share", {whose: points[whose]}, "bar") for whose in WHOSE
    ]
    result.notes = [judge(rows)]
    return result


def answers_from(own: Way, donor: Way, unit: Unit | None) -> Candidates:
    """What each would answer, in the form in which answers are read."""
    row = own.item.row
    moves = own.need if unit is None else min(unit.number, own.need)
    on = None if moves == own.need else own.continued(donor.state(moves), moves)
    return form_of(donor.answer, row), form_of(own.answer, row), None if on is None else form_of(on, row)


def list_peers(subject: Subject, ways: dict[int, Way]) -> dict[int, list[int]]:
    """By item the donors whose question needs as many steps, in the order in which they are drawn."""
    return {
        number: [one for one in subject.donors.order(number, "task") if one in ways and ways[one].need == way.need]
        for number, way in ways.items()
    }


def find_donors(
    subject: Subject, ways: dict[int, Way], unit: Unit | None, number: int, peers: list[int]
) -> dict[int, Candidates]:
    """By donor, in the order in which they are drawn, what each would answer."""
    own, found = ways[number], {}
    moves = own.need if unit is None else min(unit.number, own.need)
    for donor in peers:
        if unit is not None and not unit.is_in(subject.clean[donor]):
            continue
        candidates = answers_from(own, ways[donor], unit)
        wanted = candidates if moves < own.need else candidates[:2]
        if None not in wanted and len(set(wanted)) == len(wanted):
            found[donor] = candidates
    return found


def ask_swapped(subject: Subject, ways: dict[int, Way], unit: Unit | None, peers: dict[int, list[int]]):
    """(what was said by item, its eligible donors, the one that lent, items without a donor); None where no item has one."""
    numbers = [number for number in ways if unit is None or unit.is_in(subject.clean[number])]
    eligible = {number: find_donors(subject, ways, unit, number, peers[number]) for number in numbers}
    chosen = {number: next(iter(found)) for number, found in eligible.items() if found}
    if not chosen:
        return None
    table = table_of(subject, chosen)
    label = "all latents" if unit is None else f"latent {unit.label}"
    arm = Arm(
        f"whose {label}",
        f"{label} of another picture",
        table if unit is None else at_unit(table, unit),
        only=set(chosen),
        donors=chosen,
    )
    answers = subject.ask(arm)
    readings = subject.readings([answers[number] for number in chosen], list(chosen))
    said = {number: reading.answer for number, reading in zip(chosen, readings)}
    return said, eligible, chosen, [number for number in numbers if number not in chosen]


def describe(
    subject: Subject,
    ways: dict[int, Way],
    unit: Unit | None,
    said: dict,
    eligible: dict,
    chosen: dict,
    members: list[int],
) -> dict:
    """Shares of some items' answers, with intervals and chance."""
    is_whose = {name: np.full((len(members), 1), np.nan) for name in WHOSE}
    chances = {name: np.full((len(members), 1), np.nan) for name in WHOSE}
    for row, number in enumerate(members):
        others = list(eligible[number].values())
        donor, own, on = eligible[number][chosen[number]]
        has_arrived = unit is not None and unit.number > ways[number].need
        expected = None if has_arrived else donor if on is None else on
        for name, answer in (("donor's", donor), ("own", own), ("continued", on), ("expected", expected)):
            if answer is not None:
                is_whose[name][row] = said[number] == answer
        chances["donor's"][row] = chance_to_follow(said[number], [one[0] for one in others])
        if on is not None:
            chances["continued"][row] = chance_to_follow(said[number], [one[2] for one in others])
        chances["own"][row] = chance_of(subject, [number])
        if expected is not None:
            chances["expected"][row] = chances["donor's" if on is None else "continued"][row]
    found = {}
    for name in WHOSE:
        share, low, high = share_interval(is_whose[name])
        found |= {
            name: share,
            f"{name}, low": low,
            f"{name}, high": high,
            f"{name}, by chance": mean_of(chances[name]),
        }
    is_known = np.nanmax(np.concatenate([is_whose[name] for name in ("donor's", "own", "continued")], axis=1), axis=1)
    return found | {"nobody's": float(1 - is_known.mean())}


def mean_of(values: np.ndarray) -> float:
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def judge(rows: list[dict]) -> str:
    total = [
        row for row in rows if row["need k"] == "all" and row["expected"] == row["expected"]
    ]  # nan: none needs so many
    parts = [
        f"{row['swapped']}: {100 * row['expected']:.1f} % ({100 * row['expected, low']:.1f} to {100 * row['expected, high']:.1f}; by "
        f"chance {100 * row['expected, by chance']:.1f}), own {100 * row['own']:.1f} %"
        for row in total
    ]
    listed = "; ".join(parts)
    return f"Answers that latents of one step each would give, over questions that need the swapped latent. {listed}."
