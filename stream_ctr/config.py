"""Configuration: command line, then environment, then TOML file, then defaults.

The first of these that sets a key decides its value. An unknown key is an error that shows the
nearest known one. Only the commands and `assembly` read a `Config`; everything below takes keyword
arguments.

>>> environ = {"STREAM_CTR_MODEL__EMBEDDING_DIM": "16"}
>>> config = load(environ=environ, overrides={"join": {"label_window": "90s"}})
>>> config.model.embedding_dim, config.join.label_window.total_seconds()
(16, 90.0)
>>> load(environ={}, overrides={"modle": {"name": "deepfm"}})
Traceback (most recent call last):
stream_ctr.errors.ConfigError: unknown key 'modle'; did you mean 'model'?
"""

from __future__ import annotations

import importlib.resources
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic import Field as key
from pydantic_core import ErrorDetails

from stream_ctr import extensions
from stream_ctr.errors import ConfigError
from stream_ctr.events.field import (
    Field,
    NumericEncoding,
    cross,
    require_distinct_crosses,
    require_distinct_members,
    require_members,
)
from stream_ctr.events.times import require_zone
from stream_ctr.learn.spec import BLEND, SYSTEMS
from stream_ctr.messages import nearest, nearest_word

ENVIRONMENT_PREFIX = "STREAM_CTR_"
DEVICES = r"^(auto|cpu|cuda(:\d{1,2})?)$"
ENVIRONMENT_OTHERS = {
    "STREAM_CTR_DATA",
    "STREAM_CTR_FAILPOINT",
    "STREAM_CTR_FAILPOINT_RANK",
    "STREAM_CTR_SNAPSHOT",
    "STREAM_CTR_SNAPSHOT_ID",
}
"""Environment variables of the project that set no configuration key."""

_EXAMPLE_SUFFIX = ".toml"
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SHORTEST_DELTA = timedelta(milliseconds=100)
_SHORTEST_RANK_TIMEOUT = timedelta(seconds=5)
# Event times plus a few durations of this length are far below 2^63 milliseconds.
_LONGEST_SECONDS = 36500 * 86400.0
_UNIT_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_LARGEST_BYTES = 2**60
_NOT_SHOWN = "the value is not shown"
# What pydantic says with the names of types of Python, or longer.
_REASONS = {
    "tuple_type": "must be a list",
    "string_type": "must be a text in quotes",
    "string_pattern_mismatch": "does not have the form {pattern}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_long": "must have at most {max_length} entries",
}


def duration(text: object) -> timedelta:
    """Return the duration that a text such as "500ms", "10s" or "1h30m" means.

    Raises `ValueError` when a unit is missing.

    >>> duration("1h30m")
    datetime.timedelta(seconds=5400)
    >>> duration("10")
    Traceback (most recent call last):
    ValueError: a duration needs a unit (ms, s, m, h, d), got '10'
    """
    if isinstance(text, timedelta):
        text = format_duration(text)
    if str(text).strip().startswith("-"):
        raise ValueError(f"a duration cannot be negative, got {text!r:.80}")
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", str(text))
    if not parts or "".join(number + unit for number, unit in parts) != str(text).strip():
        raise ValueError(f"a duration needs a unit (ms, s, m, h, d), got {text!r:.80}")
    seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    if seconds > _LONGEST_SECONDS:
        raise ValueError(f"a duration is at most 100 years, got {text!r:.80}")
    return timedelta(seconds=seconds)


def format_duration(length: timedelta) -> str:
    """Return the shortest text that `duration` reads back.

    >>> format_duration(timedelta(minutes=90)), format_duration(timedelta(milliseconds=1500))
    ('90m', '1500ms')
    """
    milliseconds = in_milliseconds(length)
    for unit in ("d", "h", "m", "s"):
        unit_milliseconds = round(_UNIT_SECONDS[unit] * 1000)
        if milliseconds and milliseconds % unit_milliseconds == 0:
            return f"{milliseconds // unit_milliseconds}{unit}"
    return f"{milliseconds}ms"


def in_milliseconds(length: timedelta) -> int:
    """Return the length in milliseconds, rounded."""
    return round(length.total_seconds() * 1000)


