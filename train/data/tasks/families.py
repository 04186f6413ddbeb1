"""The names of all tasks, by family, and how evaluations group the families. Names only: anything may import it."""

# Tasks of one family share how their pictures are made; `train.data.tasks.TASKS` has the functions.
FAMILIES = {
    "shapes": ("color", "digit", "count", "position"),
    "search": ("search_color", "search_count", "search_position", "search_text"),
    "jigsaw": ("jigsaw",),
    "maze": ("maze_goal", "maze_move", "maze_length"),
    "chart": ("chart_value", "chart_largest", "chart_compare"),
    "relation": ("relation_color", "relation_side"),
    "serial": ("hops", "arrows", "trace"),
}
SEARCH = ("search", "chart", "relation")  # families: the answer stands in a small part of the picture
SYNTHESIS = ("jigsaw", "maze")  # families: the answer stands in a picture that has to be made first
SERIAL = ("serial",)  # families: the answer stands at the end of a way of so many moves
PRETRAINING = ("describe", "describe_search")  # tasks that teach to see; no part of "all"
LEVELS = ("easy", "hard")
ONE_LEVEL = ("shapes",)  # families that have no hard level


def tasks_of(name: str, level: str = "easy") -> tuple[str, ...]:
    """The tasks that a name given to `--task` deals in turn: all, those of a family, or itself; several names with commas.

    `search_color:4,jigsaw` deals four of the one for one of the other. "all" leaves out the families that do not have the
    level; a name with no such task, or a share that is no number above 0, gives none.
    """
    if "," in name:
        return tuple(task for one in name.split(",") for task in tasks_of(one, level))
    name, colon, share = name.strip().partition(":")
    if colon:
        return tasks_of(name, level) * (int(share) if share.isdecimal() else 0)
    there = {family: tasks for family, tasks in FAMILIES.items() if level == "easy" or family not in ONE_LEVEL}
    if name == "all":
        return tuple(task for tasks in there.values() for task in tasks)
    if name in there:
        return there[name]
    known = [task for tasks in there.values() for task in tasks] + list(PRETRAINING if level == "easy" else ())
    return (name,) if name in known else ()


def family_of(task: str) -> str:
    """The family of a task; "describe" for those that only teach to see."""
    return next((family for family, tasks in FAMILIES.items() if task in tasks), "describe")
