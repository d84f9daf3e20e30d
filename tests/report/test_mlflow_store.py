"""Ways in which there is no MLflow store to open, and two runs that make one at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from fleet.core.errors import InputError
from fleet.report.mlflow_store import explained, opened


@pytest.mark.slow
def test_two_processes_that_make_one_database_at_once_both_open_it(tmp_path: Path) -> None:
    """The database's tables are made by some forty migrations, in the middle of which MLflow lets others in."""
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    program = (
        "import sys; from fleet.report.mlflow_store import opened\n"
        "with opened(sys.argv[1]) as client: client.search_experiments(); print('opened')"
    )
    command = [sys.executable, "-c", program, uri]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in processes]
    assert [out for out, _ in said] == ["opened\n"] * 2, said


def test_file_that_is_no_database_is_left_alone_and_named(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("notes of a meeting, which nobody wants to lose")
    with pytest.raises(InputError, match=r"notes\.db is no SQLite database; name another file"), opened(
        f"sqlite:///{tmp_path}/notes.db"
    ):  # fmt: skip
        raise AssertionError("opened")
    assert (tmp_path / "notes.db").read_text().startswith("notes")


def test_folder_as_a_database_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder; name a file in it, such as .*/mlflow\.db"), opened(
        f"sqlite:///{tmp_path}"
    ):  # fmt: skip
        raise AssertionError("opened")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("postgresql://user@localhost/runs", r"needs a driver that isn't installed: pip install 'psycopg\[binary\]'"),
        ("nonsense://x", "doesn't answer as an MLflow store"),
        ("sqlite:////dev/null/mlflow.db", "can't be opened"),
    ],
)
def test_store_that_cannot_be_opened_is_one_line(uri: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as e, opened(uri):
        raise AssertionError("opened")
    assert "\n" not in str(e.value)


def test_locked_database_is_one_line(tmp_path: Path) -> None:
    """As SQLAlchemy and MLflow tell it, after they have waited for their own while."""
    path = tmp_path / "mlflow.db"
    sqlite3.connect(path).execute("CREATE TABLE t (x)").connection.close()

    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 0.0})
    with (
        pytest.raises(InputError, match=r"can't be used as a database: .*database is locked") as e,
        explained("sqlite"),
    ):
        engine.connect().execute(text("SELECT * FROM t"))
    assert "\n" not in str(e.value)
    holder.close()
