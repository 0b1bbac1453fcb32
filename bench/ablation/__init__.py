"""Ablations: what each part contributes, measured on real processes, with a report a researcher would trust.

presets.py     what is switched off          prompts.py           what is asked
experiment.py  what is asked for             run.py               its course, resumable
rig.py         Redis, worker, proxy, agent   edge.py              the agent's process
recording.py   what happens inside it        records.py           raw rounds on disk
manifest.py    under which conditions        catalogue.py         which runs there are
measures.py    figures of a request          bootstrap.py         their intervals
data.py        a run, a table                tables.py, draft_tables.py   one table per plot
canvas.py      what plots are drawn with     plots.py             the plots
report.py      what the report says          words.py, document.py   its standing words; Markdown and HTML
compare.py     two runs against each other
"""
