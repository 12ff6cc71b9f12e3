"""What `hcmen-bench` is made of: rows, measuring, statistics, comparison, and the report as text, JSON and HTML.

    rows.py       what is measured: a bundle, a variant, what runs it, threads, batch; each checked before it is timed
    peers.py      rows that need PyTorch, in a process of their own which takes turns with this one
    measure.py    warm-up, interleaved rounds, the probe of the machine itself
    cold.py       fresh processes by turns: time to the first score, resident memory; cold_process.py is what they do
    stats.py      percentiles, intervals of medians and of ratios, how noise is judged
    machine.py    the machine, the environment, versions
    report.py     the JSON document: made, written, read back
    judge.py      two documents: faster, slower, or no difference beyond noise
    text.py       the tables on the terminal
    page.py, page_style.py, plots.py   the HTML report

Nothing here is imported by `hcmen.runtime` itself, and nothing imports PyTorch.
"""

from __future__ import annotations

__all__: list[str] = []