def size(text: object) -> int:
    """Return the number of bytes that a text such as "512MiB" or "2GB" means.

    Raises `ValueError` when the unit is missing.

    >>> size("1.5GiB")
    1610612736
    >>> size("100")
    Traceback (most recent call last):
    ValueError: a size needs a unit (KB, MB, GB, KiB, MiB, GiB), got '100'
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(_UNIT_BYTES)})", str(text).strip())
    if match is None:
        raise ValueError(f"a size needs a unit ({', '.join(_UNIT_BYTES)}), got {text!r:.80}")
    number, unit = match.groups()
    found = int(min(float(number) * _UNIT_BYTES[unit], _LARGEST_BYTES))
    if not found:
        raise ValueError(f"a size must be at least one byte, got {text!r:.80}")
    return found


def _positive(length: timedelta) -> timedelta:
    if length < timedelta(milliseconds=1):
        raise ValueError(f"must be at least 1ms, got {format_duration(length)!r}")
    return length


Duration = Annotated[
    timedelta, BeforeValidator(duration), PlainSerializer(format_duration, return_type=str)
]
"""A length of time, read by `duration`."""

Period = Annotated[
    timedelta,
    BeforeValidator(duration),
    AfterValidator(_positive),
    PlainSerializer(format_duration, return_type=str),
]
"""A duration of at least a millisecond."""

Size = Annotated[str, AfterValidator(lambda text: size(text) and text)]
"""A number of bytes, as text that `size` reads."""


class Section(BaseModel):
    """A table of the TOML file. Its attributes are the keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def _distinct_members(names: tuple[str, ...]) -> tuple[str, ...]:
    require_distinct_members(names)
    return names


Cross = Annotated[tuple[str, ...], BeforeValidator(cross), AfterValidator(_distinct_members)]
"""The names of the fields of a cross product; `cross` reads text."""


class Columns(Section):
    """The names of the columns of a log, which is one of these.

    - Events: `kind` says which rows are impressions, clicks or examples.
    - Impressions: `click_time` is the time of the click, or missing.
    - Labelled rows: `label` is 0 or 1. The rows are examples, which do not wait for a click.

    An empty key is the name of the key itself, if there is such a column. Topics and JSON lines of
    events have fixed names.
    """

    time: str = ""
    """The event time. Without it, times are spread over `--span`."""
    id: str = ""
    """The id of the impression: text or integers. Empty: `impression_id`.

    Without it, ids are made from the file and the number of the row.
    """
    label: str = ""
    """1 if the impression was clicked, 0 if it was not."""
    kind: str = ""
    """`impression`, `click` or `example`."""
    click_time: str = ""
    """The time of the click, missing where there was none."""
    features: str = ""
    """A struct or object of the features. Without it, each feature is a column of its own."""


