"""boto3's clients, one per process and environment, and what its errors mean to a person.

The CRT client is never used: it ignores a configured endpoint and goes to AWS (boto3 issue 4839).
"""

# boto3 publishes no types.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import os
from functools import cache
from typing import Any

import boto3.session
from botocore import exceptions
from botocore.config import Config

from fleet.core.errors import SourceError

BotoCoreError = exceptions.BotoCoreError
ClientError = exceptions.ClientError

_CREDENTIALS = (
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.CredentialRetrievalError,
    exceptions.ProfileNotFound,
    exceptions.TokenRetrievalError,
    exceptions.NoAuthTokenError,
    exceptions.SSOError,
)
_UNREACHABLE = (exceptions.ConnectionError, exceptions.HTTPClientError)
_DENIED = ("AccessDenied", "Forbidden", "403", "AllAccessDisabled")
_BAD_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


def client(*, patient: bool = True) -> Any:
    """The S3 client for this process's `AWS_*` environment.

    `patient=False` is for a first contact: an address that leads nowhere fails within some 10 s.
    Raises SourceError if the environment itself makes no sense.
    """
    names = sorted(name for name in os.environ if name.startswith("AWS_"))
    return _client(patient, tuple((name, os.environ[name]) for name in names))


@cache
def _client(patient: bool, _environment: tuple[tuple[str, str], ...]) -> Any:
    # boto3 itself puts the bucket in the path, not the host name, when an endpoint is configured.
    config = Config(
        connect_timeout=10 if patient else 2,
        read_timeout=60 if patient else 20,
        # Pauses start at 50 ms and double: ten attempts outlast a server's restart.
        retries={"mode": "standard", "total_max_attempts": 10 if patient else 3},
        max_pool_connections=32,
        # A ranged read has no checksum of the range; TLS and If-Match are what protects it.
        response_checksum_validation="when_required",
    )
    try:
        # A session of its own, because boto3's default session is not safe to share among threads.
        session: Any = boto3.session.Session()
        return session.client("s3", config=config)
    except ValueError as error:
        raise SourceError(f"S3: {error}; AWS_ENDPOINT_URL must look like https://host:port") from error
    except BotoCoreError as error:
        raise SourceError(explain(error, "S3")) from error


def code(error: exceptions.ClientError) -> str:
    """The server's code for what went wrong, such as `NoSuchKey`, or the HTTP status."""
    return _detail(error, "Code")


def explain(error: exceptions.BotoCoreError | exceptions.ClientError, uri: str) -> str:
    """One line: where, what happened, and what to do about it."""
    where = f"{uri}: "
    if isinstance(error, exceptions.ClientError):
        return where + _explain_answer(error)
    text = " ".join(str(error).split())
    if isinstance(error, _CREDENTIALS):
        return where + (
            f"no usable S3 credentials ({text}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, _UNREACHABLE):
        return where + f"S3 cannot be reached ({text}); check AWS_ENDPOINT_URL and the network"
    return where + text


def _explain_answer(error: exceptions.ClientError) -> str:
    found = code(error)
    if found == "NoSuchBucket":
        return "no such bucket; create it, or correct the address (and AWS_ENDPOINT_URL, if set)"
    if found == "NoSuchKey":
        return "no such object"
    if found == "404":
        return "nothing found there (404); check the address, and AWS_ENDPOINT_URL if it is set"
    if found in _DENIED:
        return (
            "access denied; these credentials need s3:ListBucket and s3:GetObject, and s3:PutObject where artifacts go"
        )
    if found in _BAD_KEY:
        return f"the server refuses these credentials ({found}); check AWS_ACCESS_KEY_ID and others"
    if found in ("PreconditionFailed", "412"):
        return "replaced while it was being read; leave sources alone during a run, and run again"
    if found in ("InvalidRange", "416"):
        return "shorter than expected; the file is truncated: upload it again"
    operation = f"{error.operation_name}: {_detail(error, 'Message')}"
    return f"the server answered {found or 'an error'} to {operation}"


def _detail(error: exceptions.ClientError, name: str) -> str:
    response: Any = error.response  # pyright: ignore[reportUnknownMemberType]
    return " ".join(str(response.get("Error", {}).get(name, "")).split())
