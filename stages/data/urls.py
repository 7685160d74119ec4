"""Removes secrets from URLs before they are printed."""

from __future__ import annotations

import re

_USER = re.compile(r"(\w:/{1,2})(?:[^/?#\s]+|[^/?#\s:@]+:(?!\d+[/?#])[^\s'\"@]+)@")
"""User and password of a URL. Matches one slash, too, as in URLs that were handled as paths. A password may contain
unescaped slashes; a port is not a password."""
_SECRET = re.compile(
    r"([?&;](?:[\w.%-]*(?:signature|token|secret|password|credential|key|auth|jwt)[\w.%-]*|sig|pwd)=)[^&;#\s'\"<>]+",
    re.IGNORECASE,
)
"""Query parameters that grant access: those of presigned URLs of S3 and Google (X-Amz-Signature, X-Goog-Credential,
Signature, AWSAccessKeyId) and of Azure (sig), tokens, and keys."""


def redacted(text: str) -> str:
    """Replace user, password, signatures and tokens in the URLs of a text by `***`."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1***@", text))
