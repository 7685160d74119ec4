"""URLs as they may be printed."""

from __future__ import annotations

import re

_USER = re.compile(r"(\w:/{1,2})(?:[^/?#\s]+|[^/?#\s:@]+:(?!\d+[/?#])[^\s'\"@]+)@")
"""One slash: paths write them so. A password may hold slashes that nobody escaped; a port is none."""
_SECRET = re.compile(
    r"([?&;](?:[\w.%-]*(?:signature|token|secret|password|credential|key|auth|jwt)[\w.%-]*|sig|pwd)=)[^&;#\s'\"<>]+",
    re.IGNORECASE,
)
"""Parameters that let whoever reads them in: of presigned URLs of S3 and Google (X-Amz-Signature, X-Goog-Credential,
Signature, AWSAccessKeyId), of Azure (sig), and of services that take tokens or keys."""


def redacted(text: str) -> str:
    """`text` with `***` for the user, password, signatures and tokens in its URLs."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1***@", text))
