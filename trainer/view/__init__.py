"""Shows a run: curves, and the rollouts it was trained on; live, from a copy, or as one file.

Data flow: `metrics.jsonl`, the journal and `set_aside/` of a run's directory, opened for reading only ->
`RunReader` -> JSON -> the page in `trainer/view/page` (its charts: uPlot). Everything that is read is
bounded: the file of metrics is sampled, the journal is read by its numbers.

Non-goals: changing anything of a run; accounts and users; asking the model hub.
"""
