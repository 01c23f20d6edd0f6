"""The errors that stream_ctr raises on purpose, and the exit code of a command that raises one.

    StreamCtrError      1
    |-- ConfigError     3   the configuration is wrong
    |-- BrokerError     4   no broker answers, or the broker refuses the client
    |-- DataError       5   the data policy stopped the run, a log cannot be read at all, or all of
    |   |                   the input was learned and nothing may be published
    |   `-- InvalidFeatures    features to score are not what the model learned from
    `-- SnapshotError   6   a valid snapshot is needed, and there is none

A command that is used wrongly exits with 2, as `click` does.
"""


class StreamCtrError(Exception):
    """The base of all errors of stream_ctr. Messages name the thing, the value and the way out.

    >>> ConfigError("label window must be positive, got -5s").exit_code
    3
    """

    exit_code = 1


class ConfigError(StreamCtrError):
    """The configuration is wrong. The message names the key and the value."""

    exit_code = 3


class BrokerError(StreamCtrError):
    """No broker answers, or the broker refuses the client."""

    exit_code = 4


class DataError(StreamCtrError):
    """The data policy stopped the run, a log cannot be read, or nothing may be published."""

    exit_code = 5


class InvalidFeatures(DataError, ValueError):
    """Features to score are not what the model learned from.

    `reason` is a code from a small fixed set (see `events.feature_rows`), `problem` says what is
    wrong. `row` is the index of the row and `field` the name of the field, None where there is no
    single one.

    >>> str(InvalidFeatures("there is no field 'ap'", reason="unknown_field", row=3))
    "row 3: there is no field 'ap'"
    """

    def __init__(
        self, problem: str, *, reason: str, row: int | None = None, field: str | None = None
    ) -> None:
        super().__init__(problem if row is None else f"row {row}: {problem}")
        self.problem = problem
        self.reason = reason
        self.row = row
        self.field = field


class SnapshotError(StreamCtrError):
    """A valid snapshot is needed, and there is none."""

    exit_code = 6
