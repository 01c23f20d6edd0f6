"""Flink SQL: the interval join of impressions and clicks in a topic of JSON, without output.

`seconds` is the net runtime that Flink reports for the job. `whole_seconds` is the time from its
submission to its end, with its start-up. The first job is not counted, because the JVM compiles its
code during it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from answers import answer
from pyflink.table import EnvironmentSettings, TableEnvironment
from pyflink.version import __version__

EVENTS = """
CREATE TABLE events (
  kind STRING, impression_id STRING, `time` BIGINT{features},
  et AS TO_TIMESTAMP_LTZ(`time`, 3), WATERMARK FOR et AS et - INTERVAL '30' SECOND
) WITH (
  'connector' = 'kafka', 'topic' = '{topic}',
  'properties.bootstrap.servers' = '{servers}', 'format' = 'json',
  'scan.startup.mode' = 'earliest-offset', 'scan.bounded.mode' = 'latest-offset'
)"""
JOINED = """
SELECT i.impression_id, i.et, c.impression_id AS clicked{features}
FROM (SELECT * FROM events WHERE kind = 'impression') i
LEFT JOIN (SELECT * FROM events WHERE kind = 'click') c
ON i.impression_id = c.impression_id AND c.et BETWEEN i.et AND i.et + INTERVAL '{window}' SECOND"""
NOTHING = """
CREATE TABLE nothing (
  impression_id STRING, et TIMESTAMP_LTZ(3), clicked STRING{features}
) WITH ('connector' = 'blackhole')"""


def environment(jar: Path, parallelism: int) -> TableEnvironment:
    table = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
    settings = {
        "pipeline.jars": jar.resolve().as_uri(),
        "parallelism.default": str(parallelism),
        "table.local-time-zone": "UTC",
    }
    for name, value in settings.items():
        table.get_config().set(name, value)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jar", type=Path, required=True)
    parser.add_argument("--servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--events", type=int, required=True, help="number of events in the topic")
    parser.add_argument("--window-seconds", type=int, default=60)
    parser.add_argument("--parallelism", type=int, required=True)
    parser.add_argument("--features", nargs="*", default=[], help="NAME:TYPE of each feature")
    arguments = parser.parse_args()
    pairs = (feature.partition(":") for feature in arguments.features)
    row = ", ".join(f"`{name}` {kind}" for name, _, kind in pairs)
    columns = f", features ROW<{row}>" if row else ""
    table = environment(arguments.jar, arguments.parallelism)
    table.execute_sql(
        EVENTS.format(features=columns, topic=arguments.topic, servers=arguments.servers)
    )
    table.execute_sql(NOTHING.format(features=columns))
    joined = JOINED.format(features=", i.features" if row else "", window=arguments.window_seconds)

    def measure() -> dict[str, float]:
        began = time.perf_counter()
        result = table.execute_sql(f"INSERT INTO nothing {joined}")
        result.wait()
        whole = time.perf_counter() - began
        net = result.get_job_client().get_job_execution_result().result().get_net_runtime() / 1000
        return {"count": arguments.events, "seconds": net, "whole_seconds": whole}

    first = measure()
    overhead = first["whole_seconds"] - first["seconds"]
    note = (
        "net of what it took to plan, submit and end the job "
        f"({overhead:.1f} s the first, uncounted time)"
    )
    answer(measure, note=f"Flink {__version__}, parallelism {arguments.parallelism}, {note}")


if __name__ == "__main__":
    main()
