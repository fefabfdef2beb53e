"""`python -m offramp`, which is also what torchrun starts."""

import sys

from offramp.cli.main import main

sys.exit(main())
