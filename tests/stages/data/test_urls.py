"""Secrets in URLs are not printed."""

import pytest

from stages.data.urls import redacted


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("https://me:hunter2@host:8/x.tar", "https://***@host:8/x.tar"),
        ("s3://KEY:hun@ter2@bucket/x and ftp://hunter2@h", "s3://***@bucket/x and ftp://***@h"),
        ("s3://KEY:hun/ter+2@bucket/x ftp://u:p#w@h", "s3://***@bucket/x ftp://***@h"),
        ("http://host:8265/a@b", "http://host:8265/a@b"),
        ("https://a/x?auth=hunter2&jwt=hunter2", "https://a/x?auth=***&jwt=***"),
        ("/here/http:/me:hunter2@host/p.txt", "/here/http:/***@host/p.txt"),
        (
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Credential=hunter2%2Fs3&X-Amz-Expires=9&X-Amz-Signature=hunter2",
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Credential=***&X-Amz-Expires=9&X-Amz-Signature=***",
        ),
        ("https://a/x?sv=1&sig=hunter2#part", "https://a/x?sv=1&sig=***#part"),
        ("'https://a/x?Signature=hunter2'", "'https://a/x?Signature=***'"),
        ("https://a/x?access_token=hunter2&api_key=hunter2", "https://a/x?access_token=***&api_key=***"),
        ("https://host/a@b?page=2&design=1 mail@host", "https://host/a@b?page=2&design=1 mail@host"),
    ],
)
def test_only_secrets_are_redacted(url, printed):
    assert redacted(url) == printed
