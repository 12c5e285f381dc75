"""What every test shares: one thread a worker, fresh random examples, a reason for each skip."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, also by subprocesses

import pytest

try:
    import hypothesis
except ImportError:  # GPU machines run their marked tests without it
    pass
else:
    hypothesis.settings.register_profile("strobe", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("strobe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none"))
