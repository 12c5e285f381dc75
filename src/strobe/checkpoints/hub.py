"""Hub names (`meta-llama/Llama-3.2-1B`) → a folder in huggingface_hub's cache."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from strobe.checkpoints.huggingface import HUB_FILES
from strobe.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_name(model: str) -> bool:
    """True for what reads as `owner/name`."""
    return _NAME.fullmatch(model) is not None


def fetch(name: str) -> Path:
    """Download what is missing of a repository's weights, config and tokenizer; its folder.

    Raises:
        CheckpointError: no such repository, no access, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's own errors, and every kind of network failure
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise CheckpointError(
            f"{name} is no folder here, and the hub did not give it: {type(error).__name__}: {reason}",
            hint="a private or gated model wants `hf auth login`; a local one wants its path",
        ) from error
