"""atropos-trainer inside verl: its intake, losses and proven publishes, with verl's engines and clusters.

Only this package imports verl. What each file gives:

===================  ======================================================================================
`main`               `python -m verl_integration.main config.yaml [key=value ...]`
`settings`           verl's configuration tree with a section `atropos`
`plugin`             what verl loads by its entry point group, and the check that it did
`losses`             our losses as policy losses of verl (`atropos_<name>`), and as the loss of its engines
`batches`            validated Atropos batches as rows of verl
`source`             our journaled source in the place of verl's data loader
`trainer`            verl's V1 trainer on these batches
`checkpoint_engine`  writes what verl exports, for our publisher
`publishing`         our publisher, and the probes scored by verl's engine
===================  ======================================================================================

How to use it, and what was run where: docs/verl.md.
"""
