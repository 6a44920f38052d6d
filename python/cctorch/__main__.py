import sys

from cctorch.cli import main

sys.exit(main())
