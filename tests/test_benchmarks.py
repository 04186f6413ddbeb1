"""The benchmarks measure what they say: at tiny sizes, both suites on a CPU, and what waits for a device is counted."""

import json
import sys

import pytest
import torch
from helpers import GREEDY, open_at, step_logits

from benchmarks import device_reads, latent_memory, paper_numbers, run, scaling, suites, training_steps
from benchmarks.measuring import Setting, Times, interleave, peak_memory
from benchmarks.report import Row
from benchmarks.sizes import SMOKE
from modeling_latentvlm.decoding_blocks import BlockContext
from modeling_latentvlm.visual_replay_vedas import ImageTokens, pick_tokens


ONCE = Setting(repeats=1)


def test_ratios_are_of_one_round_and_the_first_does_not_count():
    seconds, order = iter([9, 9, 1, 2, 20, 10, 3, 6]), []  # the machine is ten times slower in the third round

    def arm(name: str):
        return lambda: order.append(name) or next(seconds)

    times = interleave({"a": arm("a"), "b": arm("b")}, 3)
    assert "".join(order) == "abbaabba"
    assert times == {"a": [2000, 20000, 6000], "b": [1000, 10000, 3000]} and times.ratio("a", "b") == 2


def test_peak_memory_is_that_of_the_worst_moment():
    def run_once():
        first = torch.ones(2**18)  # 1 MiB
        del first
        return torch.ones(2**19).sum()  # 2 MiB

    assert peak_memory(run_once, "cpu") == pytest.approx(2 * 2**20, rel=0.01)


def test_a_goal_is_met_or_missed_by_a_figure():
    assert Row("s", "c", 1.0, "ms", ratio=1.02, goal="<= 1.02").verdict == "met"
    assert Row("s", "c", 1.0, "ms", ratio=0.75, goal=">= 0.8").verdict == "missed by 0.050"


def test_the_papers_figures_are_those_of_its_table():
    """At exactly the paper's times every ratio is 1; what is compared is a latent with a latent, and a thought with a thought."""
    count = paper_numbers.PAPER_PARALLEL_LATENTS
    times = Times({"block": [86.1], "one by one": [34.9 * count]})
    rows = {row.case: row for row in paper_numbers.block_rows(times, count, 86.1, 1e6, has_goals=True)}
    assert rows["one latent, one by one"].reference == 34.9 and rows["one latent, parallel"].reference == 1.0
    assert rows["thought, parallel (82.7)"].reference == 86.1 and rows["thought, one by one (6.5)"].reference == 227
    theirs = [row for row in rows.values() if "the paper's figure" in row.note]
    assert len(theirs) == 7 and all(
        row.ratio == pytest.approx(1, rel=0.05) for row in theirs
    )  # its figures are rounded
    assert rows["one latent, times faster in parallel"].reference == pytest.approx(34.9)
    assert 1 / rows["thought, parallel / one by one"].reference == pytest.approx(2.6, abs=0.05)  # as its text says
    slower = Times({"block": [2 * 86.1], "one by one": [34.9 * count]})
    missed = {
        row.case
        for row in paper_numbers.block_rows(slower, count, 86.1, 1e6, True)
        if row.verdict.startswith("missed")
    }
    assert missed == rows.keys() - {"one latent, one by one", "thought, one by one (6.5)"}
    small = paper_numbers.block_rows(times, 4, 86.1, 1e6, has_goals=True)  # no thought of the paper's size
    assert [row.case for row in small if row.goal] == [
        *("block of 4, memory floor", "block of 4, 15 ms", "one latent, one by one", "thought, one by one (6.5)")
    ]
    assert not any(row.goal for row in paper_numbers.block_rows(times, 82, 86.1, 1e6, has_goals=False))


def test_the_gpu_suite_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run", "--suite", "gpu"])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code != 0 and "needs a CUDA device" in capsys.readouterr().err


def test_the_gpu_suite_runs_whole(monkeypatch, tmp_path):
    for module in (latent_memory, scaling, training_steps):  # the profiler takes half a second a run
        monkeypatch.setattr(module, "peak_memory", lambda call, device: call() is None or 2**20)
    rows = suites.run_suite("gpu", SMOKE, ONCE, None, tmp_path)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert len(written["rows"]) == len(rows) and written["settings"]["torch"] == torch.__version__
    assert (tmp_path / "gpu.png").stat().st_size > 1000 and "| text token |" in (tmp_path / "gpu.md").read_text()
    assert all(row.value is not None for row in rows)
    cases = {row.case for row in rows}
    assert {"DeepLatent SFT 2", "DeepLatent RL", "LaRe stage 4", "Vedas stage 2 with crops"} <= cases
    assert {row.subject for row in rows} >= {"text token", "block, floor", "steps", "paper", "batched latents"}


def test_what_does_not_fit_is_skipped_with_the_figures(monkeypatch):
    monkeypatch.setattr(suites, "free_memory", lambda device: 1000)
    (row,) = suites.measure_subject("text_tokens", SMOKE, ONCE)
    assert row.value is None and "GiB" in row.note and "are free" in row.note
    monkeypatch.setattr(scaling, "free_memory", lambda device: 1000)
    assert all(row.value is None and "needs about" in row.note for row in scaling.measure(SMOKE, ONCE))
    monkeypatch.setattr(training_steps, "free_memory", lambda device: 1000)
    assert [row.value for row in training_steps.measure(SMOKE, ONCE)] == [None, None, None]


def test_nothing_waits_for_the_device_more_than_stock():
    rows = device_reads.measure(SMOKE, ONCE)
    per_token = [row for row in rows if row.subject == "waits per token"]
    assert len(per_token) == 4 and all(row.value <= row.reference == 1 for row in per_token)
    waits = {row.case: row.value for row in rows if row.subject in ("waits per block", "waits per step")}
    # Only the size of a predicted block has to be known before going on.
    # A block waits once for whether its latents are finite, and once for its size where that is predicted.
    assert waits == {"DeepLatent, size given": 1, "DeepLatent, size predicted": 2, "Vedas": 0, "LaRe": 0}


def test_blocks_are_found_on_the_host_as_on_the_device(model, batch, monkeypatch):
    """Rows that open blocks at different steps, finish early and are sampled several times."""

    def answer(**kwargs):
        plan = [[0, 2], [1], []]
        return model.generate(**batch, logits_processor=open_at(model, batch, plan), **(GREEDY | kwargs))

    def check(**kwargs):
        monkeypatch.undo()
        expected = answer(**kwargs)
        found = []
        monkeypatch.setattr(BlockContext, "written_sites", lambda self, *args: found.append(1))
        actual = answer(**kwargs)
        assert found and torch.equal(actual.sequences, expected.sequences)
        assert torch.equal(step_logits(actual), step_logits(expected))
        assert (
            torch.equal(actual.num_latent_blocks, expected.num_latent_blocks) and expected.num_latent_blocks.sum() > 0
        )

    check()
    check(num_return_sequences=2, do_sample=True, top_k=1)


@pytest.mark.parametrize("pattern", ["tokens", "soft_mix"])
def test_whether_a_replay_is_full_is_known_without_looking(pattern):
    is_image = torch.tensor([[True] * 7 + [False], [True] * 5 + [False] * 3])
    tokens = ImageTokens.find(is_image, torch.randn(2, 8, 4), torch.zeros(3, 2, 8, dtype=torch.long))
    for _ in range(4):
        replay = pick_tokens(torch.rand(2, 8), tokens, 2, 1.0, pattern)
        assert replay.is_full == bool(replay.attended.all())
