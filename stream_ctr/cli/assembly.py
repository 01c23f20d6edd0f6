"""From configuration to a trainer: the one place below the commands that reads a `Config`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stream_ctr.config import Config, in_milliseconds, size
from stream_ctr.errors import ConfigError
from stream_ctr.evaluate.gate import Gate
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.learn.baseline import BaselineProcess
from stream_ctr.learn.learner import choose_device, choose_precision, make_learner
from stream_ctr.learn.thread_pool import set_up_process
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.train.ingest import Ingest, ReadAhead
from stream_ctr.train.source import Source
from stream_ctr.train.trainer import Flags, Trainer

_FTRL = "ftrl"  # what the logistic regression is called that stands beside any other model
# Sections that a state directory keeps: a later run on it starts from these.
KEPT_SECTIONS = ("features", "join", "model", "learn", "ftrl", "baseline", "metrics")


def build_trainer(
    config: Config,
    *,
    fields: Sequence[Field],
    source: Source,
    publisher: Publisher,
    directory: Path,
    flags: Flags | None = None,
    show: Callable[[Mapping[str, Any]], None] = lambda report: None,
    notes: Callable[[], Sequence[str]] = tuple,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
) -> Trainer:
    """Everything that `run` runs. Raises `ConfigError` where the machine cannot do what was asked."""
    set_up_process()
    precision = choose_precision(config.learn.precision, choose_device(config.learn.device))
    config = config.model_copy(
        update={"learn": config.learn.model_copy(update={"precision": precision})}
    )
    hashing = {
        "table_bits": config.model.table_bits,
        **config.features.model_dump(mode="json", exclude={"categorical", "numeric"}),
    }
    try:
        hasher = Hasher(fields, **hashing)
    except ValueError as error:
        raise ConfigError(f"features.crosses: {error}") from None
    learning = _learner_options(config, hasher)
    published, *beside = learning
    joining = {
        "label_window_ms": in_milliseconds(config.join.label_window),
        "early_click_wait_ms": in_milliseconds(config.join.early_click_wait),
        "duplicate_horizon_ms": in_milliseconds(config.join.duplicate_horizon),
    }
    lateness_ms = in_milliseconds(config.join.allowed_lateness)
    river = config.baseline.model_dump(exclude={"enabled", "sample_rate"}) | {
        "value_fields": hasher.value_fields
    }
    features = {
        "categorical": [f.name for f in fields if f.kind == "categorical"],
        "numeric": [f.name for f in fields if f.kind == "numeric"],
    }
    kept = config.model_dump(mode="json", include=set(KEPT_SECTIONS))
    identity = {
        "model": config.snapshots.model_name,
        "schema": {"fields": [[field.name, field.kind] for field in fields], **hashing},
        "learner": learning[published],
        "beside": {name: learning[name] for name in beside},
        "join": {**joining, "allowed_lateness_ms": lateness_ms},
        "baseline": {
            "enabled": config.baseline.enabled,
            "sample_rate": config.baseline.sample_rate,
            **river,
        },
        "config": {**kept, "features": {**kept["features"], **features}},
    }
    try:
        joiner = LabelJoiner(
            fields=len(fields) + len(hasher.crosses), value_fields=len(hasher.value_fields), id_bits=config.model.table_bits, **joining,
            max_bytes=size(config.join.max_memory), over_bound=config.join.over_memory, spill_directory=directory / "spill",
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"join.max_memory = {config.join.max_memory!r}: {error}") from None
    learners = {
        name: make_learner(**of, device=config.learn.device, threads=config.learn.threads)
        for name, of in learning.items()
    }
    decoder = Decoder(
        fields,
        max_record_bytes=config.input.max_record_bytes,
        max_ahead_ms=in_milliseconds(config.input.max_ahead),
    )
    ingest = Ingest(
        source,
        decoder,
        hasher,
        idle_seconds=config.join.idle_timeout.total_seconds(),
        clock=clock,
        wall_clock=wall_clock,
    )
    return Trainer(
        ingest=ReadAhead(ingest, most_records=config.input.read_ahead)
        if config.input.read_ahead
        else ingest,
        publisher=publisher,
        joiner=joiner,
        learners=learners,
        directory=directory,
        identity=identity,
        baseline=BaselineProcess(**river) if config.baseline.enabled else None,
        baseline_share=config.baseline.sample_rate,
        lateness_ms=lateness_ms,
        stall_clicks=config.join.stall_clicks,
        window_ms=in_milliseconds(config.metrics.window),
        rolling_windows=config.metrics.rolling_windows,
        snapshot_examples=config.schedule.snapshot_examples,
        keep_snapshots=config.snapshots.keep,
        signing=signing_key(config),
        gate=Gate(
            config.snapshots.gate_clicks,
            config.snapshots.gate_logloss,
            config.snapshots.gate_calibration,
        ),
        skips_before_rollback=config.learn.skips_before_rollback,
        max_bad_share=config.input.max_bad_share,
        flags=flags,
        show=show,
        notes=notes,
        clock=clock,
        wall_clock=wall_clock,
    )


def signing_key(config: Config) -> SigningKey | None:
    """What snapshots are signed with, if they are. Raises `ConfigError` when it cannot be read."""
    return SigningKey(Path(config.snapshots.signing_key)) if config.snapshots.signing_key else None


def _learner_options(config: Config, hasher: Hasher) -> dict[str, dict[str, Any]]:
    """Name -> what rebuilds the learner, on any device; the published one first."""
    models: dict[str, str] = {name: name for name in (config.model.name, *config.model.beside)}
    if config.ftrl.enabled and "lr" not in models:
        models[_FTRL] = "lr"
    rates = config.ftrl.model_dump(exclude={"enabled"})
    common = _common_options(config, hasher)
    return {
        name: {"model": model, **common, **({"ftrl": rates} if model == "lr" else {})}
        for name, model in models.items()
    }


def _common_options(config: Config, hasher: Hasher) -> dict[str, Any]:
    model = config.model.model_dump(exclude={"name", "beside"}) | {
        "hidden": list(config.model.hidden)
    }
    learn = config.learn.model_dump(exclude={"device", "threads", "skips_before_rollback"})
    of_input = {
        "fields": len(hasher.fields),
        "crosses": len(hasher.crosses),
        "value_fields": hasher.value_fields,
    }
    return {**of_input, **model, **learn}
