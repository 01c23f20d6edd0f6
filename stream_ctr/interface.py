"""Runs from Python: what `stream-ctr run` does, as part of another program.

    from stream_ctr import Subscriber, reports, run

    run({"features": {"categorical": ["app"]}}, source="clicks.jsonl", state="state")
    print(reports("state").to_pandas())
    model = Subscriber("state")
    model.next(timeout_seconds=10)
    print(model.predict({"app": "maps"}))

Without a `source`, the run reads the topics of the configuration from Kafka.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from stream_ctr.cli import runs
from stream_ctr.cli.assembly import log_layout, register_named_models, signing_key
from stream_ctr.cli.beginning import Beginning, find_beginning
from stream_ctr.cli.client import client_options, connector_errors
from stream_ctr.cli.client import topic_pointers as client_pointers
from stream_ctr.cli.replay import Stream
from stream_ctr.cli.runs import Caller, StopRequest
from stream_ctr.config import Config, load
from stream_ctr.errors import ConfigError
from stream_ctr.logs.open import open_logs
from stream_ctr.snapshots.lineage import require_run_id
from stream_ctr.snapshots.pointer_sources import PointerSource
from stream_ctr.snapshots.signing import verifier
from stream_ctr.snapshots.snapshot_topic import Sink
from stream_ctr.train.report import Report
from stream_ctr.train.source import Source

Settings: TypeAlias = Config | Mapping[str, Mapping[str, Any]] | str | Path | None
"""A configuration, sections of one, or the path of a TOML file."""


def _ignore(report: Report) -> None:
    pass


def run(
    config: Settings = None,
    *,
    source: Source | Stream | str | Path | Sequence[str | Path] | None = None,
    state: str | Path = "state",
    on_report: Callable[[Report], None] = _ignore,
    sink: Sink | None = None,
    stop: StopRequest | None = None,
    until_end: bool = False,
    keep_open: bool = False,
    take_over: bool = False,
    replace_run: str | None = None,
    begin_from: str | Path | None = None,
    predictions: str | Path | None = None,
    http: str | None = None,
    http_token_file: str | Path | None = None,
    kafka: Mapping[str, str] | None = None,
) -> Report | None:
    """Learn from a log, a source or Kafka topics, and return the last report.

    `source` is the path of a log, of a directory of logs, or several of these, which are read one
    after another; a log that `open_log` or `Simulation` returns; or any `Source`. Without one the
    topics of the configuration are read, with the Kafka client properties `kafka`, and `until_end`
    stops at the end that they have now. With `keep_open`, label windows that are open at the end
    stay open for the input that follows. Everything that the run writes goes to the directory
    `state`, and an existing one is resumed. Sections of a configuration lie over the configuration
    that such a directory keeps, as flags do; a `Config` is used as it is.

    `on_report` is called with each report, the last one included. Calling `stop`, from any thread,
    ends the run with a snapshot. A `sink` gets reports, pointers and dead letters; with Kafka they
    go to topics instead. `predictions` is a directory for the predictions of every example.

    A new state begins with the weights of the snapshot `begin_from`, or of the newest one in that
    state directory; `config` may change its configuration. On a snapshot topic, the run may replace
    the run `replace_run`. With `take_over`, it takes the directory from another process.

    `http` is an address such as "127.0.0.1:9100", where the run answers requests for its page, its
    metrics and its reports, as `stream-ctr run --http` does. Where other machines can connect, the
    file `http_token_file` must hold a token.

    Returns None if the run was stopped before its first impression. Raises `StreamCtrError`:
    `ConfigError` for a wrong configuration, `DataError` if nothing could be learned or published,
    `BrokerError` if no broker answers, `NameHeld` if another run holds the name on the snapshot
    topic.
    """
    if sink is not None and source is None:
        raise ConfigError("a sink is for a source of one's own or a log; Kafka's topics are sinks")
    caller = Caller(on_report, stop or StopRequest(), sink)
    written = Path(predictions) if predictions is not None else None
    if replace_run is not None:
        _require_replaceable(replace_run, source)
    beginning = _beginning(begin_from, config, Path(state)) if begin_from is not None else None
    with runs.state_directory(Path(state), take_over=take_over) as lease:
        settings = _configured(config, Path(state), beginning)
        settings = _with_port(settings, http, http_token_file)
        if source is None:
            client = client_options(settings.input.bootstrap_servers, None, kafka or {})
            with connector_errors():
                report = runs.train_on_kafka(
                    client,
                    settings,
                    lease,
                    until_end=until_end,
                    keep_open=keep_open,
                    beginning=beginning,
                    predictions=written,
                    replace_run=replace_run,
                    take_over=take_over,
                    caller=caller,
                )
        elif hasattr(source, "poll"):
            report = runs.train_on_source(
                cast(Source, source),
                settings,
                lease,
                beginning=beginning,
                predictions=written,
                caller=caller,
            )
        else:
            report = runs.train_on_logs(
                _logs(source, settings),
                settings,
                lease,
                keep_open=keep_open,
                beginning=beginning,
                predictions=written,
                caller=caller,
            )
    if report:
        runs.require_published(report, kept_open=keep_open)
    return report


def _with_port(config: Config, http: str | None, token_file: str | Path | None) -> Config:
    given = {"address": http, "token_file": None if token_file is None else str(token_file)}
    changed = {name: value for name, value in given.items() if value is not None}
    return config.model_copy(update={"http": config.http.model_copy(update=changed)})


def _require_replaceable(run_id: str, source: object) -> None:
    if source is not None:
        raise ConfigError("replace_run is for the snapshot topic, and a source has none")
    try:
        require_run_id(run_id)
    except ValueError as error:
        raise ConfigError(f"replace_run: {error}") from None


def _logs(source: Any, config: Config) -> Sequence[Stream]:
    if isinstance(source, str | Path):
        source = [source]
    if not isinstance(source, Sequence):
        return [cast(Stream, source)]
    return open_logs(source, layout=log_layout(config))


@contextlib.contextmanager
def topic_pointers(
    config: Settings = None,
    *,
    kafka: Mapping[str, str] | None = None,
    snapshots: str | Path | None = None,
    public_key: str | Path | None = None,
) -> Iterator[PointerSource]:
    """Yield the pointers on the snapshot topic of the configuration, for a `Subscriber`.

        with topic_pointers("my.toml") as pointers, Subscriber(pointers) as model: ...

    `kafka` are the Kafka client properties. `snapshots` is the folder that holds the snapshots on
    this machine, by default that of the pointers. With `public_key`, a PEM file, only pointers that
    are signed by its private key say which run holds the name. Raises `BrokerError` if no broker
    answers.
    """
    settings = _load(config)
    client = client_options(settings.input.bootstrap_servers, None, kafka or {})
    topic, name = settings.snapshots.topic, settings.snapshots.model_name
    folder = Path(snapshots) if snapshots is not None else None
    signature = verifier(public_key)
    with client_pointers(
        client, topic, model_name=name, snapshots=folder, signature=signature
    ) as pointers:
        yield pointers


def _beginning(path: str | Path, config: Settings, state: Path) -> Beginning | None:
    key = signing_key(_load(config))
    return find_beginning(Path(path), state, key.verify if key else None)


def _configured(config: Settings, state: Path, beginning: Beginning | None) -> Config:
    """Return the configuration of a run, above what it begins with or its directory keeps."""
    own = _load(config)
    # Before the configuration that the state directory keeps, whose names import nothing.
    register_named_models(own)
    key = signing_key(own)
    kept = runs.kept_config(state, key.verify if key else None)
    return _load(config, base=beginning.config if beginning else kept)


def _load(config: Settings, base: Mapping[str, Any] | None = None) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, str | Path):
        return load(Path(config), base=base)
    return load(overrides=config, base=base)
