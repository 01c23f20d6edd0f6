"""Configuration: CLI > environment > file > default; an unknown key is an error that shows the nearest match.

Only the commands and `assembly` know that a configuration exists. Below them everything takes keyword arguments.

>>> config = load(environ={"STREAM_CTR_MODEL__EMBEDDING_DIM": "16"}, overrides={"join": {"label_window": "90s"}})
>>> config.model.embedding_dim, config.join.label_window.total_seconds()
(16, 90.0)
>>> load(environ={}, overrides={"modle": {"name": "deepfm"}})
Traceback (most recent call last):
stream_ctr.errors.ConfigError: unknown key 'modle'; did you mean 'model'?
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    field_validator,
)
from pydantic import Field as key

from stream_ctr.errors import ConfigError
from stream_ctr.events.field import Field, cross, require_members, shown_cross
from stream_ctr.messages import nearest

ENVIRONMENT_PREFIX = "STREAM_CTR_"
# Environment names of the project that are not configuration keys.
ENVIRONMENT_OTHERS = {
    "STREAM_CTR_DATA",
    "STREAM_CTR_FAILPOINT",
    "STREAM_CTR_SNAPSHOT",
    "STREAM_CTR_SNAPSHOT_ID",
}
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_SECONDS = (
    36500 * 86400.0
)  # sums of event times and a few of these stay far from the end of 64 bits
_LARGEST_SIZE = 2**60
_NOT_SHOWN = "the value is not shown"


def duration(text: object) -> timedelta:
    """A length of time such as "500ms", "10s", "1h30m"; a bare number has no unit and is refused.

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
    """The shortest text that `duration` reads back.

    >>> format_duration(timedelta(minutes=90)), format_duration(timedelta(milliseconds=1500))
    ('90m', '1500ms')
    """
    milliseconds = in_milliseconds(length)
    for unit in ("d", "h", "m", "s"):
        size = round(_UNIT_SECONDS[unit] * 1000)
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms"


def in_milliseconds(length: timedelta) -> int:
    return round(length.total_seconds() * 1000)


_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size(text: object) -> int:
    """A number of bytes such as "512MiB" or "2GB"; a bare number has no unit and is refused.

    >>> size("1.5GiB")
    1610612736
    >>> size("100")
    Traceback (most recent call last):
    ValueError: a size needs a unit (KB, MB, GB, KiB, MiB, GiB), got '100'
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(_SIZE_UNITS)})", str(text).strip())
    if match is None:
        raise ValueError(f"a size needs a unit ({', '.join(_SIZE_UNITS)}), got {text!r:.80}")
    found = int(min(float(match[1]) * _SIZE_UNITS[match[2]], _LARGEST_SIZE))
    if not found:
        raise ValueError(f"must be more than nothing, got {text!r:.80}")
    return found


def _positive(length: timedelta) -> timedelta:
    if length < timedelta(milliseconds=1):
        raise ValueError(f"must be at least 1ms, got {format_duration(length)!r}")
    return length


Duration = Annotated[
    timedelta, BeforeValidator(duration), PlainSerializer(format_duration, return_type=str)
]
Period = Annotated[
    timedelta,
    BeforeValidator(duration),
    AfterValidator(_positive),
    PlainSerializer(format_duration, return_type=str),
]
"""A duration of at least a millisecond."""


Size = Annotated[str, AfterValidator(lambda text: size(text) and text)]
"""A number of bytes, as text; `size` reads it."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def _some_fields(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) < 2 or not all(names):
        raise ValueError(
            f'a cross product is of two or more fields, "age*category", got {shown_cross(names)}'
        )
    if len(set(names)) < len(names):
        raise ValueError(f"a field is in it twice: {shown_cross(names)}")
    return names


Cross = Annotated[tuple[str, ...], BeforeValidator(cross), AfterValidator(_some_fields)]
"""Names of the fields of a cross product; text is read by `cross`."""


