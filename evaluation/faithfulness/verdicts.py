"""What D1's arms say in words: only what the numbers can carry.

The content of latents is used where answers become wrong with the latents of another picture of the same task, and not merely lose
their form. That needs the `swap` arm, and enough items that changed: `MIN_DISCORDANT` of them in the first draw, a p-value that
holds for the number of arms, and an interval of the change below zero.

Where no loss is found, the verdict says how large a loss can still hide: the larger of the lower ends of both intervals. Up to
`MARGIN` points it says that the arm is as good as the clean run, else that the data do not tell.
"""

MARGIN = 5.0  # points of accuracy that do not matter
MIN_DISCORDANT = 10  # items right in one arm alone; from 6 on an exact test can reach p = 0.05
LEVEL = 0.05


def loses(row: dict) -> bool:
    """Whether an arm is worse than the clean run, beyond doubt."""
    return (
        row["b"] > row["c"] and row["b"] + row["c"] >= MIN_DISCORDANT and row["p (Holm)"] < LEVEL and row["high"] < 0
    )


def loses_form(row: dict) -> bool:
    """Whether the loss is one of answers that the questions do not allow: at most a tenth of it is among the others."""
    return loses(row) and 10 * max(0, row["b, both valid"] - row["c, both valid"]) <= row["b"] - row["c"]


def largest_loss(row: dict) -> float:
    """The largest loss of accuracy that the data allow, in points."""
    return max(0.0, -row["low"], -row["score low"])


def describe_loss(row: dict) -> str:
    return (
        f"{row['change of accuracy']:+.1f} points ({row['low']:+.1f} to {row['high']:+.1f}; b = {row['b']}, c = {row['c']}, "
        f"p = {row['p (Holm)']:.2g} after Holm)"
    )


def describe_no_loss(row: dict) -> str:
    """What can be said of an arm that does not lose."""
    bound, discordant = largest_loss(row), row["b"] + row["c"]
    size = (
        f"no loss larger than {bound:.1f} points ({discordant} of {row['items']} items changed; a loss of "
        f"{row['detectable']:.1f} would have been found in 4 of 5 cases)"
    )
    return size if bound <= MARGIN else f"not decided: {size}, which is more than the margin of {MARGIN:g}"


def verdict(rows: list[dict]) -> str:
    """What the arms that keep size and distribution of latents say about their content.

    Args:
        rows: of `outcomes.describe_group`, the clean run first.
    """
    found = {row["arm"]: row for row in rows}
    swap, other = found.get("swap"), found.get("cross_task")
    if swap is None:
        return "No verdict: whether the content of the latents is used takes the arm swap, which is not there."
    if loses_form(swap):
        kept = swap["both valid"]
        text = (
            f"With another picture's latents of the same task the answers lose their form: {describe_loss(swap)}, "
            f"{swap['outside choices']} of {swap['answers']} are none that the questions allow. "
        )
        text += (
            f"The {kept} of {swap['items']} that keep it are as often right as before."
            if 2 * kept >= swap["items"]
            else f"Only {kept} of {swap['items']} keep it, which says nothing of the content of the latents."
        )
    elif loses(swap):
        text = f"The content of the latents is used: with another picture's of the same task {describe_loss(swap)}."
    elif largest_loss(swap) <= MARGIN:
        text = (
            "The answers do not depend on what the latents hold of this picture: with another picture's of the same task "
            f"{describe_no_loss(swap)}."
        )
        if other is not None and loses(other):
            text += f" They depend on the task or form that latents carry: with those of another task {describe_loss(other)}."
    else:
        text = f"With another picture's latents of the same task: {describe_no_loss(swap)}."
    return " ".join([text, *remarks(found)])


def remarks(found: dict[str, dict]) -> list[str]:
    """How often answers change anyway, and what the other arms of the same size say."""
    lines, swap = [], found["swap"]
    if (sham := found.get("sham")) is not None:
        lines.append(
            f"{100 * swap['flip rate']:.1f} % of the answers change, and {100 * sham['flip rate']:.1f} % with one's own latents served "
            "again."
        )
    for name in ("shared", "matched"):
        if name in found:
            row = found[name]
            lines.append(f"{name}: {describe_loss(row) if loses(row) else describe_no_loss(row)}.")
    if swap["excluded"]:
        lines.append(f"{swap['excluded']} items without a donor are left out of swap.")
    return lines
