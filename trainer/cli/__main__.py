"""`python -m trainer.cli`, the same as `atropos-train`."""

import sys

from trainer.cli import main

sys.exit(main())
