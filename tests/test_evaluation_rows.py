"""What is read from files of questions, and which answers count as right."""

import json

import pytest
from conftest import picture
from evaluation_material import write_jsonl, write_tsv
from PIL import Image

from evaluation.report import describe, draw_table, summarize, wilson_interval
from evaluation.rows import check_images, read_evaluation
from evaluation.scoring import extract, read_answer, truth_form
from train.data.tasks import generate_sample, write_dataset


COLORS = ["red", "green", "dark blue"]


def one_row(folder, **fields):
    path = folder / "one" / "data.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"id": 1, "question": "q?", "answer": "red"} | fields))
    return read_evaluation([path])[0]


def test_our_tasks_are_asked_as_they_were_trained(tmp_path):
    rows = read_evaluation([write_dataset("all", 4, 0, tmp_path / "all", image_size=112)])
    samples = [generate_sample("all", 0, index, image_size=112) for index in range(4)]
    assert [row.question for row in rows] == [sample.question for sample in samples]
    assert [row.task for row in rows] == ["color", "digit", "count", "position"] and {row.family for row in rows} == {
        "shapes"
    }
    assert all(row.answer_format == "choice" and not row.is_lettered for row in rows)
    assert rows[2].load_images()[0].tobytes() == samples[2].image.tobytes()
    assert all(read_answer(f"It is there.\nThe answer is \\boxed{{{row.answer}}}.", row).is_right for row in rows)


def test_family_and_task_stand_in_for_each_other(tmp_path):
    for fields, expected in [
        ({"family": "f", "task": "t"}, ("f", "t")),
        ({"family": "f"}, ("f", "f")),
        ({}, ("one",) * 2),
    ]:
        row = one_row(tmp_path, **fields)
        assert (row.family, row.task) == expected


@pytest.mark.parametrize("answer", ["green", "Green", "B", "(B)", 1])
def test_choices_without_a_chat_are_listed(tmp_path, answer):
    row = one_row(tmp_path, choices=COLORS, answer=answer, hint="look")
    assert row.question == "look\nq?\n(A) red\n(B) green\n(C) dark blue"
    assert row.is_lettered and row.answer == "green"


def test_a_number_names_a_choice_before_it_counts_them(tmp_path):
    assert one_row(tmp_path, choices=[2, 1, 0], answer=1).answer == "1"


def test_a_table_in_the_layout_of_vlmevalkit(tmp_path):
    (tmp_path / "beside.png").write_bytes(b"")
    rows = read_evaluation([write_tsv(tmp_path / "MMX.tsv", answer="C", C="dark blue")])
    assert [row.id for row in rows] == ["0", "1", "2", "3"] and all(row.is_lettered for row in rows)
    assert rows[0].question == 'look\nwhat colour is "it", 0?\n(A) red\n(B) green'
    assert [row.answer for row in rows] == ["red", "dark blue", "red", "green"]
    assert [row.family for row in rows] == ["MMX/near", "MMX/far"] * 2
    assert rows[1].load_images()[0].tobytes() == picture(56, 56, 1).tobytes()
    assert rows[3].images == rows[0].images  # by its index


