"""The page of ``peft-surgical app`` as a Hugging Face Space: uploads only, a fixed list of networks, one run at a time.

    python recipes/space/app.py        # to try it here

Everything that it shows is in the package's `peft_surgical_app`; see docs/app.md.
"""

import tempfile
from pathlib import Path

from peft_surgical_app.page import serve_page
from peft_surgical_app.uploads import UploadLimits
from peft_surgical_app.workspace import MODELS, AppSettings

SETTINGS = AppSettings(
    root=Path(tempfile.gettempdir()) / "peft-surgical-space",
    models=MODELS,
    any_model=False,  # a visitor's network could be larger than the machine
    folders=None,  # no path of the machine can be named
    limits=UploadLimits(images=1000, image_bytes=10 * 2**20, total_bytes=200 * 2**20),
    own_login=False,  # a visitor pushes with a token of their own, never with that of the Space
    minutes=60,
    hours=24,
)

if __name__ == "__main__":
    serve_page(SETTINGS, host=None)