class Input(Section):
    """The source of the events."""

    topic: str = "clicks"
    """The topic of the events."""
    click_topic: str = ""
    """A second topic, for producers that send clicks to a topic of their own.

    Empty: `topic` holds both kinds of events.
    """
    bootstrap_servers: str = ""
    """Kafka brokers, host:port,...

    Empty: `bootstrap.servers` of the Kafka client properties, else localhost:9092. A login goes
    into the client properties `sasl.username` and `sasl.password`.
    """
    client: Literal["kafka-python", "confluent"] = "kafka-python"
    """The Kafka client that reads.

    `confluent` is librdkafka and needs stream-ctr[confluent]. A run can be resumed with the other
    client.
    """
    format: Literal["auto", "json", "arrow", "avro"] = "auto"
    """The format of the records.

    `auto` tells by the first bytes of each record, which are never ambiguous. With another one,
    records that begin otherwise are dead letters.
    """
    schema_registry: str = ""
    """The URL of a schema registry with Confluent's interface, for Avro records.

    Empty: `schema.registry.url` of the client properties. A login goes into the client property
    `basic.auth.user.info` (user:password) or `bearer.auth.token`, or into the environment variable
    SCHEMA_REGISTRY_BASIC_AUTH_USER_INFO.
    """
    schema_folder: str = ""
    """A folder with Avro schemas, in place of a registry: `<id>.avsc`.

    Records in single-object encoding find their schema by its fingerprint, whatever its file name.
    """
    group: str = "stream-ctr"
    """The consumer group of the offset commits, which are for lag tools only."""
    max_record_bytes: int = key(1 << 20, ge=1)
    """The largest accepted record. A larger one is a dead letter."""
    max_ahead: Duration = timedelta(minutes=5)
    """The largest difference by which an event's time may be ahead of its record's broker time.

    Where that time is ahead of the current time, or unknown as in a log, the event's time is
    compared with the current time. An event that is further ahead is a dead letter.
    """
    max_bad_share: float = key(0.5, gt=0, le=1)
    """Stop with exit code 5 when more than this share of at least 1,000 records is bad.

    All records that the state directory has read count, not only those of this start.
    An Arrow record with some good events counts in part.
    """
    read_ahead: int = key(50_000, ge=0)
    """The number of records that a thread may poll, decode and hash before they are learned.

    0: records are read in the thread that learns.
    """
    on_lost: Literal["stop", "skip"] = "stop"
    """The reaction when the topic no longer holds the next record.

    `stop` ends the run with exit code 5 and reports how much is lost. `skip` counts the lost
    records and continues after them.
    """
    time_unit: Literal["", "s", "ms", "us", "ns"] = ""
    """The unit of times that are numbers since 1970.

    Empty: for each number, the unit that puts it between 1973 and 2100.
    """
    time_zone: Annotated[str, AfterValidator(require_zone)] = ""
    """The zone of times that name none, such as UTC or Europe/Berlin.

    Empty: text without a zone is an error, and timestamps without one are in UTC.
    """
    delimiter: Annotated[str, key(max_length=1)] = ""
    """The delimiter of CSV files. Empty: a comma, semicolon, tab or bar, whichever fits."""
    column_names: tuple[str, ...] = ()
    """The names of the columns of CSV files without a header. Empty: the first line has them."""
    columns: Columns = Columns()
    """The names of the columns of a log."""

    @field_validator("schema_registry")
    @classmethod
    def _is_url(cls, url: str) -> str:
        if url and (not url.startswith(("http://", "https://")) or "@" in url):
            raise ValueError(
                "must be http://... or https://..., and a login goes into the client property "
                f"basic.auth.user.info ({_NOT_SHOWN})"
            )
        return url

    @field_validator("bootstrap_servers")
    @classmethod
    def _no_login(cls, servers: str) -> str:
        if "@" in servers:
            raise ValueError(
                "must be host:port,...; put a login into the Kafka options "
                f"sasl.username and sasl.password ({_NOT_SHOWN})"
            )
        if "//" in servers:
            raise ValueError(
                "must be host:port,... without a scheme such as http://: brokers speak Kafka's "
                f"own protocol, often at port 9092 ({_NOT_SHOWN})"
            )
        return servers


class Features(Section):
    """The fields of an impression, in the order of the model's input.

    Without any field, the fields are inferred from the first impressions.
    """

    categorical: tuple[str, ...] = ()
    """The names of the categorical fields. Their values are strings, integers or booleans."""
    numeric: tuple[str, ...] = ()
    """The names of the numeric fields."""
    numeric_encoding: NumericEncoding = "buckets"
    """The encoding of a number x.

    `buckets`: one row for each bucket, logarithmic or fitted. `value`: one row for the field,
    multiplied by x. `log_value`: one row for the field, multiplied by sign(x) log(1 + |x|).
    """
    fit_numbers: bool = True
    """Fit the encoding of numbers to the first thousand impressions.

    With `buckets`, a field whose numbers the logarithmic buckets hardly tell apart, such as numbers
    between 0 and 1, gets buckets that hold about as many numbers each. With the other encodings,
    multipliers are divided by the 95th percentile of their sizes and cut to [-4, 4]. The fit is
    kept in snapshots.
    """
    buckets_per_octave: float = key(2.0, gt=0, le=64)
    """The number of buckets between 1 + |x| and twice as much."""
    hash_seed: int = key(0, ge=0, lt=1 << 32)
    """The seed of the hash from values to rows of the table."""
    crosses: tuple[Cross, ...] = key((), max_length=256)
    """Cross products of categorical fields and bucketed numbers, such as "age*category".

    Only the wide part of lr_dnn uses them. When a name contains a * or a comma, write the cross
    product as a list of names.
    """

    @field_validator("numeric")
    @classmethod
    def _one_kind_each(cls, numeric: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        names = [*info.data.get("categorical", ()), *numeric]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"a field is listed twice: {', '.join(repeated)}")
        return numeric

    @field_validator("crosses")
    @classmethod
    def _crosses_of_fields(
        cls, crosses: tuple[Cross, ...], info: ValidationInfo
    ) -> tuple[Cross, ...]:
        require_distinct_crosses(crosses)
        # A key that is absent is wrong itself and has an error of its own.
        if {"categorical", "numeric", "numeric_encoding"} <= info.data.keys():
            fields = _fields(info.data["categorical"], info.data["numeric"])
            require_members(crosses if fields else (), fields, info.data["numeric_encoding"])
        return crosses

    def fields(self) -> tuple[Field, ...]:
        """Return the categorical fields, then the numeric ones."""
        return _fields(self.categorical, self.numeric)


