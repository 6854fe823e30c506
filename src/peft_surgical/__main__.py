"""``python -m peft_surgical``, and so ``accelerate launch -m peft_surgical``: the command line."""

import sys

from peft_surgical_cli import main

if __name__ == "__main__":
    sys.exit(main())