class Input(Section):
    """Where events come from."""

    topic: str = "clicks"
    click_topic: str = ""
    """A second topic, for producers that keep clicks apart. Empty: one topic holds both."""
    bootstrap_servers: str = ""
    """Empty: bootstrap.servers of the Kafka client properties, else localhost:9092. A login is not part of it (see sasl.username)."""
    client: Literal["kafka-python", "confluent"] = "kafka-python"
    """What reads from Kafka; confluent is librdkafka, and needs stream-ctr[confluent]. Either goes on where the other one was."""
    group: str = "stream-ctr"
    """Consumer group of the advisory offset commits that lag tools read."""
    max_record_bytes: int = key(1 << 20, ge=1)
    max_ahead: Duration = timedelta(minutes=5)
    """How far an event's time may be ahead of the broker's time of its record (of now, in a log); beyond it is a dead letter."""
    max_bad_share: float = key(0.5, gt=0, le=1)
    """Stop with exit code 5 when more than this share of at least 1,000 records is bad; an Arrow record with good events counts in part."""
    read_ahead: int = key(50_000, ge=0)
    """How many records may be polled, decoded and hashed before they are learned, in a thread beside learning; 0: none, and no thread."""
    on_lost: Literal["stop", "skip"] = "stop"
    """When the topic no longer holds what comes next: stop (exit code 5) and say how much is lost, or count it and go on after it."""

    @field_validator("bootstrap_servers")
    @classmethod
    def _no_login(cls, servers: str) -> str:
        if "@" in servers or "//" in servers:
            raise ValueError(
                f"is host:port,...; a login goes into the Kafka options sasl.username and sasl.password ({_NOT_SHOWN})"
            )
        return servers


class Features(Section):
    """The fields of an impression, in the order of the model's input. With none given they are inferred from the first impressions."""

    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    numeric_encoding: Literal["buckets", "value", "log_value"] = "buckets"
    """buckets: one table row per logarithmic bucket. value: one row per field, times the value. log_value: times sign(x) log(1+|x|)."""
    buckets_per_octave: float = key(2.0, gt=0, le=64)
    hash_seed: int = key(0, ge=0, lt=1 << 32)
    crosses: tuple[Cross, ...] = key((), max_length=256)
    """Cross products of categorical fields and buckets, "age*category", which only the wide side of lr_dnn reads. Where a name has a * or a
    comma, a list of the names."""

    @field_validator("numeric")
    @classmethod
    def _one_kind_each(cls, numeric: tuple[str, ...], info: Any) -> tuple[str, ...]:
        names = [*info.data.get("categorical", ()), *numeric]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"a field is listed twice: {', '.join(twice)}")
        return numeric

    @field_validator("crosses")
    @classmethod
    def _crosses_of_fields(cls, crosses: tuple[Cross, ...], info: Any) -> tuple[Cross, ...]:
        for at, names in enumerate(crosses):
            if any(sorted(names) == sorted(other) for other in crosses[:at]):
                raise ValueError(f"a cross product is listed twice: {shown_cross(names)}")
        if {
            "categorical",
            "numeric",
            "numeric_encoding",
        } <= info.data.keys():  # else they are the error
            fields = _fields(info.data["categorical"], info.data["numeric"])
            require_members(crosses if fields else (), fields, info.data["numeric_encoding"])
        return crosses

    def fields(self) -> tuple[Field, ...]:
        return _fields(self.categorical, self.numeric)


def _fields(categorical: Sequence[str], numeric: Sequence[str]) -> tuple[Field, ...]:
    return (
        *(Field(name, "categorical") for name in categorical),
        *(Field(name, "numeric") for name in numeric),
    )


