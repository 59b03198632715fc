"""No message and no traceback shows a password, in whatever form a URL holds it."""

from __future__ import annotations

import traceback
from pathlib import Path

import optuna
import pytest
import toys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.storages import RDBStorage
from sqlalchemy.exc import OperationalError
from tiers import examples

from calibrate.search.optimizer import SearchOptions, optimize
from calibrate.search.problem import LatencyLimit
from calibrate.search.storage_errors import StudyError, is_journal, shown


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgresql://me:secret@db/x", "postgresql://db/x"),
        ("postgresql+psycopg2://me:secret@db:5432/x", "postgresql+psycopg2://db/x"),
        ("postgresql://user:se/cret@db/x", "postgresql://db/x"),
        ("postgresql://user:s:e/c?r#et@db/x?sslmode=require", "postgresql://db/x"),
        ("postgresql://secret@db/x", "postgresql://db/x"),
        ("postgresql://db/x?user=me&password=secret", "postgresql://db/x"),
        ("postgresql:///x?host=db&password=se@cret", "postgresql://..."),
        ("postgresql://user:s@secret@db/x", "postgresql://..."),  # where does the password end?
        ("postgresql://user:secret", "postgresql://..."),
        ("postgresql://user:se/cret", "postgresql://..."),
        ("mysql+pymysql://user:%73ecret@[::1]:3306/x", "mysql+pymysql://[::1]/x"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dsecret", "mssql+pyodbc:///"),
        ("mssql://db/x;password=secret", "mssql://db/x"),
        ("postgresql://db/dbname=x password=secret", "postgresql://..."),
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("sqlite:////home/me@work/study.db?key=secret", "sqlite:////home/me@work/study.db"),
        ("sqlite+pysqlcipher://:secret@/study.db?kdf_iter=64000", "sqlite+pysqlcipher:///study.db"),
        (" postgresql://user:secret@db/x", "(a URL that cannot be read)"),
        ("postgresql:/user:secret@db/x", "(a URL that cannot be read)"),
        ("postgresql:user:secret@db/x", "(a URL that cannot be read)"),
        ("://user:secret@db/x", "(a URL that cannot be read)"),
        ("postgresql://user:secret\udcff@d\udcffb/x", r"postgresql://d\udcffb/x"),
    ],
)
def test_driver_host_and_database_are_shown(url: str, text: str) -> None:
    assert shown(url) == text
    assert not is_journal(url)


@pytest.mark.parametrize("path", ["a.journal", "runs/a:b.journal", r"C:\runs\a.journal", Path("a")])
def test_paths_are_shown_as_they_are(path: str | Path) -> None:
    assert is_journal(path)
    assert shown(path) == str(path)


def refusal(url: str) -> str:
    """Return what Python prints if a search cannot open its storage."""
    problem = toys.Problem(LatencyLimit(18.0))
    try:
        optimize(problem, toys.starts(), toys.additive, SearchOptions(1, storage=url))
    except StudyError as error:
        return "".join(traceback.format_exception(error))
    raise AssertionError(f"{url} can be opened")


@pytest.mark.parametrize(
    "url",
    [
        "nosuch://me:secret@db/x",
        "sqlite://me:secret@db/x",  # SQLite takes no user, and says what it was given
        "sqlite://:secret@db/x",
        "sqlite://db:secret/x",  # the port is not a number
        "sqlite:///no/such/folder/study.db?password=secret",
        " sqlite://me:secret@db/x",
        "postgresql:me:secret@db/x",
        "sqlite://me:secret\udcff@db/x",
        "redis://me:secret@db/x",
        "sqlite://me:sec%72et@db/x?mode=secret",
    ],
)
def test_a_storage_that_cannot_be_opened_keeps_its_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = refusal(url)
    assert "StudyError: study storage" in printed
    assert "secret" not in printed
    assert "me:" not in printed


@given(
    st.sampled_from(["sqlite", "nosuch", "sqlite+nosuch"]),
    st.text(min_size=6).filter(lambda text: not text.isspace()),
)
@example("sqlite", "000@:\x1f")
@settings(max_examples=examples(30), deadline=None)
def test_no_password_is_printed(driver: str, password: str) -> None:
    marked = f"qzjx{password.replace('qzjx', '')}vkwq"
    printed = refusal(f"{driver}://me:{marked}@db/x")
    assert "qzjx" not in printed
    assert "vkwq" not in printed


@pytest.mark.parametrize(
    ("call", "wrapped"), [("set_trial_user_attr", False), ("set_trial_state_values", True)]
)
def test_a_database_that_fails_later_keeps_its_password(
    call: str, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = "sqlite:///study.db?secret"

    def lost(*args: object, **options: object) -> None:
        error = OperationalError("insert", {}, ValueError("server at user:secret is gone"))
        if not wrapped:
            raise error
        raise optuna.exceptions.StorageInternalError("perhaps invalid data") from error

    problem, options = toys.Problem(LatencyLimit(18.0)), SearchOptions(1, storage=url)
    monkeypatch.setattr(RDBStorage, call, lost)
    with pytest.raises(StudyError) as caught:
        optimize(problem, toys.starts(), toys.additive, options)
    printed = "".join(traceback.format_exception(caught.value))
    assert "study storage sqlite:///study.db: " in printed
    assert "server at user:*** is gone" in printed
    assert "secret" not in printed
