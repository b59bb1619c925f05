"""atropos-trainer inside verl: its intake, losses and proven publishes, with verl's engines and clusters.

Only this package imports verl. Start reading at `main`, `settings` and `trainer`; docs/verl.md says how it is
used, and what was run where.
"""
