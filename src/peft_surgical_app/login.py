"""The login of this machine at the Hub, which is not lent to strangers."""

from __future__ import annotations

import os

from huggingface_hub import constants


def forget_login() -> None:
    """Read from the Hub what everybody may read, in this process and in those that it starts.

    No token is sent but those that are passed to a call. Networks are kept in a cache of their own: from the usual one
    huggingface_hub opens without a token also what was downloaded with one.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)
    cache = f"{constants.HF_HUB_CACHE}-public"
    os.environ |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_CACHE": cache}
    # huggingface_hub has read the variables already.
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN, constants.HF_HUB_CACHE = True, cache
