"""Do the latents carry anything? A report on one checkpoint and one data set.

    python -m evaluation.faithfulness --model out/lare --data data/tasks/data.jsonl --output out/faithfulness --limit 200

Each file here is one diagnostic or one thing that several need:

    items.py, architectures.py, subject.py   the questions; what differs between architectures; a model under study
    arms.py, lending.py, outcomes.py, verdicts.py, interventions_report.py
                                             D1   replace the latents, ask again, and say what may be said of it
    replacement.py                           D2   what each latent does for the answer that was given
    slots.py                                 D3   latents, markers alone, format alone, nothing
    collapse.py, sensitivity.py, edits.py    D4   do latents differ between pictures, and follow them
    probe.py                                 D5   can the answer be read off them
    latent_only.py, attention_cut.py         D6   can the question be answered from the latents alone
    retrieval.py, lens.py, parity.py         D7, D10, D11   like their oracle; read as words; trained as they are run
    norms.py, attention.py                   D8, D9   how large they are, who looks at them
    audit.py, compute.py                     D12, D13   are they made at all; what the same compute does without them
    need.py, whose_answer.py                 D14, D15   latents given against steps needed; whose answer a swap gives
    step_content.py, looked_at.py            D16  which latent holds which step, and looks where
    patching.py                              D17  latents exchanged between pictures that differ in one object
    serial_items.py                          the way to the answer of questions that need one step after the other
    columns.py, observation.py               what stands in each column; attention rows, norms and states of one reading
    statistics.py, result.py, report.py, plots.py, run.py   intervals; what is found; the page; what is done already
    controls.py                              a model that must react, and one that must not
"""

import conversion.commands  # noqa: F401  (says which extra a command needs where an import fails)
