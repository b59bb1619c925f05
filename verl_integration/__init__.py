"""atropos-trainer inside verl: its intake, losses and proven publishes, with verl's engines and clusters.

Only this package imports verl. What each file gives:

=================  ========================================================================================
`losses`           our losses as policy losses of verl (`atropos_<name>`), and as the loss of its engines
`batches`          validated Atropos batches as rows of verl
=================  ========================================================================================

How to use it, and what was run where: docs/verl.md.
"""
