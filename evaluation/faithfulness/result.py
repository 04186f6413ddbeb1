"""What a diagnostic leaves: tables, curves and words, all of them JSON."""

from dataclasses import asdict, dataclass, field


@dataclass
class Curve:
    """One plot: named series over a shared axis, as lines or bars."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list]  # name -> [(x, y) or (x, y, low, high)]
    kind: str = "line"  # "line" or "bar" (x is then a name)


@dataclass
class Result:
    name: str
    title: str
    definition: str  # what is measured, in a sentence or two
    tables: dict[str, list[dict]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # how to read it; what was left out
    not_applicable: dict[str, str] = field(default_factory=dict)  # part (or "all") -> reason
    details: dict[str, list[dict]] = field(default_factory=dict)  # rows for the JSON, too many for the page

    def record(self) -> dict:
        return asdict(self)

    @classmethod
    def of(cls, record: dict) -> "Result":
        return cls(**record | {"curves": [Curve(**curve) for curve in record["curves"]]})