def _fields(categorical: Sequence[str], numeric: Sequence[str]) -> tuple[Field, ...]:
    return (
        *(Field(name, "categorical") for name in categorical),
        *(Field(name, "numeric") for name in numeric),
    )


class Join(Section):
    """The wait of impressions for their clicks."""

    label_window: Period = timedelta(minutes=10)
    """The time that an impression waits for its click, in event time."""
    allowed_lateness: Duration = timedelta(seconds=30)
    """The lag of a partition's watermark behind its latest event."""
    early_click_wait: Duration = timedelta(seconds=30)
    """The time by which a click may be earlier than its impression, in event time."""
    duplicate_horizon: Duration = timedelta(hours=1)
    """The time that the id of an impression is remembered after its window has closed.

    A second impression with the id is dropped and counted.
    """
    idle_timeout: Duration = timedelta(seconds=30)
    """The time without a new record after which a partition no longer delays the watermark."""
    stall_clicks: float = key(50.0, ge=0)
    """Pause learning when this many clicks are overdue, at the rate of clicks so far.

    So many missing clicks mean that clicks are delayed, not absent. 0: learning never pauses.
    """
    max_memory: Size = "1GB"
    """The memory of waiting impressions, early clicks and remembered ids."""
    over_memory: Literal["spill", "evict"] = "spill"
    """The reaction when `max_memory` is full.

    `spill` writes waiting impressions to disk. `evict` drops a uniform share of them. Both are
    counted.
    """


def _model(name: str) -> str:
    if name in SYSTEMS or extensions.is_import_path(name):
        return name
    known = (*SYSTEMS, BLEND, *extensions.names())
    if name not in known:
        raise ValueError(f"there is no model {name!r:.80}{nearest(name, known)}")
    return name


ModelName = Annotated[str, AfterValidator(_model)]
"""The name of one of the nine systems, of the blend, of a registered model, or an import path."""


