"""`python -m ccella_fast.cli`."""

import sys

from ccella_fast.cli import main

sys.exit(main())