class Join(Section):
    """How impressions wait for their clicks."""

    label_window: Period = timedelta(minutes=10)
    allowed_lateness: Duration = timedelta(seconds=30)
    early_click_wait: Duration = timedelta(seconds=30)
    """How much earlier than its impression, in event time, a click may be."""
    duplicate_horizon: Duration = timedelta(hours=1)
    idle_timeout: Duration = timedelta(seconds=30)
    """A partition with nothing new for this long no longer holds the watermark back."""
    stall_clicks: float = key(50.0, ge=0)
    """Learning waits when this many clicks should have come since the last one: then clicks are delayed, not absent. 0: never."""
    max_memory: Size = "1GB"
    """Of waiting impressions, early clicks and remembered ids."""
    over_memory: Literal["spill", "evict"] = "spill"
    """Beyond it waiting impressions go to disk, or a uniform share of them is given up; both are counted."""


ModelName = Literal["lr", "fm", "fnn", "ipnn", "opnn", "pnn", "lr_dnn", "fm_dnn", "deepfm"]


class Model(Section):
    """The network and its table. The defaults are the paper's, with no dropout: a stream is seen once."""

    name: ModelName = "deepfm"
    """The one that is published."""
    beside: tuple[ModelName, ...] = ()
    """Others that learn the same examples and are compared with it; the keys below are theirs too, each has a table of its own."""
    embedding_dim: int = key(10, ge=1, le=512)
    hidden: tuple[Annotated[int, key(ge=1, le=16384)], ...] = key((400, 400, 400), max_length=64)
    activation: Literal["paper", "relu", "tanh", "sigmoid"] = "paper"
    """paper: tanh for IPNN, relu for the others."""
    dropout: float = key(0.0, ge=0, lt=1)
    """Share of activations dropped while learning. (The paper gives the share that is kept.)"""
    table_bits: int = key(20, ge=4, le=31)
    """The table has 2 ** table_bits rows."""
    initial_scale: float = key(0.01, ge=0)
    pretrain_examples: int = key(20_000, ge=0)
    """How many FNN learns as the FM that its network begins with."""

    @field_validator("beside")
    @classmethod
    def _another_each(cls, beside: tuple[str, ...], info: Any) -> tuple[str, ...]:
        names = [info.data.get("name"), *beside]
        if twice := sorted({name for name in beside if names.count(name) > 1}):
            raise ValueError(f"a model learns once, model.name too: {', '.join(twice)}")
        return beside