def test_images_beside_a_table_and_several_of_them(tmp_path):
    for name in "ab":
        picture(28, 28, ord(name)).save(tmp_path / f"{name}.png")
    path = tmp_path / "t.tsv"
    path.write_text(
        "index\timage_path\tquestion\tanswer\n1\ta.png\tis it?\tyes\n2\t['a.png', 'b.png']\thow many?\t2\n"
    )
    first, second = read_evaluation([path])
    assert first.answer_format == "choice" and first.choices == ("Yes", "No") and not first.is_lettered
    assert read_answer("Yes, it is.", first).is_right and not read_answer("No, yes.", first).is_right
    assert second.answer_format == "number" and len(second.load_images()) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "q0"}, "Line 5 of .*data.jsonl has the id 'q0', which Line 1 of .* has too"),
        ({"id": None}, "Line 5 of .* must have `id`"),
        ({"question": " "}, "Line 5 of .* must have `question`"),
        ({"answer": None}, "Line 5 of .* must have `answer`"),
        ({"answer_format": "essay"}, "Line 5 of .*`answer_format` must be one of .*got 'essay'"),
        ({"answer_format": "number"}, "Line 5 of .*must be a number.*'left'"),
        ({"answer_format": "choice"}, "Line 5 of .*needs `choices`"),
        ({"choices": ["red", "blue"]}, r"Line 5 of .*must be one of the choices \['red', 'blue'\], got 'left'"),
        ({"choices": "red"}, "Line 5 of .*`choices` must be a list"),
        ({"image": "gone.png"}, "Line 5 of .*gone.png does not exist"),
        ({"image": 3}, "Line 5 of .*`image` must be a path"),
        ({"images": ["0.png"]}, "Line 5 of .*gives `image` and `images`"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_evaluation([write_jsonl(tmp_path, **changes)], limit=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": "0"}, "Row 2 of .*t.tsv has the id '0', which Row 1"),
        ({"answer": "D"}, "Row 2 of .*must be one of the choices"),
        ({"B": ""}, "Row 2 of .*no choice B, but one behind it"),
        ({"image": "no base64: " + 60 * "!"}, "Row 2 of .*no base64"),
        ({"image": "77"}, "Row 2 of .*neither base64 nor the index"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_evaluation([write_tsv(tmp_path / "t.tsv", **changes)])


def test_columns_and_files_that_are_not_there(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("index\tquestion\n1\tq\n")
    with pytest.raises(ValueError, match=r"t.tsv must have each column once and lacks \['answer', 'image"):
        read_evaluation([path])
    path.write_text("index\timage\tquestion\tanswer\n1\t\tq\n")
    with pytest.raises(ValueError, match="Row 1 of .* must have 4 columns"):
        read_evaluation([path])
    with pytest.raises(ValueError, match="no data file"):
        read_evaluation([tmp_path / "none.jsonl"])
    (tmp_path / "d.csv").write_text("a")
    with pytest.raises(ValueError, match="must be .jsonl or .tsv"):
        read_evaluation([tmp_path / "d.csv"])
    good = write_jsonl(tmp_path / "good")
    with pytest.raises(ValueError, match="twice"):
        read_evaluation([good, tmp_path / "good" / ".." / "good" / "data.jsonl"])


def test_an_image_that_cannot_be_read_is_named_with_its_row(tmp_path):
    path = write_jsonl(tmp_path)
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="Line 4 of .*data.jsonl.*3.png cannot be read"):
        check_images(read_evaluation([path]))
    table = write_tsv(tmp_path / "t.tsv", image="A" * 100)
    with pytest.raises(ValueError, match="Row 2 of .*t.tsv.*cannot be read"):
        check_images(read_evaluation([table]))


def test_the_digest_follows_pixels_and_answers(tmp_path):
    path = write_jsonl(tmp_path)
    digests = [check_images(read_evaluation([path])) for _ in range(2)]
    Image.new("RGB", (56, 56)).save(tmp_path / "2.png")
    digests.append(check_images(read_evaluation([path])))
    write_jsonl(tmp_path, answer="right")
    digests.append(check_images(read_evaluation([path])))
    assert digests[0] == digests[1] and len({digest[str(path)] for digest in digests}) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{a} or \\boxed{\\frac{1}{2}}", ("\\frac{1}{2}", True)),
        ("The answer is: B.\nFor sure", ("B.", True)),
        ("Answer: red", ("red", True)),
        ("an answer is red, no: the answer is blue", ("blue", True)),
        ("red \\boxed{blue", ("red \\boxed{blue", False)),
        (" red ", ("red", False)),
    ],
)
def test_where_the_answer_stands(text, expected):
    assert extract(text) == expected


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        (
            {"choices": COLORS, "answer": "C"},
            [
                "C",
                "(C)",
                "C. dark blue",
                "Dark  blue.",
                "\\boxed{C}",
                "dark blue, I think",
                "\\boxed{\\text{C}}",
                "Answer: $C$",
            ],
            ["D", "A", "blue", "Certainly", "dark blues", "C is wrong, \\boxed{A}", "", "C, A", "C) x, A) y", "C. red"]
            + ["dark blue, red", "dark blue. Or red.", "red and dark blue"],  # several choices are none
        ),
        (
            {"choices": ["E. coli", "C. elegans", "A. thaliana"], "answer": "C. elegans"},
            ["B", "C. elegans", "The answer is C. elegans."],
            ["C", "A. thaliana", "A", "E. coli"],
        ),
        ({"choices": ["E. coli", "C. elegans", "A. thaliana"], "answer": "A. thaliana"}, ["C"], ["C. elegans"]),
        ({"choices": COLORS, "messages": [{}]}, ["red", "\\boxed{Red}"], ["A", "(A)", "reddish"]),
        ({"choices": ["4", "4.5"], "messages": [{}], "answer": "4"}, ["4", "4."], ["4.5", "4, 4.5"]),
        ({"answer": "yes"}, ["Yes, there is no dog.", "yes"], ["Yes, no.", "yes and no", "no, yes", "no"]),
        ({"answer": "Big Ben"}, ["big ben.", "The answer is Big  Ben"], ["Ben", "Big Ben tower"]),
        ({"answer": 1250}, ["1,250", "\\boxed{1250.0}", "\\boxed{\\frac{2500}{2}}"], ["125", "about 1250", "1250 1"]),
        ({"answer": "1/2", "answer_format": "math"}, ["\\boxed{0.5}", "1/2"], ["\\boxed{0.4}", "0.4"]),
        ({"answer": "Ab 1", "answer_format": "exact"}, [" Ab 1 ", "\\boxed{Ab 1}"], ["ab 1", "Ab  1"]),
    ],
)
def test_what_counts_as_right(tmp_path, fields, right, wrong):
    row = one_row(tmp_path, **fields)
    assert [text for text in right if not read_answer(text, row).is_right] == []
    assert [text for text in wrong if read_answer(text, row).is_right] == []


