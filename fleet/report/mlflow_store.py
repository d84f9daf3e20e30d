"""From `tracking.uri` to an MLflow client: one line for each way in which there can be none."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

# mlflow reads its environment when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from fleet.core.errors import InputError

_SQLITE = "sqlite:///"

_WAIT_SECONDS = 300.0
"""How long a run waits for another one that is making the database."""

_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Module that SQLAlchemy asks for -> the package that has it, where they are called differently."""


@contextmanager
def opened(uri: str) -> Generator[MlflowClient]:
    """A client of the tracking store and the registry under `uri`. What the caller first asks of it belongs inside.

    A database that isn't there is made; two runs that begin at once make it one after the other, because MLflow's own
    lock doesn't cover the registry's tables.

    Raises:
        InputError: it can't be reached, is no MLflow store, stays locked, or a driver is missing.
    """
    database = Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
    with explained(uri):
        if database is None:
            yield MlflowClient(tracking_uri=uri, registry_uri=uri)
            return
        _check_database(database)
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(database.with_name(f".{database.name}.lock"), timeout=_WAIT_SECONDS):
            yield MlflowClient(tracking_uri=uri, registry_uri=uri)


def _check_database(path: Path) -> None:
    """Refuse what is there and is no SQLite database: MLflow would try for minutes to open it."""
    if path.is_dir():
        raise InputError(f"tracking.uri: {path} is a folder; name a file in it, such as {_SQLITE}{path}/mlflow.db")
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(16)
        if start and start != b"SQLite format 3\x00":
            raise InputError(f"tracking.uri: {path} is no SQLite database; name another file, or move this one away")


@contextmanager
def explained(uri: str) -> Generator[None]:
    """
    Raises:
        InputError: in place of what MLflow, its database or a missing driver raise inside.
    """
    try:
        yield
    except MlflowException as e:
        raise InputError(f"tracking.uri: {uri} doesn't answer as an MLflow store: {_line(e.message)}") from e
    except SQLAlchemyError as e:
        # The rest is the statement, and an address to read about it.
        raise InputError(f"tracking.uri: {uri} can't be used as a database: {str(e).splitlines()[0]}") from e
    except Timeout as e:
        raise InputError(
            f"tracking.uri: {uri}: another run has been making this database for {_WAIT_SECONDS:.0f} s; if none is, "
            f"delete {e.lock_file}"
        ) from e
    except ModuleNotFoundError as e:
        package = _DRIVERS.get(e.name or "", e.name)
        raise InputError(f"tracking.uri: {uri} needs a driver that isn't installed: pip install '{package}'") from e
    except OSError as e:
        raise InputError(f"tracking.uri: {uri} can't be opened: {e.strerror} ({e.filename})") from e


def _line(message: object) -> str:
    return " ".join(str(message).split())
