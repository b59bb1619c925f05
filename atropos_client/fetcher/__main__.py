"""`python -m atropos_client.fetcher`: started by `FetchingProcess`, not by people."""

import sys

from atropos_client.fetcher._child import main

sys.exit(main())