def test_wilson_intervals():
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    assert wilson_interval(200, 200) == pytest.approx((0.9811546, 1), abs=1e-6)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


def test_the_summary_counts_by_group():
    def record(task, correct, latents):
        counts = {
            "num_tokens": 4,
            "num_latent_blocks": 1,
            "num_latents": latents,
            "stop_reason": "eos",
            "seconds": 0.5,
        }
        return {"family": "f", "task": task, "data": "d", "correct": correct, **counts}

    summary = summarize([record("a", True, 4), record("a", False, 0), record("b", True, 4)])
    assert summary["tasks"]["a"]["accuracy"] == 0.5 and summary["tasks"]["b"]["accuracy"] == 1
    assert summary["families"]["f"] == summary["all"] == describe([record("b", True, 4)] * 2 + [record("b", False, 0)])
    assert summary["all"]["rows_with_latents"] == 2 and summary["all"]["stop_reasons"] == {"eos": 3}
    table = draw_table(summary)
    assert "66.7 %" in table and len(table.splitlines()) == 6
    assert "1 answers took no latents: 0.0 % of them are right, and 100.0 % of the others." in table
    assert "accuracy_valid" not in summary["all"]  # results of an earlier version do not say which answers are valid


def test_the_summary_counts_form_donors_and_rows_without_one():
    def record(correct: bool, is_marked: bool, is_valid: bool, **more) -> dict:
        fields = {"family": "f", "task": "a", "data": "d", "num_tokens": 4, "num_latent_blocks": 1, "num_latents": 4}
        return (
            fields
            | {"stop_reason": "eos", "seconds": 1.0, "correct": correct, "is_marked": is_marked}
            | ({"is_valid": is_valid} | more)
        )

    lent = {"donor_id": "x", "same_answer": False, "follow_chance": 0.25}
    records = [
        record(True, True, True, follows_donor=False, **lent),
        record(False, True, True, follows_donor=True, **lent),
        record(False, False, False, follows_donor=False, **lent),
        record(False, True, False, follows_donor=False, **lent | {"num_latents": 0}),
        record(True, True, True, not_swapped=True),
    ]
    found = describe(records)
    assert found["rows"] == 4 and found["not_swapped"] == 1 and found["accuracy"] == 0.25 and found["correct"] == 1
    assert found["unmarked"] == 1 and found["outside_choices"] == 2 and found["accuracy_valid"] == 0.5
    assert found["accuracy_with_latents"]["answers"] == 3 and found["accuracy_with_latents"]["accuracy"] == 1 / 3
    assert found["accuracy_without_latents"] | {"accuracy_high": 0} == {
        "answers": 1,
        "accuracy": 0.0,
        "accuracy_low": 0.0,
        "accuracy_high": 0,
    }
    # The row without latents is not one that can follow.
    assert found["swapped"]["answers"] == 3 and found["swapped"]["follows_donor"] == 1 / 3
    assert found["swapped"]["follow_chance"] == 0.25 and found["swapped"]["same_answer"] == 0
    table = draw_table(summarize(records))
    assert "1 rows were not swapped and are not counted" in table and "33.3 % of 3 swapped answers" in table
    alone = describe([record(True, True, True, not_swapped=True)])
    assert alone["rows"] == 0 and alone["accuracy"] is None and "-" in draw_table(summarize(records[-1:]))


