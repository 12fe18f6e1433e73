"""The hub: one quick question first, because without a network transformers asks for half a minute."""

from __future__ import annotations

import socket
from contextlib import suppress

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from unspool.errors import ModelError


def check_reachable(name: str, revision: str | None = None) -> None:
    """Check that the hub can be asked for a model that is not in its cache. Whatever it answers is for transformers.

    Raises:
        ModelError: the hub cannot be reached, or must not be (`HF_HUB_OFFLINE`).
    """
    with suppress(HFValidationError):  # no name that a hub has: transformers says so
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        url = hf_hub_url(name, "config.json", revision=revision)
        try:
            get_hf_file_metadata(url)
        except Exception as error:  # of any HTTP client, which depends on the hub library's version
            if reason := _unreachable(error):
                missing = f"there is no folder {name}, and no model of that name in the hub's cache"
                raise ModelError(f"{missing}; the hub itself cannot be reached: {reason}") from error


def _unreachable(error: BaseException | None) -> str:
    """Find the reason in the chain of causes; a hub that is merely slow or busy is none."""
    while error is not None:
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        if isinstance(error, socket.gaierror | ConnectionRefusedError):
            return str(error.strerror)
        error = error.__cause__ or error.__context__
    return ""
