"""Which of MLflow's answers are final: what a database refuses for the moment is sent again, what it can never take is not."""

from __future__ import annotations

import sqlite3

import pytest
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE
from mlflow.store.db.utils import _get_managed_session_maker
from sqlalchemy import create_engine, exc, text
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool

from lce_dist.mlflow_client import is_refused


def through_mlflow(error: Exception) -> list[MlflowException]:
    """The error as a client meets it that opens the database itself, and one that asks a server."""
    with pytest.raises(MlflowException) as caught, _get_managed_session_maker(sessionmaker(), "postgresql")():
        raise error
    assert caught.value.error_code == "BAD_REQUEST"
    return [caught.value, RestException({"error_code": "BAD_REQUEST", "message": caught.value.message})]


def test_a_pool_without_a_free_connection_passes() -> None:
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with engine.connect(), pytest.raises(exc.TimeoutError, match="QueuePool limit") as caught:
        engine.connect()
    assert [is_refused(error) for error in through_mlflow(caught.value)] == [False, False]


@pytest.mark.parametrize("kind", [exc.InterfaceError, exc.InternalError, exc.DatabaseError])
def test_a_lost_connection_passes(kind: type[exc.DBAPIError]) -> None:
    error = kind("INSERT INTO metrics VALUES (?)", {"value": 1.0}, sqlite3.Error("connection already closed"))
    assert [is_refused(one) for one in through_mlflow(error)] == [False, False]


def test_a_session_that_an_error_left_behind_passes() -> None:
    error = exc.PendingRollbackError("This Session's transaction has been rolled back", code="7s2a")
    assert [is_refused(one) for one in through_mlflow(error)] == [False, False]


@pytest.mark.parametrize("kind", [exc.DataError, exc.IntegrityError])
def test_what_a_database_can_never_take_is_final(kind: type[exc.DBAPIError]) -> None:
    error = kind("INSERT INTO params VALUES (?)", {"value": "x"}, sqlite3.Error("value too long for type"))
    assert [is_refused(one) for one in through_mlflow(error)] == [True, True]


def test_what_mlflow_itself_refuses_is_final() -> None:
    with create_engine("sqlite://").connect() as connection, pytest.raises(exc.OperationalError) as caught:
        connection.execute(text("SELECT * FROM nothing"))
    link = str(exc.InterfaceError("", {}, caught.value))
    assert is_refused(MlflowException("Invalid value for a metric", BAD_REQUEST))
    assert is_refused(MlflowException(f"Invalid value {link}", INVALID_PARAMETER_VALUE))
    assert is_refused(MlflowException(f"Invalid parameter {link}, too long", BAD_REQUEST))  # somebody's own text