class Learn(Section):
    batch_size: int = key(512, ge=1)
    table_optimizer: Literal["adagrad", "sgd", "adam"] = "adagrad"
    """Of embeddings and first-order weights. The paper has adam, here on the rows of each batch, which are up to three times as wide."""
    table_learning_rate: float = key(0.0, ge=0)
    """Of the embeddings; 0: the optimizer's own, adagrad and sgd 1.0, adam 0.001.

    With adagrad and sgd it is divided by the number of fields, which step together. A step of adagrad is rate / (beta + sqrt(n)) gradients.
    """
    table_beta: float = key(3.0, gt=0)
    """Of adagrad only."""
    linear_learning_rate: float = key(0.0, ge=0)
    """Of the first-order weights, likewise, but crosses count as fields; 0: adagrad and sgd 2.0, adam 0.001."""
    linear_beta: float = key(1.0, gt=0)
    dense_learning_rate: float = key(0.001, gt=0)
    dense_weight_decay: float = key(0.0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the dense part's products (its weights are fp32); auto: bf16 where the processor or the GPU has it. A resumed run keeps it,
    unless it is told another.

    On a GPU those of fp32 are TF32's: 10 bits of mantissa in the factors, fp32 in the sums.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = key(0, ge=0)
    """CPU threads that learn; 0: as many as the machine has. With any number of them the model is the same, bit for bit."""
    seed: int = key(0, ge=0, lt=1 << 63)
    skips_before_rollback: int = key(8, ge=1)
    """After this many batches in a row without a finite loss and gradient, the model goes back to the last good snapshot."""


class Ftrl(Section):
    """FTRL-Proximal as published: it trains `lr`. Where that is not among the models, it stands beside them as `ftrl`."""

    enabled: bool = True
    alpha: float = key(0.1, gt=0)
    beta: float = key(1.0, gt=0)
    l1: float = key(0.0, ge=0)
    l2: float = key(1.0, ge=0)


class Baseline(Section):
    """River's FTRL, in a process of its own."""

    enabled: bool = True
    sample_rate: float = key(1.0, gt=0, le=1)
    """Share of impressions, chosen by a hash of their id, that the baseline learns and that paired figures are computed on."""
    alpha: float = key(0.05, gt=0)
    beta: float = key(1.0, ge=0)
    l1: float = key(0.0, ge=0)
    l2: float = key(1.0, ge=0)
    intercept_learning_rate: float = key(0.01, ge=0)


class Metrics(Section):
    window: Period = timedelta(minutes=10)
    rolling_windows: int = key(6, ge=1, le=1000)
    topic: str = "stream-ctr.metrics"
    """Reports go here too when the input is Kafka; empty: nowhere but the state directory."""


class Schedule(Section):
    report_every: Period = timedelta(seconds=10)
    snapshot_every: Period = timedelta(minutes=10)
    snapshot_examples: int = key(0, ge=0)
    """Also take a snapshot each time this many examples were learned; 0: by the clock only."""


class Snapshots(Section):
    keep: int = key(3, ge=1)
    topic: str = "stream-ctr.snapshots"
    model_name: str = "default"
    """Key of this model's pointer on the snapshot topic."""
    signing_key: str = ""
    """File with an Ed25519 private key (PEM). Snapshots are signed with it, and none without its signature is gone on from."""
    gate_clicks: int = key(1000, ge=0)
    """A snapshot is published unless the model did worse, on at least this many clicks since the last verdict; 0: always published."""
    gate_logloss: float = key(0.1, gt=0)
    """By which share its logloss may be above the baseline's, and above that of the published snapshot."""
    gate_calibration: float = key(0.3, gt=0)
    """By how much |ln(predicted / actual clicks)| may be above the baseline's (without one: the published snapshot's)."""


class Config(Section):
    """Everything that can be set. `stream-ctr config` prints it with the values in force."""

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


def load(
    path: Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration in force: `overrides` over `environ` over the TOML file at `path` over `base` over the defaults.

    Raises `ConfigError` that names each wrong key, the nearest match and the value.
    """
    layers = [
        base or {},
        _read_toml(path) if path else {},
        _from_environment(environ),
        overrides or {},
    ]
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            before = merged.get(section, {})
            if isinstance(before, Mapping):  # else it stays, to be named
                merged[section] = {**before, **values} if isinstance(values, Mapping) else values
    try:
        return Config(**merged)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(error))) from None


def known_keys() -> Iterator[str]:
    """Every `section.key` that can be set."""
    for section, info in Config.model_fields.items():
        assert isinstance(info.annotation, type)
        for name in info.annotation.model_fields:
            yield f"{section}.{name}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """STREAM_CTR_SECTION__KEY=value; lists are written a,b,c."""
    names = {
        f"{ENVIRONMENT_PREFIX}{dotted.replace('.', '__').upper()}": dotted
        for dotted in known_keys()
    }
    layer: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in ENVIRONMENT_OTHERS:
            continue
        if name not in names:
            raise ConfigError(f"unknown environment variable {name!r}{nearest(name, names)}")
        section, option = names[name].split(".")
        layer.setdefault(section, {})[option] = parse_text(section, option, value)
    return layer


def parse_text(section: str, option: str, value: str) -> object:
    """The text of an environment variable or of `-X section.key=value`: a list where the key holds one."""
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type)
    if isinstance(annotation.model_fields[option].default, tuple):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            owner = Config.model_fields[where[0]].annotation if len(where) > 1 else Config
            assert isinstance(owner, type)
            words = (
                owner.model_fields
                if len(where) == 1
                else [f"{where[0]}.{name}" for name in owner.model_fields]
            )
            name = ".".join(where[:2])
            yield f"unknown key {name!r}{nearest(name, words)}"
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            shown = f"{problem['input']!r:.200}"
            yield f"{'.'.join(where)}: {reason}" + (
                "" if shown in reason or _NOT_SHOWN in reason else f", got {shown}"
            )
