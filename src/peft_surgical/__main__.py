"""``python -m peft_surgical`` and the ``peft-surgical`` script."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