def test_repeats_of_a_row_without_donor_count_once():
    fields = {"num_tokens": 4, "num_latent_blocks": 1, "num_latents": 4, "stop_reason": "eos", "seconds": 1.0}
    records = [
        fields | {"correct": number == 0, "repeat": repeat, "not_swapped": number == 2}
        for repeat in range(4)
        for number in range(3)
    ]
    found = describe(records)
    assert (found["rows"], found["not_swapped"], found["accuracy"]) == (2, 1, 0.5)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(wilson_interval(1, 2))


@pytest.mark.parametrize(
    ("fields", "text", "answer", "right", "marked", "valid"),
    [
        ({"answer": "red", "choices": ["red", "blue"]}, "It is \\boxed{B}.", "blue", False, True, True),
        ({"answer": "red", "choices": ["red", "blue"]}, "It is \\boxed{(A)}", "red", True, True, True),
        ({"answer": "red", "choices": ["red", "blue"]}, "Blue", "blue", False, False, True),
        ({"answer": "red", "choices": ["red", "blue"]}, "\\boxed{green}", "green", False, True, False),
        ({"answer": "red", "choices": ["red", "blue"]}, "It is either.", "it is either", False, False, False),
        ({"answer": 1250}, "\\boxed{1,250.0}", "1250.0", True, True, True),
        ({"answer": 1250}, "\\boxed{12}", "12.0", False, True, True),
        ({"answer": 1250}, "I see many.", "i see many", False, False, False),
        ({"answer": "oak"}, "Elm.", "elm", False, False, True),
        ({"answer": "oak"}, "I see a tree", "i see a tree", False, False, False),
        ({"answer": "oak"}, "\\boxed{a tree}", "a tree", False, True, True),
        ({"answer": "yes"}, "No, it is not.", "no", False, False, True),
    ],
)
def test_what_an_answer_says(tmp_path, fields, text, answer, right, marked, valid):
    """The one reader of answers, also for the form: the last column is whether the question allows the answer."""
    row = one_row(tmp_path, **fields)
    found = read_answer(text, row, known={"oak", "elm"})
    assert (found.answer, found.is_right, found.is_marked, found.is_valid) == (answer, right, marked, valid)
    assert truth_form(row) == read_answer(str(row.answer), row).answer
