"""Every error that stream_ctr raises on purpose, and the exit code each one ends a command with.

StreamCtrError
|-- ConfigError      3   the configuration is wrong; the message names the key, the value and the way out
|-- BrokerError      4   no broker, or the broker refused us
|-- DataError        5   the data policy stopped the run, or a log cannot be read at all
`-- SnapshotError    6   no valid snapshot where one is needed
"""


class StreamCtrError(Exception):
    exit_code = 1


class ConfigError(StreamCtrError):
    exit_code = 3


class BrokerError(StreamCtrError):
    exit_code = 4


class DataError(StreamCtrError):
    exit_code = 5


class SnapshotError(StreamCtrError):
    exit_code = 6
