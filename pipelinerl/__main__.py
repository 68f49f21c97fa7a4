"""`python -m pipelinerl` is the same as `pipelinerl`."""

import sys

from pipelinerl.cli import main

if __name__ == "__main__":
    sys.exit(main())
