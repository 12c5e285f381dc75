"""The chat page: one file, with a policy that lets it load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response


@cache
def _page() -> tuple[bytes, str]:
    """The page, and the policy that names its script and its style by their hashes."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def source(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in inside)
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    policy = (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def page() -> Response:
    body, policy = _page()
    return Response(
        body,
        media_type="text/html; charset=utf-8",
        headers={
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )
