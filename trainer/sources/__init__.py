"""Where batches come from: the live Atropos API, the run's journal, a recording, or a file of examples."""
