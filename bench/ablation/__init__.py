"""Ablations: what each part contributes, measured on real processes, with a report a researcher would trust.

presets.py    what is switched off          prompts.py     what is asked
edge.py       the agent's process           recording.py   what happens inside it, round by round
rig.py        Redis, worker, proxy, agent   run.py         the experiment, resumable
records.py    raw rounds on disk            manifest.py    under which conditions
measures.py   figures of a request          bootstrap.py   intervals
tables.py     one table per plot            plots.py       the plots (the only one that loads matplotlib)
report.py     Markdown and HTML             compare.py     two runs against each other
"""