class Model(Section):
    """The network and its embedding table.

    The defaults are those of the DeepFM paper, without dropout because a stream is seen once.
    """

    name: ModelName = BLEND
    """The published model: a name that `stream-ctr models` lists, or the import path
    `package.module:Class` of a model of one's own.

    `blend` is the mixture of the models of the run and of FTRL experts.
    """
    beside: tuple[ModelName, ...] = ()
    """Additional models that learn the same examples, each with a table of its own.

    A blend mixes them; it mixes `deepfm` if there are none. The keys below apply to them too.
    """
    embedding_dim: int = key(10, ge=1, le=512)
    """The width K of an embedding."""
    hidden: tuple[Annotated[int, key(ge=1, le=16384)], ...] = key((400, 400, 400), max_length=64)
    """The widths of the hidden layers."""
    activation: Literal["paper", "relu", "tanh", "sigmoid"] = "paper"
    """The activation of the hidden layers. `paper` is tanh for IPNN and relu for the others."""
    dropout: float = key(0.0, ge=0, lt=1)
    """The share of activations dropped while learning. (The paper gives the share that is kept.)"""
    table_bits: int = key(20, ge=4, le=31)
    """The table has 2 ** table_bits rows."""
    initial_scale: float = key(0.01, ge=0)
    """The standard deviation of the initial embeddings."""
    pretrain_examples: int = key(20_000, ge=0)
    """The number of examples that FNN learns as an FM, which initialises its network."""

    @field_validator("beside")
    @classmethod
    def _distinct_models(cls, beside: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if BLEND in beside:
            raise ValueError("the blend is published or not at all; it is no additional model")
        names = [info.data.get("name"), *beside]
        if repeated := sorted({name for name in beside if names.count(name) > 1}):
            raise ValueError(
                f"a model is listed twice (model.name counts too): {', '.join(repeated)}"
            )
        return beside

    @property
    def mixed(self) -> tuple[ModelName, ...]:
        """The models of the paper that a blend mixes."""
        return self.beside or ("deepfm",)


class Learn(Section):
    """Optimizers, precision and threads of learning."""

    batch_size: int = key(4096, ge=1)
    """The largest number of examples in a batch.

    With the table optimizer `online`, batches start with 16 examples and grow by 16 with each 512
    that were learned. With the others, each batch has this number.
    """
    table_optimizer: Literal["online", "adagrad", "adam"] = "online"
    """The optimizer of the embeddings and the first-order weights.

    `online` steps them on the whole logit after each 256 examples within a batch, as FTRL does.
    `adagrad` and `adam` step once a batch. The paper uses Adam. Here `adam` updates only the rows
    of each batch, and makes the rows of the table up to three times as wide.
    """
    table_learning_rate: float = key(0.0, ge=0)
    """The learning rate of the embeddings. 0: 1.0, and 0.001 with adam.

    With online and adagrad the rate is divided by the number of fields, because the embeddings of
    all fields step together. A step is rate / (beta + sqrt(n)) times the gradient, where n is the
    sum of the squared gradients.
    """
    table_beta: float = key(0.0, ge=0)
    """The beta of the embeddings. 0: 1.0 with online, 3.0 with adagrad."""
    linear_learning_rate: float = key(0.0, ge=0)
    """The learning rate of the first-order weights. 0: 3.0 with online, 2.0 with adagrad, 0.001
    with adam.

    With online and adagrad it is divided by the number of fields and cross products.
    """
    linear_beta: float = key(0.0, ge=0)
    """The beta of the first-order weights. 0: 1.0. With online, FTRL's l2 = 1 adds to it."""
    dense_learning_rate: float = key(0.001, gt=0)
    """The learning rate of the dense part, which Adam optimizes.

    With the table optimizer `online` it is that of a batch of 512; it grows with the square root of
    the batch.
    """
    dense_weight_decay: float = key(0.0, ge=0)
    """The weight decay of the dense part."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The precision of the matrix products in the dense part. Its weights are always fp32.

    `auto` is bf16 where the processor or the GPU supports it. A resumed run keeps its precision
    unless this key is set to another one. On a GPU, `fp32` uses TF32: factors with 10 bits of
    mantissa, sums in fp32.
    """
    device: str = key("auto", pattern=DEVICES)
    """The device of the table and the dense part: `auto`, `cpu`, `cuda`, or `cuda:1` for the second
    of several GPUs.
    """
    threads: int = key(0, ge=0)
    """The number of CPU threads that learn. 0: as many as the machine has.

    The model is the same for any number of threads, bit for bit.
    """
    seed: int = key(0, ge=0, lt=1 << 63)
    """The seed of the initial weights and of dropout."""
    skips_before_rollback: int = key(8, ge=1)
    """Roll the model back to the last good snapshot after this many bad batches in a row.

    A bad batch has a loss or a gradient that is not finite.
    """


class Ftrl(Section):
    """FTRL-Proximal as published (McMahan et al. 2013).

    It trains `lr`. When `lr` is not among the models, it is an additional model named `ftrl`.
    """

    enabled: bool = True
    """False: there is no additional model `ftrl`. `lr` learns with FTRL-Proximal in any case."""
    alpha: float = key(0.1, gt=0)
    """The learning rate of a weight is alpha / (beta + sqrt(n))."""
    beta: float = key(1.0, gt=0)
    """See `alpha`; n is the sum of the squared gradients of the weight."""
    l1: float = key(0.0, ge=0)
    """The strength of L1 regularization. The intercept is not regularized."""
    l2: float = key(1.0, ge=0)
    """The strength of L2 regularization. The intercept is not regularized."""


class Baseline(Section):
    """The baseline: logistic regression with the FTRL of River, in a process of its own."""

    enabled: bool = True
    """False: there is no baseline."""
    sample_rate: float = key(1.0, gt=0, le=1)
    """The share of impressions, chosen by a hash of their id, that the baseline learns.

    Paired metrics are computed on these impressions.
    """
    alpha: float = key(0.05, gt=0)
    """The learning rate of a weight is alpha / (beta + sqrt(n))."""
    beta: float = key(1.0, ge=0)
    """See `alpha`; n is the sum of the squared gradients of the weight."""
    l1: float = key(0.0, ge=0)
    """The strength of L1 regularization."""
    l2: float = key(1.0, ge=0)
    """The strength of L2 regularization."""
    intercept_learning_rate: float = key(0.01, ge=0)
    """The learning rate of the intercept."""


class Metrics(Section):
    """The windows of the metrics, and where reports go."""

    window: Period = timedelta(minutes=10)
    """The length of a window, in event time."""
    rolling_windows: int = key(6, ge=1, le=1000)
    """The number of newest windows that the rolling metrics cover."""
    served_share: float = key(0.125, ge=0, le=1)
    """The share of impressions, chosen by a hash of their id, that is also scored as served.

    These are scored by the snapshot that was published when they arrived. 0: none.
    """
    field_health: bool = True
    """Measure missing and unseen values, shifts and collisions by field."""
    field_share: float = key(0.125, gt=0, le=1)
    """The share of impressions, chosen by a hash of their id, whose fields are measured.

    Distinct values are counted in all of them.
    """
    topic: str = "stream-ctr.metrics"
    """The topic of the reports when the input is Kafka. Empty: none.

    The state directory has all reports in any case.
    """
    report_file_size: Size = "64MiB"
    """The size at which `reports.jsonl` of the state directory gets a number and another begins."""
    report_file_age: Period = timedelta(days=30)
    """The age at which the same happens."""
    report_files: int = key(10, ge=1)
    """The number of such files to keep. Older ones are removed."""


class Schedule(Section):
    """The intervals of reports and snapshots, by the clock."""

    report_every: Period = timedelta(seconds=10)
    """The time between two reports."""
    snapshot_every: Period = timedelta(minutes=10)
    """The time between two snapshots."""
    snapshot_examples: int = key(0, ge=0)
    """Also take a snapshot each time this many examples were learned. 0: by the clock only."""


class Snapshots(Section):
    """Storage, signing and publication of snapshots."""

    keep: int = key(3, ge=1)
    """The number of snapshots to keep."""
    topic: str = "stream-ctr.snapshots"
    """The compacted topic of the pointers to published snapshots. Empty: none."""
    model_name: str = "default"
    """The key of this model's pointer on the snapshot topic."""
    signing_key: str = ""
    """The file of an Ed25519 private key in PEM.

    Snapshots are signed with it, and a run resumes only from a snapshot with its signature. Empty:
    snapshots are not signed.
    """
    delta_every: Duration = timedelta(0)
    """The time between two deltas, which bring what was learned between snapshots to servers.

    0s: none. Otherwise at least 100ms.
    """
    delta_precision: Literal["fp32", "bf16"] = "fp32"
    """The numbers of rows in deltas. `bf16` halves their bytes and rounds them."""
    delta_topic: str = "stream-ctr.deltas"
    """The topic of the deltas when the input is Kafka. Empty: none.

    The state directory has them in any case.
    """
    url: str = ""
    """The place from which other machines load snapshots and deltas, as s3://bucket/folder.

    Any file system of fsspec may hold it. A run copies what servers need to it. A login goes into
    the environment, never into the URL. Empty: none.
    """
    onnx: bool = False
    """Whether snapshots hold an ONNX graph of each network, for servers without torch."""
    gate_clicks: int = key(1000, ge=0)
    """The number of clicks since the last verdict that a new verdict needs.

    A snapshot is published unless the verdict is that the model is worse than a constant, than
    another model or than the published snapshot. 0: no verdicts; every snapshot is published whose
    model saw a click.
    """
    gate_logloss: float = key(0.1, gt=0)
    """The share by which the logloss may be above that of each other model.

    The same share applies to the comparison with the published snapshot.
    """
    gate_calibration: float = key(0.3, gt=0)
    """The amount by which |ln(predicted / actual clicks)| may be above that of the other models.

    The best calibrated of them counts. Without any, it is that of the published snapshot.
    """

    @field_validator("signing_key")
    @classmethod
    def _no_key(cls, path: str) -> str:
        if "\n" in path or "-----" in path:
            raise ValueError(f"must be the name of a PEM file, not the key itself ({_NOT_SHOWN})")
        return path

    @field_validator("delta_every")
    @classmethod
    def _not_too_often(cls, length: timedelta) -> timedelta:
        if length and length < _SHORTEST_DELTA:
            raise ValueError(f"must be 0s or at least 100ms, got {format_duration(length)!r}")
        return length

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        if "@" in url.rpartition("://")[2].partition("/")[0]:
            raise ValueError(f"must have no login in it ({_NOT_SHOWN})")
        if url and not re.fullmatch(r"[a-z][a-z0-9+.-]*://\S+", url):
            raise ValueError(
                f"must be a URL with a scheme, such as s3://bucket/folder or file:///folder, "
                f"got {url!r:.200}"
            )
        return url


class Http(Section):
    """The port of a run: its page, metrics, probes and reports."""

    address: str = ""
    """The address to listen on, as `127.0.0.1:9100`. Empty: none.

    `:9100` stands for 127.0.0.1:9100. Any address that other machines can reach needs a token.
    """
    token_file: str = ""
    """The file of the token that requests must show, in its first line.

    Other users of the machine must not be able to read it. Empty: no token.
    """


class Ranks(Section):
    """The processes of a run that torchrun starts."""

    timeout: Period = timedelta(minutes=5)
    """The time that a rank waits for another one before the run ends.

    `torchrun --max-restarts` then starts all ranks again. The time must be longer than the largest
    model takes to load. At least 5s.
    """
    share_input: bool = True
    """Every rank reads its own partitions of a topic, and joins its share of the impressions.

    `join.max_memory` is for all ranks together. false: rank 0 reads and joins everything, as it
    does with logs.
    """

    @field_validator("timeout")
    @classmethod
    def _not_too_short(cls, length: timedelta) -> timedelta:
        if length < _SHORTEST_RANK_TIMEOUT:
            raise ValueError(f"must be at least 5s, got {format_duration(length)!r}")
        return length


class Config(Section):
    """Everything that can be configured. `stream-ctr config` prints it with the current values."""

    input: Input = Input()
    features: Features = Features()
    join: Join = Join()
    model: Model = Model()
    learn: Learn = Learn()
    ftrl: Ftrl = Ftrl()
    baseline: Baseline = Baseline()
    metrics: Metrics = Metrics()
    schedule: Schedule = Schedule()
    snapshots: Snapshots = Snapshots()
    http: Http = Http()
    ranks: Ranks = Ranks()


def load(
    path: Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration.

    `overrides` take precedence over `environ`, over the TOML file at `path`, over `base`, over the
    defaults. `overrides` and `base` are dictionaries of sections. Without `environ`, the
    environment of the process is read.

    Raises `ConfigError` with each wrong key, its value and the nearest known key.
    """
    layers = {
        "in the state directory": base or {},
        f"in {path}": _read_toml(path) if path else {},
        "in the environment": _from_environment(os.environ if environ is None else environ),
        "": overrides or {},
    }
    values: dict[str, Any] = {}
    for layer in layers.values():
        values = merged(values, layer)
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_explain(problem, layers) for problem in error.errors())
        ) from None


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of both layers; a key of `upper` takes precedence."""
    both = dict(lower)
    for name, value in upper.items():
        below = both.get(name, {} if isinstance(value, Mapping) else None)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            both[name] = merged(below, value)
        elif not isinstance(value, Mapping):
            both[name] = value
        # Otherwise the wrong value below stays, and the error names it.
    return both


def examples() -> tuple[str, ...]:
    """Return the names of the example configurations, which come with the package.

    >>> examples()
    ('avazu', 'criteo', 'demo', 'events', 'obd')
    """
    names = [entry.name for entry in _example_folder().iterdir()]
    return tuple(
        sorted(
            name.removesuffix(_EXAMPLE_SUFFIX) for name in names if name.endswith(_EXAMPLE_SUFFIX)
        )
    )


def example(name: str) -> str:
    """Return the text of an example configuration, a TOML file with comments.

    Raises `ConfigError` when there is no example of this name.

    >>> print(example("obd").splitlines()[2])
    #   stream-ctr run --source impressions.csv --format obd --config configs/obd.toml
    """
    known = examples()
    if name not in known:
        names = ", ".join(known)
        raise ConfigError(
            f"unknown example {name!r:.80}{nearest(name, known)}; the examples are {names}"
        )
    return (_example_folder() / f"{name}{_EXAMPLE_SUFFIX}").read_text("utf-8")


def _example_folder() -> Traversable:
    return importlib.resources.files("stream_ctr") / "configs"


def known_keys() -> Iterator[str]:
    """Yield every `section.key` that can be set, and every `section.table.key`."""
    return _keys(Config, "")


def _keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            yield from _keys(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def nested(name: str, value: object) -> dict[str, Any]:
    """Return the layer that sets this one key.

    >>> nested("input.columns.time", "ts")
    {'input': {'columns': {'time': 'ts'}}}
    """
    section, _, rest = name.partition(".")
    return {section: nested(rest, value) if rest else value}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the sections that variables STREAM_CTR_SECTION__KEY=value set. Lists are a,b,c."""
    names = {
        f"{ENVIRONMENT_PREFIX}{dotted.replace('.', '__').upper()}": dotted
        for dotted in known_keys()
    }
    layer: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in ENVIRONMENT_OTHERS:
            continue
        if name not in names:
            raise ConfigError(f"unknown environment variable {name!r}{_near_variable(name, names)}")
        key = names[name]
        layer = merged(layer, nested(key, parse_text(key, value)))
    return layer


def _near_variable(name: str, names: Iterable[str]) -> str:
    """Return a suggestion of the most similar variable, compared without the prefix of all."""
    keys = [known.removeprefix(ENVIRONMENT_PREFIX) for known in names]
    near = nearest_word(name.removeprefix(ENVIRONMENT_PREFIX), keys)
    if near is None:
        return f": {ENVIRONMENT_PREFIX}SECTION__KEY sets section.key, see `stream-ctr config`"
    return f"; did you mean {ENVIRONMENT_PREFIX + near!r}?"


def parse_text(name: str, value: str) -> object:
    """Return the value of an environment variable or of `-X section.key=value`.

    A key that holds a list takes a text with commas.

    >>> parse_text("features.numeric", "age, price"), parse_text("learn.seed", "3")
    (('age', 'price'), '3')
    """
    if isinstance(_default(name), tuple):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _default(name: str) -> object:
    """Return the default value of `section.key`."""
    found: object = Config()
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _explain(problem: ErrorDetails, layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the message for one error of a configuration that these layers add up to."""
    location = [str(part) for part in problem["loc"]]
    place = _place(location, layers)
    if problem["type"] == "extra_forbidden":
        return f"{_unknown_key(location)}{place}"
    reason = _reason(problem)
    value = _shown(problem["input"])
    own = problem["type"] == "value_error" and value in reason  # a check of this module says it
    shown = "" if own or "got " in reason or _NOT_SHOWN in reason else f", got {value}"
    return f"{'.'.join(location)}: {reason}{shown}{place}"


def _shown(value: object) -> str:
    """Return a wrong value for a message, unless it is a key in PEM."""
    return f"({_NOT_SHOWN})" if "-----BEGIN" in str(value) else f"{value!r:.200}"


def _reason(problem: ErrorDetails) -> str:
    """Return what is wrong in the words of a configuration, not of Python."""
    facts = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", str(facts["expected"]))
        hint = nearest(str(problem["input"]), known)
        return f"must be one of {', '.join(known)}, got {_shown(problem['input'])}{hint}"
    if problem["type"] == "model_type":
        return f"must be a table of keys, [{problem['loc'][0]}]"
    if form := _REASONS.get(problem["type"]):
        return form.format(**facts)
    return problem["msg"].removeprefix("Value error, ")


def _place(location: Sequence[str], layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return where the value at a location was given, if not in a flag."""
    section, *option = location
    for words, layer in reversed(list(layers.items())):
        values = layer.get(section)
        within = values if isinstance(values, Mapping) else {}
        if option[0] in within if option else section in layer:
            return f" ({words})" if words else ""
    return ""


def _unknown_key(location: Sequence[str]) -> str:
    name = ".".join(location)
    table = name.rpartition(".")[0]
    known = list(known_keys()) if table else list(Config.model_fields)
    words = [word for word in known if not table or word.startswith(f"{table}.")]
    return f"unknown key {name!r}{nearest(name, words)}"
