"""Run examples.sql with PyFlink: until Ctrl-C or, with --until-end, to the end of the topic.

    python deploy/flink/submit.py --connector flink-sql-connector-kafka-4.0.1-2.0.jar

Needs Python 3.11, Java 17 and `pip install apache-flink==2.0.2`, in an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pyflink.table import EnvironmentSettings, TableEnvironment

CONNECTOR = "FLINK_KAFKA_CONNECTOR"


def statements(script: str) -> list[str]:
    """Return the statements of a script without its comments."""
    code = "\n".join(line.partition("--")[0].rstrip() for line in script.splitlines())
    return [statement.strip() for statement in code.split(";") if statement.strip()]


def changed_options(given: argparse.Namespace) -> Iterator[str]:
    """Yield the statements that give both tables their topics and brokers."""
    until_end = {"scan.bounded.mode": "latest-offset"} if given.until_end else {}
    tables = {"events": (given.events, until_end), "examples": (given.examples, {})}
    for table, (topic, more) in tables.items():
        options = {
            "topic": topic,
            "properties.bootstrap.servers": given.bootstrap_servers,
            **more,
        }
        listed = ", ".join(f"'{key}' = '{value}'" for key, value in options.items())
        yield f"ALTER TABLE {table} SET ({listed})"


def run(given: argparse.Namespace) -> None:
    """Execute the statements, and wait for the job of the INSERT."""
    environment = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
    settings = environment.get_config()
    settings.set("pipeline.jars", given.connector.resolve().as_uri())
    settings.set("parallelism.default", str(given.parallelism))
    for statement in statements(given.sql.read_text()):
        if setting := re.fullmatch(r"SET\s+'(.+)'\s*=\s*'(.+)'", statement):
            settings.set(*setting.groups())
        elif statement.startswith("INSERT"):
            for change in changed_options(given):
                environment.execute_sql(change)
            job = environment.execute_sql(statement)
            print(f"the job runs: {given.events} to {given.examples}", flush=True)
            job.wait()
        else:
            environment.execute_sql(statement)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--connector",
        type=Path,
        default=os.environ.get(CONNECTOR),
        help=f"the jar flink-sql-connector-kafka; default: {CONNECTOR} of the environment",
    )
    parser.add_argument("--bootstrap-servers", default="localhost:9092")
    parser.add_argument("--events", default="events", help="the topic of impressions and clicks")
    parser.add_argument("--examples", default="examples", help="the topic to write")
    parser.add_argument("--sql", type=Path, default=Path(__file__).with_name("examples.sql"))
    parser.add_argument("--until-end", action="store_true", help="end at the end of the topic")
    parser.add_argument("--parallelism", type=int, default=1)
    given = parser.parse_args()
    if given.connector is None or not Path(given.connector).is_file():
        parser.error(f"no connector at {given.connector}: give --connector or set {CONNECTOR}")
    given.connector = Path(given.connector)
    return given


if __name__ == "__main__":
    try:
        run(arguments())
    except KeyboardInterrupt:
        sys.exit(130)
