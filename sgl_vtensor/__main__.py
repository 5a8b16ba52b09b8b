"""``python -m sgl_vtensor``: the same as ``sgl-vtensor``."""

import sys

from sgl_vtensor.cli.main import main

sys.exit(main())
